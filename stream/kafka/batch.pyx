# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A batch of records for a producer, written directly as bytes in Kafka's record format 2.

It replaces aiokafka's own builder, which makes an object of every record. producer.py sends it, and
`AIOKafkaProducer.send_batch` accepts either.
The CloudEvents headers of a message are written from the facts that it carries.

Source   Kafka protocol guide, "Record Batch"; CloudEvents 1.0.2, Kafka protocol binding, binary mode.
"""
cdef extern from *:
    const char* _SOURCE_HASH "SOURCE_HASH"

SOURCE_HASH = _SOURCE_HASH.decode()

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_Resize
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from stream.core.outbox cimport Message

from aiokafka.record.util import calc_crc32c

cdef extern from *:
    """
    #if defined(__x86_64__) && defined(__GNUC__)
    #include <nmmintrin.h>
    #include <string.h>
    #include <cpuid.h>
    static int crc32c_is_fast(void) {
        unsigned int a, b, c, d;
        return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_SSE4_2);
    }
    #ifdef __clang__
    __attribute__((target("sse4.2,crc32")))
    #else
    __attribute__((target("sse4.2")))
    #endif
    static uint32_t crc32c_fast(const char* at, size_t size) {
        uint64_t crc = 0xFFFFFFFFu, word;
        for (; size >= 8; size -= 8, at += 8) {
            memcpy(&word, at, 8);
            crc = _mm_crc32_u64(crc, word);
        }
        for (; size; size--, at++)
            crc = _mm_crc32_u8((uint32_t)crc, (unsigned char)*at);
        return (uint32_t)crc ^ 0xFFFFFFFFu;
    }
    #else
    static int crc32c_is_fast(void) { return 0; }
    static uint32_t crc32c_fast(const char* at, size_t size) { return 0; }
    #endif
    """
    bint crc32c_is_fast() nogil
    uint32_t crc32c_fast(const char* at, size_t size) nogil

cdef bint CRC_IS_FAST = crc32c_is_fast()

cdef enum:
    BATCH_HEADER_BYTES = 61
    FROM_CRC = 21           # the checksum covers everything from here on
    RECORD_HEADER_BYTES = 32        # more than the length, attributes and deltas of a record need


cdef inline char* varint(char* at, int64_t value) noexcept:
    """Write a zigzag number, 7 bits per byte, the lowest first; return the place after it."""
    cdef uint64_t left = (<uint64_t> value << 1) ^ <uint64_t> (value >> 63)
    while left >= 0x80:
        at[0] = <char> (left & 0x7F | 0x80)
        at += 1
        left >>= 7
    at[0] = <char> left
    return at + 1


cdef inline Py_ssize_t varint_size(int64_t value) noexcept:
    cdef char room[10]
    return varint(room, value) - room


cdef inline void big_endian(char* at, uint64_t value, int size) noexcept:
    while size:
        size -= 1
        at[size] = <char> (value & 0xFF)
        value >>= 8


cdef bytes sized(bytes data):
    """The length of the bytes, then the bytes."""
    cdef char room[10]
    cdef Py_ssize_t size = varint(room, len(data)) - room
    return room[:size] + data


cdef bytes SPEC_VERSION = sized(b'ce_specversion') + sized(b'1.0')
cdef bytes CONTENT_TYPE = sized(b'content-type') + sized(b'application/json')
cdef bytes ID_NAME = sized(b'ce_id')
cdef bytes TYPE_NAME = sized(b'ce_type')
cdef bytes TIME_NAME = sized(b'ce_time')
cdef bytes SUBJECT_NAME = sized(b'ce_subject')
cdef bytes NO_VALUE = b'\x01'     # the length -1
cdef int HEADERS = 7
cdef int TIME_SIZE = 24     # 2023-11-14T22:13:20.123Z


cdef void put_digits(char* at, int64_t value, int digits) noexcept:
    while digits:
        digits -= 1
        at[digits] = <char> (48 + value % 10)
        value //= 10


cdef void put_time(char* at, int64_t ms) noexcept:
    """Write a time after 1970 in RFC 3339, UTC. Source: Hinnant, "chrono-compatible low-level date algorithms"."""
    cdef int64_t days = ms // 86400000, in_day = ms % 86400000
    cdef int64_t z = days + 719468
    cdef int64_t era = z // 146097, of_era = z - era * 146097
    cdef int64_t year_of_era = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    cdef int64_t day_of_year = of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    cdef int64_t mp = (5 * day_of_year + 2) // 153
    cdef int64_t month = mp + 3 if mp < 10 else mp - 9
    put_digits(at, year_of_era + era * 400 + (month <= 2), 4)
    at[4] = at[7] = 45
    put_digits(at + 5, month, 2)
    put_digits(at + 8, day_of_year - (153 * mp + 2) // 5 + 1, 2)
    at[10] = 84
    put_digits(at + 11, in_day // 3600000, 2)
    at[13] = at[16] = 58
    put_digits(at + 14, in_day // 60000 % 60, 2)
    put_digits(at + 17, in_day // 1000 % 60, 2)
    at[19] = 46
    put_digits(at + 20, in_day % 1000, 3)
    at[23] = 90


@cython.final
cdef class RecordBatch:
    """Records of one topic partition, in order.

    bytes_max     limit on the size of the batch. The first record is accepted whatever its size
    timestamp_ms  the timestamp of all records
    """

    cdef bytearray _bytes
    cdef Py_ssize_t _size, _room, _bytes_max
    cdef int32_t _records
    cdef int64_t _timestamp_ms
    cdef int64_t _producer_id
    cdef int16_t _producer_epoch
    cdef int32_t _base_sequence
    cdef bint _closed, _built

    def __cinit__(self, Py_ssize_t bytes_max, int64_t timestamp_ms):
        self._bytes_max, self._timestamp_ms = bytes_max, timestamp_ms
        self._size = BATCH_HEADER_BYTES
        self._room = 1 << 16
        self._bytes = PyByteArray_FromStringAndSize(NULL, self._room)
        self._producer_id = -1
        self._producer_epoch = -1

    cdef char* _open(self, Py_ssize_t body, bytes key, value) except? NULL:
        """Begin a record with room for `body` bytes: the count of headers and the headers. NULL if the batch is full."""
        cdef Py_ssize_t key_size = -1 if key is None else PyBytes_GET_SIZE(key)
        cdef Py_ssize_t value_size = -1 if value is None else PyBytes_GET_SIZE(value)
        cdef Py_ssize_t size = (2 + varint_size(self._records) + varint_size(key_size) + max(key_size, 0)
                                + varint_size(value_size) + max(value_size, 0) + body)
        cdef char* at
        if self._closed or (self._records and self._size + varint_size(size) + size > self._bytes_max):
            self._closed = True
            return NULL
        if self._size + size + RECORD_HEADER_BYTES > self._room:
            self._room = max(4 * self._room, self._size + size + RECORD_HEADER_BYTES)
            PyByteArray_Resize(self._bytes, self._room)
        at = varint(PyByteArray_AS_STRING(self._bytes) + self._size, size)
        self._size = at - PyByteArray_AS_STRING(self._bytes) + size
        at[0] = at[1] = 0       # attributes, timestamp delta
        at = varint(at + 2, self._records)
        self._records += 1
        at = varint(at, key_size)
        if key_size > 0:
            memcpy(at, PyBytes_AS_STRING(key), key_size)
            at += key_size
        at = varint(at, value_size)
        if value_size > 0:
            memcpy(at, PyBytes_AS_STRING(value), value_size)
            at += value_size
        return at

    def add_records(self, list records not None, Py_ssize_t at):
        """Add the records from index `at` on; return the index of the first one that does not fit.

        records   tuples of key, value and headers; headers are pairs of a name and bytes (or None)
        """
        while at < len(records):
            key, value, headers = <tuple> records[at]
            if not self._add(key, value, headers):
                break
            at += 1
        return at

    cdef bint _add(self, bytes key, bytes value, headers) except -1:
        cdef bytes written = b'' if not headers else b''.join([
            sized(name.encode()) + (NO_VALUE if content is None else sized(content)) for name, content in headers])
        cdef Py_ssize_t size = PyBytes_GET_SIZE(written), count = len(headers)
        cdef char* at = self._open(varint_size(count) + size, key, value)
        if at == NULL:
            return False
        at = varint(at, count)
        memcpy(at, PyBytes_AS_STRING(written), size)
        return True

    def add_messages(self, list messages not None, Py_ssize_t at, bytes source not None):
        """Add the messages from index `at` on; return the index of the first one that does not fit.

        messages  `stream.core.outbox.Message`
        source    the header `ce_source`, from `source_header`
        """
        while at < len(messages):
            if not self._add_message(messages[at], source):
                break
            at += 1
        return at

    cdef bint _add_message(self, Message message, bytes source) except -1:
        """Add a message with its CloudEvents headers. False if it does not fit."""
        cdef Py_ssize_t type_size, id_size = sizeof(message.id_hex), key_size = PyBytes_GET_SIZE(message.key)
        cdef const char* kind = PyUnicode_AsUTF8AndSize(message.kind, &type_size)
        cdef Py_ssize_t body = (
            1 + PyBytes_GET_SIZE(SPEC_VERSION) + PyBytes_GET_SIZE(ID_NAME) + varint_size(id_size) + id_size
            + PyBytes_GET_SIZE(TYPE_NAME) + varint_size(type_size) + type_size + PyBytes_GET_SIZE(source)
            + PyBytes_GET_SIZE(TIME_NAME) + 1 + TIME_SIZE + PyBytes_GET_SIZE(SUBJECT_NAME) + varint_size(key_size)
            + key_size + PyBytes_GET_SIZE(CONTENT_TYPE))
        cdef char* at = self._open(body, message.key, message.value)
        if at == NULL:
            return False
        at = varint(at, HEADERS)
        at = copied(at, SPEC_VERSION)
        at = varint(copied(at, ID_NAME), id_size)
        memcpy(at, message.id_hex, id_size)
        at = varint(copied(at + id_size, TYPE_NAME), type_size)
        memcpy(at, kind, type_size)
        at = copied(at + type_size, source)
        at = varint(copied(at, TIME_NAME), TIME_SIZE)
        put_time(at, message.as_of_ms)
        at = varint(copied(at + TIME_SIZE, SUBJECT_NAME), key_size)
        copied(copied(at, message.key), CONTENT_TYPE)
        return True

    # ---- the interface of a builder in aiokafka -----------------------------------------------------------------------------

    def append(self, **record):
        """Refuse: the producer itself adds nothing."""
        return None

    def close(self):
        self._closed = True

    def closed(self):
        return self._closed

    def record_count(self):
        return self._records

    def size(self):
        return self._size

    def _set_producer_state(self, int64_t producer_id, int16_t producer_epoch, int32_t base_sequence):
        if (producer_id, producer_epoch, base_sequence) != (
                self._producer_id, self._producer_epoch, self._base_sequence):
            self._built = False
        self._producer_id, self._producer_epoch, self._base_sequence = producer_id, producer_epoch, base_sequence

    def _build(self):
        """The bytes of the batch. The producer has set its state before. They change only if it sets another one."""
        cdef char* at
        self._closed = True
        if not self._built:
            self._built = True
            PyByteArray_Resize(self._bytes, self._size)
            at = PyByteArray_AS_STRING(self._bytes)
            big_endian(at, 0, 8)                            # base offset
            big_endian(at + 8, self._size - 12, 4)          # length of what follows
            big_endian(at + 12, 0, 4)                       # leader epoch, the broker's
            at[16] = 2                                      # format
            big_endian(at + 21, 0, 2)                       # attributes: not compressed, creation time
            big_endian(at + 23, self._records - 1, 4)
            big_endian(at + 27, self._timestamp_ms, 8)      # first
            big_endian(at + 35, self._timestamp_ms, 8)      # largest
            big_endian(at + 43, <uint64_t> self._producer_id, 8)
            big_endian(at + 51, <uint64_t> <int64_t> self._producer_epoch, 2)
            big_endian(at + 53, <uint64_t> <int64_t> self._base_sequence, 4)
            big_endian(at + 57, self._records, 4)
            big_endian(at + 17, crc32c_fast(at + FROM_CRC, self._size - FROM_CRC) if CRC_IS_FAST
                       else calc_crc32c(memoryview(self._bytes)[FROM_CRC:]), 4)
        return self._bytes


cdef inline char* copied(char* at, bytes data) noexcept:
    memcpy(at, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    return at + PyBytes_GET_SIZE(data)


def source_header(str source not None):
    """The header `ce_source` in the form that `RecordBatch.add_messages` takes."""
    return sized(b'ce_source') + sized(source.encode())
