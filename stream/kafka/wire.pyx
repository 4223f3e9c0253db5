# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Requests and responses of Kafka's protocol in bytes: Produce 3 to 8 and Fetch 4 to 11.

The client library makes an object of each field, which takes longer than everything else that a small request costs.
Responses come from outside, so every read is checked against the end of the bytes.

Source   Kafka protocol guide, "Produce API" and "Fetch API".
"""
cdef extern from *:
    const char* _SOURCE_HASH "SOURCE_HASH"

SOURCE_HASH = _SOURCE_HASH.decode()

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from libc.stdint cimport int16_t, int32_t, int64_t, uint64_t
from libc.string cimport memcpy


# ---- writing -----------------------------------------------------------------------------------------------------------

cdef inline char* put(char* at, uint64_t value, int size) noexcept:
    """Write a number, the highest byte first; return the place after it."""
    cdef int left = size
    while left:
        left -= 1
        at[left] = <char> (value & 0xFF)
        value >>= 8
    return at + size


cdef inline char* put_name(char* at, bytes name) noexcept:
    """Write a string: its length in 2 bytes, then the string."""
    at = put(at, <uint64_t> PyBytes_GET_SIZE(name), 2)
    memcpy(at, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
    return at + PyBytes_GET_SIZE(name)


def request_header(int api_key, int version, int correlation_id, bytes client_id not None):
    """The header of a request, version 1."""
    cdef bytes made = PyBytes_FromStringAndSize(NULL, 10 + PyBytes_GET_SIZE(client_id))
    cdef char* at = PyBytes_AS_STRING(made)
    at = put(at, <uint64_t> api_key, 2)
    at = put(at, <uint64_t> version, 2)
    at = put(at, <uint64_t> correlation_id, 4)
    put_name(at, client_id)
    return made


def produce_request(int timeout_ms, dict topics not None):
    """A request that all replicas in sync shall acknowledge.

    topics   name -> list of partition and batch, which is a `bytearray`
    """
    cdef Py_ssize_t size = 2 + 2 + 4 + 4
    cdef bytes name, made
    cdef list partitions
    cdef bytearray batch
    cdef char* at
    for name, partitions in topics.items():
        size += 2 + PyBytes_GET_SIZE(name) + 4
        for _, batch in partitions:
            size += 4 + 4 + PyByteArray_GET_SIZE(batch)
    made = PyBytes_FromStringAndSize(NULL, size)
    at = PyBytes_AS_STRING(made)
    at = put(at, 0xFFFF, 2)         # no transaction
    at = put(at, 0xFFFF, 2)         # acknowledgements: all
    at = put(at, <uint64_t> timeout_ms, 4)
    at = put(at, <uint64_t> len(topics), 4)
    for name, partitions in topics.items():
        at = put_name(at, name)
        at = put(at, <uint64_t> len(partitions), 4)
        for number, batch in partitions:
            at = put(at, <uint64_t> <int32_t> number, 4)
            at = put(at, <uint64_t> PyByteArray_GET_SIZE(batch), 4)
            memcpy(at, PyByteArray_AS_STRING(batch), PyByteArray_GET_SIZE(batch))
            at += PyByteArray_GET_SIZE(batch)
    return made


def fetch_request(int version, int wait_ms_max, int bytes_min, int bytes_max, int isolation, int partition_bytes_max,
                  dict topics not None):
    """A request outside of any fetch session.

    topics   name -> list of partition and offset
    """
    cdef Py_ssize_t size = 64
    cdef bytes name, made
    cdef list partitions
    cdef char* at
    for name, partitions in topics.items():
        size += 2 + PyBytes_GET_SIZE(name) + 4 + 28 * len(partitions)
    made = PyBytes_FromStringAndSize(NULL, size)
    at = PyBytes_AS_STRING(made)
    at = put(at, 0xFFFFFFFF, 4)     # replica: none, a consumer
    at = put(at, <uint64_t> wait_ms_max, 4)
    at = put(at, <uint64_t> bytes_min, 4)
    at = put(at, <uint64_t> bytes_max, 4)
    at = put(at, <uint64_t> isolation, 1)
    if version >= 7:
        at = put(at, 0, 4)          # session: none
        at = put(at, 0xFFFFFFFF, 4)
    at = put(at, <uint64_t> len(topics), 4)
    for name, partitions in topics.items():
        at = put_name(at, name)
        at = put(at, <uint64_t> len(partitions), 4)
        for number, offset in partitions:
            at = put(at, <uint64_t> <int32_t> number, 4)
            if version >= 9:
                at = put(at, 0xFFFFFFFF, 4)             # leader epoch: unknown
            at = put(at, <uint64_t> <int64_t> offset, 8)
            if version >= 5:
                at = put(at, 0xFFFFFFFFFFFFFFFF, 8)     # start of the log: only replicas tell it
            at = put(at, <uint64_t> partition_bytes_max, 4)
    if version >= 7:
        at = put(at, 0, 4)          # partitions to remove from the session
    if version >= 11:
        at = put(at, 0, 2)          # rack
    return made[:at - PyBytes_AS_STRING(made)]


# ---- reading -----------------------------------------------------------------------------------------------------------

@cython.final
cdef class Reader:
    """Reads numbers and bytes in order. Errors: ValueError if the bytes end too early."""

    cdef bytes _data
    cdef const unsigned char* _at
    cdef const unsigned char* _end

    def __cinit__(self, bytes data not None, Py_ssize_t begin):
        self._data = data
        self._at = <const unsigned char*> PyBytes_AS_STRING(data)
        self._end = self._at + PyBytes_GET_SIZE(data)
        self.skip(begin)

    cdef int need(self, Py_ssize_t size) except -1:
        if size < 0 or size > self._end - self._at:
            raise ValueError('a response of the broker ends too early')
        return 0

    cdef int skip(self, Py_ssize_t size) except -1:
        self.need(size)
        self._at += size
        return 0

    cdef int64_t number(self, int size) except? -7:
        """A number with a sign."""
        cdef uint64_t value = 0
        cdef int left = size
        self.need(size)
        while left:
            value = value << 8 | self._at[0]
            self._at += 1
            left -= 1
        if size == 2:
            return <int16_t> value
        if size == 4:
            return <int32_t> value
        return <int64_t> value

    cdef int64_t count(self, Py_ssize_t item_size) except? -7:
        """The length of a list. It is 0 for an absent list, and never more than can follow."""
        cdef int64_t value = self.number(4)
        if value > 0:
            self.need(value * item_size)
        return max(value, 0)

    cdef bytes take(self, int64_t size):
        """So many bytes. None if the size is below 0."""
        cdef bytes made
        if size < 0:
            return None
        self.need(size)
        made = PyBytes_FromStringAndSize(<const char*> self._at, size)
        self._at += size
        return made


def produce_response(bytes data not None, Py_ssize_t begin, int version):
    """Tuples of topic, partition, error code, offset and the broker's message. `begin` is the size of the header."""
    cdef Reader reader = Reader(data, begin)
    cdef list parts = []
    cdef int64_t offset
    for _ in range(reader.count(6)):
        topic = reader.take(reader.number(2))
        for _ in range(reader.count(22)):
            number, error, offset = reader.number(4), reader.number(2), reader.number(8)
            reader.skip(8)              # time of the append
            if version >= 5:
                reader.skip(8)          # start of the log
            message = None
            if version >= 8:
                for _ in range(reader.count(6)):        # errors of single records
                    reader.skip(4)
                    text = reader.take(reader.number(2))
                    message = message or text
                message = reader.take(reader.number(2)) or message
            parts.append((topic, number, error, offset, message))
    reader.skip(4)      # time of throttling
    return parts


def fetch_response(bytes data not None, Py_ssize_t begin, int version):
    """The error code of the response, and its partitions. `begin` is the size of the header.

    Each partition is a tuple: (topic, partition), error code, end of the log, end of what is committed, aborted
    transactions (producer and first offset), records.
    """
    cdef Reader reader = Reader(data, begin)
    cdef list parts = [], aborted
    cdef int64_t number, error, end, stable
    cdef int failed = 0
    reader.skip(4)      # time of throttling
    if version >= 7:
        failed = <int> reader.number(2)
        reader.skip(4)
    for _ in range(reader.count(6)):
        topic = reader.take(reader.number(2)).decode()
        for _ in range(reader.count(26)):
            number, error, end, stable = reader.number(4), reader.number(2), reader.number(8), reader.number(8)
            if version >= 5:
                reader.skip(8)
            aborted = None
            for _ in range(reader.count(16)):
                if aborted is None:
                    aborted = []
                producer, first = reader.number(8), reader.number(8)
                aborted.append((producer, first))
            if version >= 11:
                reader.skip(4)
            parts.append(((topic, number), error, end, stable, aborted, reader.take(reader.number(4)) or b''))
    return failed, parts
