# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A fast parser for ordinary events. Every input record goes through it.

An ordinary event is one flat JSON object in ASCII, without escapes, whose numbers are plain decimals. Nearly all
records are like that. For any other record `EventParser` returns None, and `stream.core.events.Decoder` decides with a
complete JSON decoder what the record is. The parser never refuses a record. An event that it returns equals the
decoder's (test_parser_and_decoder_agree).

Numbers  Up to 15 significant digits and up to 15 decimals. Mantissa and power of ten are then exact doubles, so their
         quotient is the double nearest to the written number (Clinger, "How to read floating point numbers accurately",
         1990).
Hashes   XXH3 of up to 64 bytes with seed 0, after the format's description (Collet, xxhash_spec.md). Records with
         longer texts to hash go to the decoder.
"""
cdef extern from *:
    const char* _SOURCE_HASH "SOURCE_HASH"

SOURCE_HASH = _SOURCE_HASH.decode()

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy


# ---- the event ------------------------------------------------------------------------------------------------------

@cython.final
@cython.no_gc
@cython.freelist(4096)
cdef class Event:
    """A valid event in the form that the window keeps.

    Units    `ts_ms` is in Unix milliseconds. `amount` is price times quantity in the configured currency, never
             negative.
    Hashes   XXH3 of the text: `key` has 64 bits of the event id, `item` and `basket` 32 bits, `category` 16 bits. In
             the last three, 0 means absent. The probability that a new event shares its key with another event of a
             window of 128 is below 128 / 2**64.
    Place    `source` and `offset` say where the event was read. The reader sets them.
    rating   the rating in tenths, plus one; 0 means no rating
    """

    def __init__(self, str user_id, str event_id, uint64_t key, int64_t ts_ms, uint8_t type, uint32_t item,
                 uint16_t category, uint32_t basket, double amount, uint8_t rating, uint8_t source=0,
                 int64_t offset=0):
        self.user_id, self.event_id, self.key, self.ts_ms, self.type = user_id, event_id, key, ts_ms, type
        self.item, self.category, self.basket, self.amount, self.rating = item, category, basket, amount, rating
        self.source, self.offset = source, offset

    def _values(self):
        return (self.user_id, self.event_id, self.key, self.ts_ms, self.type, self.item, self.category, self.basket,
                self.amount, self.rating, self.source, self.offset)

    def __eq__(self, other):
        return isinstance(other, Event) and self._values() == (<Event> other)._values()

    def __repr__(self):
        return f'Event{self._values()}'


# ---- XXH3 -----------------------------------------------------------------------------------------------------------

cdef uint8_t SECRET[64]       # the first 64 bytes of XXH3's default secret
_SECRET = bytes.fromhex('b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f'
                        'cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c')
memcpy(SECRET, PyBytes_AS_STRING(_SECRET), 64)
cdef uint64_t PRIME64_1 = 0x9E3779B185EBCA87ULL, PRIME64_2 = 0xC2B2AE3D27D4EB4FULL
cdef uint64_t PRIME64_3 = 0x165667B19E3779F9ULL
cdef uint64_t PRIME_MX1 = 0x165667919E3779F9ULL, PRIME_MX2 = 0x9FB21C651E98DF25ULL

cdef extern from *:
    """
    static inline uint64_t mul128_fold64(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    """
    uint64_t mul128_fold64(uint64_t a, uint64_t b) nogil
    uint64_t __builtin_bswap64(uint64_t value) nogil


cdef inline uint64_t read64(const uint8_t* at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return value


cdef inline uint32_t read32(const uint8_t* at) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, at, 4)
    return value


cdef inline uint64_t avalanche(uint64_t h) noexcept nogil:
    h ^= h >> 37
    h *= PRIME_MX1
    return h ^ (h >> 32)


cdef inline uint64_t mix16(const uint8_t* at, const uint8_t* secret) noexcept nogil:
    return mul128_fold64(read64(at) ^ read64(secret), read64(at + 8) ^ read64(secret + 8))


cdef uint64_t xxh3(const uint8_t* at, Py_ssize_t size) noexcept nogil:
    """The 64-bit XXH3 with seed 0 of 1 to 64 bytes."""
    cdef uint64_t h, flip, low, high
    cdef uint32_t combined
    cdef Py_ssize_t i
    if size > 16:
        h = <uint64_t> size * PRIME64_1
        i = (size - 1) // 32
        while i >= 0:
            h += mix16(at + 16 * i, SECRET + 32 * i)
            h += mix16(at + size - 16 * (i + 1), SECRET + 32 * i + 16)
            i -= 1
        return avalanche(h)
    if size > 8:
        low = read64(at) ^ (read64(SECRET + 24) ^ read64(SECRET + 32))
        high = read64(at + size - 8) ^ (read64(SECRET + 40) ^ read64(SECRET + 48))
        return avalanche(<uint64_t> size + __builtin_bswap64(low) + high + mul128_fold64(low, high))
    if size >= 4:
        flip = read64(SECRET + 8) ^ read64(SECRET + 16)
        h = (<uint64_t> read32(at + size - 4) + (<uint64_t> read32(at) << 32)) ^ flip
        h ^= ((h << 49) | (h >> 15)) ^ ((h << 24) | (h >> 40))
        h *= PRIME_MX2
        h ^= (h >> 35) + <uint64_t> size
        h *= PRIME_MX2
        return h ^ (h >> 28)
    combined = ((<uint32_t> at[0] << 16) | (<uint32_t> at[size >> 1] << 24) | <uint32_t> at[size - 1]
                | (<uint32_t> size << 8))
    h = <uint64_t> combined ^ <uint64_t> (read32(SECRET) ^ read32(SECRET + 4))
    h ^= h >> 33
    h *= PRIME64_2
    h ^= h >> 29
    h *= PRIME64_3
    return h ^ (h >> 32)


# ---- the parser -----------------------------------------------------------------------------------------------------

cdef struct Text:       # where a string of the record begins, and its length; `at` is NULL if it is absent or null
    const uint8_t* at
    Py_ssize_t size


cdef double POWERS[16]
for _power in range(16):
    POWERS[_power] = 10.0 ** _power
cdef Py_ssize_t HASHED_MAX = 64
cdef Py_ssize_t ID_MAX = 256
cdef int TYPES_MAX = 32
cdef uint64_t DIGITS15 = 1000000000000000ULL


cdef inline bint is_space(uint8_t c) noexcept nogil:
    return c == 0x20 or c == 0x0A or c == 0x0D or c == 0x09


cdef inline bint names(Text* name, const char* field, Py_ssize_t size) noexcept nogil:
    return name.size == size and memcmp(name.at, field, size) == 0


cdef const uint8_t* read_string(const uint8_t* at, const uint8_t* end, Text* text) noexcept nogil:
    """Read a plain string from behind its opening quote. Returns the place behind its closing quote, or NULL."""
    cdef const uint8_t* start = at
    while at < end and at[0] != 0x22:
        if at[0] < 0x20 or at[0] >= 0x7F or at[0] == 0x5C:
            return NULL
        at += 1
    if at >= end:
        return NULL
    text.at, text.size = start, at - start
    return at + 1


cdef const uint8_t* read_number(const uint8_t* at, const uint8_t* end, uint64_t* mantissa, int* decimals) noexcept nogil:
    """Read a plain number >= 0: a mantissa below 10**15 and its number of decimals. Returns NULL for other numbers."""
    cdef const uint8_t* start = at
    cdef uint64_t value = 0
    cdef int places = 0
    while at < end and 0x30 <= at[0] <= 0x39:
        value = value * 10 + (at[0] - 0x30)
        at += 1
        if at - start > 15:
            return NULL
    if at == start or (start[0] == 0x30 and at - start > 1):
        return NULL
    if at < end and at[0] == 0x2E:
        at += 1
        while at < end and 0x30 <= at[0] <= 0x39:
            value = value * 10 + (at[0] - 0x30)
            places += 1
            at += 1
            if value >= DIGITS15 or places > 15:
                return NULL
        if not places:
            return NULL
    if at < end and (at[0] == 0x65 or at[0] == 0x45):
        return NULL
    mantissa[0], decimals[0] = value, places
    return at


@cython.final
cdef class EventParser:
    """Parses ordinary events by one shop's rules.

    currency            currency of all amounts; a record with another one goes to the decoder
    clock_ahead_ms_max  how far an event may be ahead of its record's timestamp, in ms
    types               type name -> code, for the known types
    other               the code of any other type
    """

    cdef bytes _currency
    cdef int64_t _ahead_ms, _ts_ms_min, _ts_ms_max
    cdef Py_ssize_t _bytes_max
    cdef double _price_max, _quantity_max, _rating_max
    cdef uint8_t _other
    cdef int _types
    cdef list _type_names
    cdef const char* _type_at[32]
    cdef Py_ssize_t _type_size[32]
    cdef uint8_t _type_code[32]

    def __init__(self, str currency, int64_t clock_ahead_ms_max, Py_ssize_t record_bytes_max, int64_t ts_ms_min,
                 int64_t ts_ms_max, double price_max, double quantity_max, double rating_max, dict types, uint8_t other):
        self._currency = currency.encode()
        self._ahead_ms, self._bytes_max = clock_ahead_ms_max, record_bytes_max
        self._ts_ms_min, self._ts_ms_max = ts_ms_min, ts_ms_max
        self._price_max, self._quantity_max, self._rating_max = price_max, quantity_max, rating_max
        self._other = other
        self._type_names = [name.encode() for name in types]
        self._types = len(types)
        if self._types > TYPES_MAX:
            raise ValueError(f'{self._types} types, the maximum is {TYPES_MAX}')
        for i, (name, code) in enumerate(zip(self._type_names, types.values())):
            self._type_at[i], self._type_size[i] = PyBytes_AS_STRING(name), len(name)
            self._type_code[i] = code

    def parse(self, value, key, record_ts_ms):
        """Parse one record; None if it is not an ordinary event.

        key           the Kafka key, which must be the user's id; any other object than bytes or None means that there
                      is no key to compare
        record_ts_ms  the record's own timestamp; None if it has none to compare with
        """
        if key is None or not PyBytes_CheckExact(value):
            return None
        return self._parse(value, key if PyBytes_CheckExact(key) else None,
                           -1 if record_ts_ms is None else record_ts_ms, 0, 0)

    def parse_records(self, records, uint8_t source):
        """Parse the Kafka records of one topic, in order; None for each record that is not an ordinary event."""
        cdef list events = []
        for record in records:
            value, key = record.value, record.key
            events.append(self._parse(value, key, record.timestamp, source, record.offset)
                          if PyBytes_CheckExact(value) and PyBytes_CheckExact(key) else None)
        return events

    cdef Event _parse(self, bytes value, bytes key, int64_t record_ts_ms, uint8_t source, int64_t offset):
        cdef const uint8_t* at = <const uint8_t*> PyBytes_AS_STRING(value)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(value)
        cdef const uint8_t* end = at + size
        cdef Text name, text, user, event_id, kind, item, category, basket
        cdef uint64_t mantissa = 0
        cdef int decimals = 0, i
        cdef bint is_text, is_number, is_null, known_type = False
        cdef int64_t ts_ms = -1
        cdef double number, price = -1.0, quantity = -1.0, rating = -1.0, amount
        cdef Event event
        if size > self._bytes_max or size < 2:
            return None
        user.at = event_id.at = kind.at = item.at = category.at = basket.at = NULL
        user.size = event_id.size = kind.size = item.size = category.size = basket.size = 0
        if at[0] != 0x7B:
            return None
        at += 1
        while True:
            while at < end and is_space(at[0]):
                at += 1
            if at >= end or at[0] != 0x22:
                return None
            at = read_string(at + 1, end, &name)
            if at == NULL:
                return None
            while at < end and is_space(at[0]):
                at += 1
            if at >= end or at[0] != 0x3A:
                return None
            at += 1
            while at < end and is_space(at[0]):
                at += 1
            if at >= end:
                return None
            is_text = is_number = is_null = False
            number = 0.0
            if at[0] == 0x22:
                at = read_string(at + 1, end, &text)
                if at == NULL:
                    return None
                is_text = True
            elif 0x30 <= at[0] <= 0x39:
                at = read_number(at, end, &mantissa, &decimals)
                if at == NULL:
                    return None
                number = <double> mantissa / POWERS[decimals]
                is_number = True
            elif end - at >= 4 and memcmp(at, b'null', 4) == 0:
                at += 4
                is_null = True
            elif end - at >= 4 and memcmp(at, b'true', 4) == 0:
                at += 4
            elif end - at >= 5 and memcmp(at, b'false', 5) == 0:
                at += 5
            else:
                return None

            # Check the known fields. Each must be valid, or null if it is optional.
            if names(&name, b'user_id', 7):
                if not is_text or text.size == 0 or text.size > ID_MAX:
                    return None
                user = text
            elif names(&name, b'event_id', 8):
                if not is_text or text.size == 0 or text.size > HASHED_MAX:
                    return None
                event_id = text
            elif names(&name, b'ts', 2):
                if not is_number or decimals:
                    return None
                ts_ms = <int64_t> mantissa
            elif names(&name, b'type', 4):
                if not is_text or text.size == 0 or text.size > ID_MAX:
                    return None
                kind, known_type = text, True
            elif names(&name, b'item_id', 7) or names(&name, b'category', 8) or names(&name, b'order_id', 8):
                if is_null:
                    text.at, text.size = NULL, 0
                elif not is_text or text.size > HASHED_MAX:
                    return None
                if name.at[0] == 0x69:
                    item = text
                elif name.at[0] == 0x63:
                    category = text
                else:
                    basket = text
            elif names(&name, b'price', 5):
                if not (is_null or (is_number and number <= self._price_max)):
                    return None
                price = -1.0 if is_null else number
            elif names(&name, b'quantity', 8):
                if not (is_null or (is_number and 0.0 < number <= self._quantity_max)):
                    return None
                quantity = -1.0 if is_null else number
            elif names(&name, b'rating', 6):
                if not (is_null or (is_number and number <= self._rating_max)):
                    return None
                rating = -1.0 if is_null else number
            elif names(&name, b'currency', 8):
                if not is_null and not (is_text and text.size == PyBytes_GET_SIZE(self._currency)
                                        and memcmp(text.at, PyBytes_AS_STRING(self._currency), text.size) == 0):
                    return None
            elif names(&name, b'session_id', 10):
                if not is_null and not (is_text and text.size <= ID_MAX):
                    return None
            elif names(&name, b'query', 5) or names(&name, b'text', 4):
                if not (is_null or is_text):
                    return None

            while at < end and is_space(at[0]):
                at += 1
            if at >= end:
                return None
            if at[0] == 0x2C:
                at += 1
            elif at[0] == 0x7D:
                at += 1
                break
            else:
                return None
        while at < end:
            if not is_space(at[0]):
                return None
            at += 1

        if user.at == NULL or event_id.at == NULL or not known_type:
            return None
        if not self._ts_ms_min <= ts_ms <= self._ts_ms_max:
            return None
        if record_ts_ms >= 0 and ts_ms > record_ts_ms + self._ahead_ms:
            return None
        if key is not None and not (PyBytes_GET_SIZE(key) == user.size
                                    and memcmp(PyBytes_AS_STRING(key), user.at, user.size) == 0):
            return None
        amount = 0.0 if price < 0 else price if quantity < 0 else price * quantity

        event = Event.__new__(Event)
        event.user_id = PyUnicode_DecodeASCII(<const char*> user.at, user.size, NULL)
        event.event_id = PyUnicode_DecodeASCII(<const char*> event_id.at, event_id.size, NULL)
        event.key = xxh3(event_id.at, event_id.size)
        event.ts_ms = ts_ms
        event.type = self._other
        for i in range(self._types):
            if kind.size == self._type_size[i] and memcmp(kind.at, self._type_at[i], kind.size) == 0:
                event.type = self._type_code[i]
                break
        event.item = hash32(&item)
        event.category = hash16(&category)
        event.basket = hash32(&basket)
        event.amount = amount
        event.rating = 0 if rating < 0 else <uint8_t> (<int> (rating * 10 + 0.5) + 1)
        event.source, event.offset = source, offset
        return event


cdef inline uint32_t hash32(Text* text) noexcept nogil:
    cdef uint32_t value
    if text.size == 0:
        return 0
    value = <uint32_t> (xxh3(text.at, text.size) & 0xFFFFFFFFULL)
    return value if value else 1


cdef inline uint16_t hash16(Text* text) noexcept nogil:
    cdef uint16_t value
    if text.size == 0:
        return 0
    value = <uint16_t> (xxh3(text.at, text.size) & 0xFFFFULL)
    return value if value else 1
