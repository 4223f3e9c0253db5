# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Slots and counters of users' windows, and the batches that the model gets. `stream.core.features` documents the arrays.

This module is compiled because most steps have few users. For those, numpy's fixed cost per call would be nearly the
whole cost. A user's numbers come from the user's record alone, in a fixed order of operations, so they do not depend on
the other users of the step.

The arrays may hold anything. Counts and indices are checked before they are used, so no input leads to memory outside
of the arrays.
"""
cdef extern from *:
    const char* _SOURCE_HASH "SOURCE_HASH"

SOURCE_HASH = _SOURCE_HASH.decode()

from libc.math cimport cos, fmod, log1p, sin, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from stream.core.buffers cimport Buffers, filled_by, numbers_of, records_of, release
from stream.core.layout cimport TYPE_COUNT, Day, Header, Row

import numpy as np

from stream.core.layout import DAY_DTYPE, HEADER_DTYPE, ROW_DTYPE

cdef enum:
    SLOTS_MAX = 64
    ITEM_BUCKETS = 4096
    CATEGORY_BUCKETS = 1024
    SLOT_CATEGORIES = 3
    SLOT_NUMBERS = 7
    COUNTERS = 46
    HORIZONS = 3
    LENGTHS = 4
    ROWS_MULTIPLE = 4
    PADDING_ROW = -1
    MINUTES = 1440
    LOGARITHMS = 1024

cdef int64_t DAY_MS = 86400000, MINUTE_MS = 60000
cdef double YEAR_MS = 365.2425 * 86400000, TURN = 2 * 3.141592653589793
cdef int64_t[HORIZONS] HORIZON_DAYS = [7, 30, 90]
cdef Py_ssize_t[LENGTHS] LENGTH = [8, 16, 32, 64]

# `stream.core.features` compares this with its own constants.
CONSTANTS = (SLOTS_MAX, ITEM_BUCKETS, CATEGORY_BUCKETS, SLOT_NUMBERS, COUNTERS, ROWS_MULTIPLE, PADDING_ROW,
             tuple(HORIZON_DAYS[i] for i in range(HORIZONS)), tuple(LENGTH[i] for i in range(LENGTHS)))

# Most numbers are small counts, and a slot's hour has a resolution of one minute: look both up.
cdef float[LOGARITHMS] LOGARITHM
cdef float[MINUTES] MINUTE_SIN, MINUTE_COS
for _at in range(LOGARITHMS):
    LOGARITHM[_at] = <float> log1p(<double> _at)
for _at in range(MINUTES):
    MINUTE_SIN[_at] = <float> sin(<double> _at * (TURN * MINUTE_MS / DAY_MS))
    MINUTE_COS[_at] = <float> cos(<double> _at * (TURN * MINUTE_MS / DAY_MS))

cdef object empty = np.empty
cdef object INT32 = np.dtype(np.int32), INT64 = np.dtype(np.int64), FLOAT32 = np.dtype(np.float32)
cdef object HEADERS = HEADER_DTYPE, DAYS = DAY_DTYPE, ROWS = ROW_DTYPE


# ---- slots and counters ---------------------------------------------------------------------------------------------

cdef struct Rows:       # some rows of an array, at a fixed distance from each other
    const char* at
    Py_ssize_t stride


cdef inline const Row* row_at(const Rows* rows, Py_ssize_t index) noexcept:
    return <const Row*> (rows.at + index * rows.stride)


def slots_and_counters(headers not None, days not None, rows not None, as_of_ms not None):
    """The parts of `stream.core.features.Features` for these `stream.core.features.Snapshots`.

    Errors   TypeError or ValueError if the arrays have other types, or if they do not belong together.
    """
    cdef Buffers buffers
    cdef Py_buffer* header_of
    cdef Py_buffer* day_of
    cdef Py_buffer* moment_of
    cdef Py_buffer* event_of
    cdef const Header* header
    cdef Py_ssize_t users, user, events = 0, day_count = 0, longest = 0, at, slots
    cdef int64_t moment_ms
    cdef int64_t* starts
    cdef int64_t* slot_of_row
    cdef int32_t* categories
    cdef float* numbers
    cdef float* counters
    cdef uint32_t* order = NULL
    cdef Rows window
    buffers.count = 0
    if as_of_ms.dtype != INT64:
        as_of_ms = as_of_ms.astype(INT64)
    try:
        header_of = records_of(&buffers, headers, HEADERS, sizeof(Header))
        day_of = records_of(&buffers, days, DAYS, sizeof(Day))
        event_of = records_of(&buffers, rows, ROWS, sizeof(Row))
        moment_of = numbers_of(&buffers, as_of_ms, b'q', 1)
        users = header_of.shape[0]
        for user in range(users):
            header = <const Header*> (<const char*> header_of.buf + user * header_of.strides[0])
            events += header.events
            day_count += header.days
            if header.events > longest:
                longest = header.events
        if events != event_of.shape[0] or day_count != day_of.shape[0] or users != moment_of.shape[0]:
            raise ValueError(f'the {users} headers count {events} events and {day_count} days, but there are '
                             f'{event_of.shape[0]} and {day_of.shape[0]}, as of {moment_of.shape[0]} times')
        order = <uint32_t*> malloc((longest + 1) * sizeof(uint32_t))
        if order == NULL:
            raise MemoryError()

        # First the slot of each event, because it takes the number of slots to allocate the rest.
        starts_array, slot_array = empty(users + 1, INT64), empty(events, INT64)
        starts = <int64_t*> filled_by(&buffers, starts_array, 1)
        slot_of_row = <int64_t*> filled_by(&buffers, slot_array, 1)
        window.at, window.stride = <const char*> event_of.buf, event_of.strides[0]
        starts[0] = 0
        at = 0
        for user in range(users):
            header = <const Header*> (<const char*> header_of.buf + user * header_of.strides[0])
            starts[user + 1] = starts[user] + assign_slots(&window, header.events, starts[user], order,
                                                           slot_of_row + at)
            window.at += header.events * window.stride
            at += header.events
        slots = starts[users]

        category_array = empty((slots + 1, SLOT_CATEGORIES), INT32)
        number_array = empty((slots + 1, SLOT_NUMBERS), FLOAT32)
        counter_array = empty((users, COUNTERS), FLOAT32)
        categories = <int32_t*> filled_by(&buffers, category_array, 2)
        numbers = <float*> filled_by(&buffers, number_array, 2)
        counters = <float*> filled_by(&buffers, counter_array, 2)
        window.at = <const char*> event_of.buf
        at = day_count = 0
        for user in range(users):
            header = <const Header*> (<const char*> header_of.buf + user * header_of.strides[0])
            memcpy(&moment_ms, <const char*> moment_of.buf + user * moment_of.strides[0], sizeof(moment_ms))
            fill_slots(&window, header.events, slot_of_row + at, starts[user], starts[user + 1] - starts[user],
                       moment_ms, categories + starts[user] * SLOT_CATEGORIES, numbers + starts[user] * SLOT_NUMBERS)
            fill_counters(header, <const char*> day_of.buf + day_count * day_of.strides[0], day_of.strides[0],
                          moment_ms, counters + user * COUNTERS)
            window.at += header.events * window.stride
            at += header.events
            day_count += header.days
        memset(categories + slots * SLOT_CATEGORIES, 0, SLOT_CATEGORIES * sizeof(int32_t))
        memset(numbers + slots * SLOT_NUMBERS, 0, SLOT_NUMBERS * sizeof(float))
        return category_array, number_array, starts_array, counter_array, slot_array
    finally:
        free(order)
        release(&buffers)


cdef Py_ssize_t assign_slots(const Rows* rows, Py_ssize_t events, int64_t start, uint32_t* order,
                             int64_t* slot_of_row) noexcept:
    """Write each event's slot, counted from `start`, or -1 if the slot is too old. Returns the number of slots kept.

    Events are taken in the order of a window, but those at the same time by type. A window orders them by id hash,
    which scatters the types, and recordings with a resolution of one day consist of such ties.
    """
    cdef const Row* row
    cdef const Row* before = NULL
    cdef bint sorted_ = order_ties(rows, events, order)
    cdef Py_ssize_t i, at
    cdef int64_t slot = -1, old
    for i in range(events):
        at = order[i] if sorted_ else i
        row = row_at(rows, at)
        if (before == NULL or row.type != before.type or row.basket != before.basket
                or (row.basket == 0 and row.ts_ms != before.ts_ms)):
            slot += 1
        slot_of_row[at] = slot
        before = row
    old = slot + 1 - SLOTS_MAX if slot + 1 > SLOTS_MAX else 0
    for i in range(events):
        slot_of_row[i] = start + slot_of_row[i] - old if slot_of_row[i] >= old else -1
    return <Py_ssize_t> (slot + 1 - old)


cdef bint order_ties(const Rows* rows, Py_ssize_t events, uint32_t* order) noexcept:
    """Write the order in which neighbours at the same time come by type. Returns whether it is another than now."""
    cdef Py_ssize_t i, first, last, done
    cdef int kind, following
    for i in range(1, events):
        if row_at(rows, i).ts_ms == row_at(rows, i - 1).ts_ms and row_at(rows, i).type < row_at(rows, i - 1).type:
            break
    else:
        return False
    first = done = 0
    while first < events:
        last = first
        kind = 256
        while last < events and row_at(rows, last).ts_ms == row_at(rows, first).ts_ms:
            if row_at(rows, last).type < kind:
                kind = row_at(rows, last).type
            last += 1
        # There are few types, so go once through the events of a time for each type.
        while kind < 256:
            following = 256
            for i in range(first, last):
                if row_at(rows, i).type == kind:
                    order[done] = <uint32_t> i
                    done += 1
                elif kind < row_at(rows, i).type < following:
                    following = row_at(rows, i).type
            kind = following
        first = last
    return True


cdef void fill_slots(const Rows* rows, Py_ssize_t events, const int64_t* slot_of_row, int64_t start, Py_ssize_t slots,
                     int64_t as_of_ms, int32_t* categories, float* numbers) noexcept:
    """Write a user's slots. The first event of a slot says what it is about; the amounts of all its events are added."""
    cdef const Row* head[SLOTS_MAX]
    cdef int64_t[SLOTS_MAX] lines
    cdef double[SLOTS_MAX] amount
    cdef const Row* row
    cdef Py_ssize_t i, slot
    for slot in range(slots):
        lines[slot] = 0
        amount[slot] = 0.0
    # Events of one slot are in their order of time here too, since ties were sorted by nothing but type.
    for i in range(events):
        if slot_of_row[i] < 0:
            continue
        slot = <Py_ssize_t> (slot_of_row[i] - start)
        row = row_at(rows, i)
        if lines[slot] == 0:
            head[slot] = row
        lines[slot] += 1
        amount[slot] += <double> row.amount
    for slot in range(slots):
        row = head[slot]
        categories[0] = row.type
        categories[1] = bucket_of(row.item, ITEM_BUCKETS)
        categories[2] = bucket_of(row.category, CATEGORY_BUCKETS)
        numbers[0] = log_of(amount[slot])
        numbers[1] = log_of(days_between(head[slot - 1].ts_ms, row.ts_ms)) if slot else <float> 0.0
        numbers[2] = log_of(days_between(row.ts_ms, as_of_ms))
        numbers[3] = log_of_count(lines[slot] - 1)
        numbers[4] = <float> (<double> row.rating / 10.0)
        i = <Py_ssize_t> (remainder_of(row.ts_ms, DAY_MS) // MINUTE_MS)
        numbers[5] = MINUTE_SIN[i]
        numbers[6] = MINUTE_COS[i]
        categories += SLOT_CATEGORIES
        numbers += SLOT_NUMBERS


cdef void fill_counters(const Header* header, const char* days, Py_ssize_t stride, int64_t as_of_ms,
                        float* counters) noexcept:
    cdef uint32_t orders = header.orders, gaps = header.gaps
    cdef double gap_mean = header.gap_days / <double> (gaps if gaps else 1)
    cdef double variance = header.gap_days_squared / <double> (gaps if gaps else 1) - gap_mean * gap_mean
    cdef double order_age = days_between(header.last_order_ms, as_of_ms) if orders else 0.0
    cdef Py_ssize_t i
    for i in range(TYPE_COUNT):
        counters[i] = log_of_count(header.counts[i])
    counters += TYPE_COUNT
    counters[0] = log_of(days_between(header.first_seen_ms, as_of_ms))
    counters[1] = log_of(days_between(header.last_seen_ms, as_of_ms))
    counters[2] = log_of(header.spend)
    counters[3] = log_of(header.refunds)
    counters[4] = log_of(header.spend / <double> (orders if orders else 1))
    counters[5] = log_of_count(orders)
    counters[6] = <float> 1.0 if orders else <float> 0.0
    counters[7] = log_of(order_age)
    counters[8] = log_of(gap_mean)
    counters[9] = log_of(sqrt(0.0 if variance < 0.0 else variance))     # rounding may take it below 0
    counters[10] = log_of(order_age / (1.0 if gap_mean < 1.0 else gap_mean)) if gaps else <float> 0.0
    fill_activity(days, stride, header.days, quotient_of(as_of_ms, DAY_MS), counters + 11)
    counters += 11 + 5 * HORIZONS
    fill_angle(<double> remainder_of(as_of_ms, DAY_MS), <double> DAY_MS, counters)
    fill_angle(<double> remainder_of(as_of_ms, 7 * DAY_MS), <double> (7 * DAY_MS), counters + 2)
    fill_angle(fmod(<double> as_of_ms, YEAR_MS), YEAR_MS, counters + 4)


cdef void fill_activity(const char* days, Py_ssize_t stride, Py_ssize_t count, int64_t today,
                        float* counters) noexcept:
    cdef int64_t[HORIZONS] browses, carts, orders, active
    cdef double[HORIZONS] spend
    cdef const Day* day
    cdef Py_ssize_t i, at
    for i in range(HORIZONS):
        browses[i] = carts[i] = orders[i] = active[i] = 0
        spend[i] = 0.0
    for at in range(count):
        day = <const Day*> (days + at * stride)
        for i in range(HORIZONS):
            if today - day.day < HORIZON_DAYS[i]:
                browses[i] += day.browses
                carts[i] += day.carts
                orders[i] += day.orders
                spend[i] += <double> day.spend
                active[i] += 1
    for i in range(HORIZONS):
        counters[0] = log_of_count(browses[i])
        counters[1] = log_of_count(carts[i])
        counters[2] = log_of_count(orders[i])
        counters[3] = log_of(0.0 if spend[i] < 0.0 else spend[i])       # refunds may outweigh a short horizon's spend
        counters[4] = log_of_count(active[i])
        counters += 5


cdef void fill_angle(double passed, double period, float* pair) noexcept:
    cdef double angle
    if passed < 0.0:
        passed += period
    angle = passed * (TURN / period)
    pair[0] = <float> sin(angle)
    pair[1] = <float> cos(angle)


cdef inline int32_t bucket_of(uint32_t hash_, uint32_t count) noexcept:
    return <int32_t> (hash_ % (count - 1) + 1) if hash_ else 0


cdef inline float log_of(double value) noexcept:
    return <float> log1p(value) if value != 0.0 else <float> value


cdef inline float log_of_count(int64_t count) noexcept:
    return LOGARITHM[count] if count < LOGARITHMS else <float> log1p(<double> count)


cdef inline double days_between(int64_t from_ms, int64_t to_ms) noexcept:
    # Unsigned, because the times of a damaged record may be too far apart for 64 bits.
    return <double> <int64_t> (<uint64_t> to_ms - <uint64_t> from_ms) / <double> DAY_MS


cdef inline int64_t remainder_of(int64_t value, int64_t divisor) noexcept:
    """As Python's %: a time before 1970 has an hour too."""
    cdef int64_t rest = value % divisor
    return rest + divisor if rest < 0 else rest


cdef inline int64_t quotient_of(int64_t value, int64_t divisor) noexcept:
    """As Python's //."""
    return value // divisor - (1 if value % divisor < 0 else 0)


# ---- batches --------------------------------------------------------------------------------------------------------

def cut(starts not None, Py_ssize_t rows_max, Py_ssize_t padding_slots_max):
    """Which rows make a batch: see `stream.core.features.batches`.

    Returns  order, parts
             order  int64 [N], the rows by length bucket
             parts  for each batch, its first and last place in `order`, and the length of its rows
    """
    cdef Buffers buffers
    cdef Py_buffer* start_of
    cdef Py_ssize_t rows, row, count, at, step
    cdef Py_ssize_t[LENGTHS] rows_of, place
    cdef int[LENGTHS] joins
    cdef int bucket, longest
    cdef int64_t* order
    cdef list parts = []
    if rows_max < 1:
        raise ValueError(f'batches of {rows_max} rows')
    step = rows_max - rows_max % ROWS_MULTIPLE if rows_max >= ROWS_MULTIPLE else rows_max
    buffers.count = 0
    try:
        start_of = numbers_of(&buffers, starts, b'q', 1)
        rows = start_of.shape[0] - 1
        for bucket in range(LENGTHS):
            rows_of[bucket] = 0
            joins[bucket] = bucket
        for row in range(rows):
            rows_of[bucket_at(start_of, row)] += 1
        longest = LENGTHS - 1
        while longest and not rows_of[longest]:
            longest -= 1
        for bucket in range(longest):
            if 0 < rows_of[bucket] * (LENGTH[bucket + 1] - LENGTH[bucket]) <= padding_slots_max:
                rows_of[bucket + 1] += rows_of[bucket]
                rows_of[bucket] = 0
                joins[bucket] = bucket + 1
        for bucket in range(longest - 1, -1, -1):       # from the longest, as a row may move on several times
            joins[bucket] = joins[joins[bucket]]
        at = 0
        for bucket in range(LENGTHS):
            place[bucket] = at
            at += rows_of[bucket]
        order_array = empty(rows if rows > 0 else 0, INT64)
        order = <int64_t*> filled_by(&buffers, order_array, 1)
        for row in range(rows):
            bucket = joins[bucket_at(start_of, row)]
            order[place[bucket]] = row
            place[bucket] += 1
        for bucket in range(LENGTHS):
            count = rows_of[bucket]
            at = place[bucket] - count
            while count > 0:
                parts.append((at, at + min(count, step), LENGTH[bucket]))
                at += step
                count -= step
        return order_array, parts
    finally:
        release(&buffers)


cdef inline int64_t number_at(const Py_buffer* array, Py_ssize_t index) noexcept:
    cdef int64_t number
    memcpy(&number, <const char*> array.buf + index * array.strides[0], sizeof(number))
    return number


cdef int bucket_at(const Py_buffer* starts, Py_ssize_t row) except -1:
    cdef int64_t slots = number_at(starts, row + 1) - number_at(starts, row)
    cdef int bucket
    for bucket in range(LENGTHS):
        if slots <= LENGTH[bucket]:
            return bucket
    raise ValueError(f'row {row} has {slots} slots, at most {SLOTS_MAX} are possible')


def fill(categories not None, numbers not None, starts not None, counters not None, rows not None, Py_ssize_t length,
         Py_ssize_t height):
    """The arrays of a batch: `rows` of the features, each padded to `length` slots, and padding rows up to `height`.

    Errors   IndexError for a row that does not exist; ValueError for one with more than `length` slots.
    """
    cdef Buffers buffers
    cdef Py_buffer* category_of
    cdef Py_buffer* number_of
    cdef Py_buffer* start_of
    cdef Py_buffer* counter_of
    cdef Py_buffer* row_of
    cdef Py_ssize_t known, filled, at, slots, slot_count
    cdef int64_t row, start
    cdef Py_ssize_t category_bytes = SLOT_CATEGORIES * sizeof(int32_t), number_bytes = SLOT_NUMBERS * sizeof(float)
    cdef Py_ssize_t counter_bytes = COUNTERS * sizeof(float)
    cdef char* to_categories
    cdef char* to_numbers
    cdef char* to_counters
    cdef int64_t* to_ids
    buffers.count = 0
    try:
        category_of = rows_in_order(&buffers, categories, b'i', SLOT_CATEGORIES)
        number_of = rows_in_order(&buffers, numbers, b'f', SLOT_NUMBERS)
        counter_of = rows_in_order(&buffers, counters, b'f', COUNTERS)
        start_of = numbers_of(&buffers, starts, b'q', 1)
        row_of = numbers_of(&buffers, rows, b'q', 1)
        filled = row_of.shape[0]
        known = min(start_of.shape[0] - 1, counter_of.shape[0])
        slot_count = min(category_of.shape[0], number_of.shape[0])
        if length < 0 or height < filled:
            raise ValueError(f'a batch of {height} rows and {length} slots for {filled} rows')
        category_array = empty((height, length, SLOT_CATEGORIES), INT32)
        number_array = empty((height, length, SLOT_NUMBERS), FLOAT32)
        counter_array = empty((height, COUNTERS), FLOAT32)
        id_array = empty((height, 1), INT64)
        to_categories = <char*> filled_by(&buffers, category_array, 3)
        to_numbers = <char*> filled_by(&buffers, number_array, 3)
        to_counters = <char*> filled_by(&buffers, counter_array, 2)
        to_ids = <int64_t*> filled_by(&buffers, id_array, 2)
        for at in range(filled):
            row = number_at(row_of, at)
            if not 0 <= row < known:
                raise IndexError(f'row {row} of {known}')
            start = number_at(start_of, row)
            slots = <Py_ssize_t> (number_at(start_of, row + 1) - start)
            if not (0 <= start <= slot_count and 0 <= slots <= slot_count - start and slots <= length):
                raise ValueError(f'row {row} has {slots} slots from {start} on; there are {slot_count}, and the batch '
                                 f'has room for {length}')
            memcpy(to_categories, <const char*> category_of.buf + start * category_of.strides[0],
                   slots * category_bytes)
            memset(to_categories + slots * category_bytes, 0, (length - slots) * category_bytes)
            memcpy(to_numbers, <const char*> number_of.buf + start * number_of.strides[0], slots * number_bytes)
            memset(to_numbers + slots * number_bytes, 0, (length - slots) * number_bytes)
            memcpy(to_counters, <const char*> counter_of.buf + row * counter_of.strides[0], counter_bytes)
            to_ids[at] = row
            to_categories += length * category_bytes
            to_numbers += length * number_bytes
            to_counters += counter_bytes
        memset(to_categories, 0, (height - filled) * length * category_bytes)
        memset(to_numbers, 0, (height - filled) * length * number_bytes)
        memset(to_counters, 0, (height - filled) * counter_bytes)
        for at in range(filled, height):
            to_ids[at] = PADDING_ROW
        return category_array, number_array, counter_array, id_array
    finally:
        release(&buffers)


cdef Py_buffer* rows_in_order(Buffers* buffers, object array, char code, Py_ssize_t width) except NULL:
    """An array [n, width] whose rows follow each other without gaps; copied if it is not one."""
    cdef Py_buffer* view = numbers_of(buffers, array if array.flags.c_contiguous else array.copy(), code, 2)
    if view.shape[1] != width:
        raise ValueError(f'rows of {view.shape[1]} numbers, expected {width}')
    return view
