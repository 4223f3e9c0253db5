# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A user's record in memory, the fold that applies events to it, and its codec.

This module is compiled because the fold limits the throughput of the whole worker. `stream.core.layout` defines the
layout. The structs of `layout.pxd` repeat it for the compiler, and an import of this module checks that the two agree.
"""
cdef extern from *:
    const char* _SOURCE_HASH "SOURCE_HASH"

SOURCE_HASH = _SOURCE_HASH.decode()

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_GET_SIZE, \
    PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from stream.core.layout cimport TYPE_COUNT, Day, Header, Row
from stream.core.parse cimport Event

from stream.core.events import EventType
from stream.core.layout import CLAIMS_BYTES, DAY, DAYS_KEPT, FORMAT, FORMATS_READ, HEADER, HEADER_DTYPE, NO_TIER, NO_TIMER_MS, ROW, \
    TYPES, Fold
from stream.errors import StateError

cdef enum:
    ID_BYTES = 8

cdef int64_t DAY_MS = 86400000
cdef int64_t NO_TIMER = NO_TIMER_MS
cdef int KEPT = DAYS_KEPT
cdef uint8_t ADD_TO_CART = EventType.ADD_TO_CART, PURCHASE = EventType.PURCHASE, REFUND = EventType.REFUND


cdef Header _probe
if not (sizeof(Header) == HEADER.size and sizeof(Row) == ROW.size and sizeof(Day) == DAY.size and TYPE_COUNT == TYPES
        and <char*> &_probe.due_ms - <char*> &_probe == HEADER_DTYPE.fields['due_ms'][1]
        and <char*> &_probe.step - <char*> &_probe == HEADER_DTYPE.fields['step'][1]
        and <char*> &_probe.power_grid - <char*> &_probe == HEADER_DTYPE.fields['power_grid'][1]):
    raise AssertionError('the compiled layout differs from stream.core.layout: install the package again')


cdef struct Limits:
    Py_ssize_t events_max
    int64_t span_ms
    int silences
    int64_t silence_ms[256]


cdef int read_limits(limits, Limits* into) except -1:
    cdef int i
    into.events_max, into.span_ms = limits.events_max, limits.span_ms
    into.silences = len(limits.silence_ms)
    if into.silences > 255:
        raise ValueError(f'{into.silences} silence delays, the maximum is 255')
    for i in range(into.silences):
        into.silence_ms[i] = limits.silence_ms[i]
    return 0


# ---- the user -------------------------------------------------------------------------------------------------------

@cython.final
@cython.no_gc
@cython.freelist(1024)
cdef class User:
    """One user's record, decoded and mutable. `rows`, `ids` and `days` stay packed; the other fields are plain values.

    Names and units are those of the header's fields in `stream.core.layout`. Reading `next_offset` or `counts` returns
    a new list; to change one, assign a whole list. `stored_due_ms` is not part of the record. It is the due time that
    the timer index holds for the user.
    """

    def __init__(self, str user_id):
        self.user_id = user_id
        self.due_ms = self.stored_due_ms = NO_TIMER
        self.tier = NO_TIER
        self.power_grid = -1
        self.decision_id = bytes(16)
        self.model = bytes(8)
        self.claims = bytes(CLAIMS_BYTES)
        self.days = bytearray()
        self.outbox = b''
        self.ids = bytearray()
        self.rows = bytearray()

    @property
    def next_offset(self):
        """The first offset not yet folded, per source."""
        return [self._next_offset[0], self._next_offset[1]]

    @next_offset.setter
    def next_offset(self, offsets):
        self._next_offset[0], self._next_offset[1] = offsets

    @property
    def counts(self):
        """Applied events by type, index = type - 1."""
        return [self._counts[i] for i in range(TYPE_COUNT)]

    @counts.setter
    def counts(self, counts):
        for i, count in enumerate(counts):
            self._counts[i] = count

    def __deepcopy__(self, memo):
        return _revived(self.user_id, encode(self), self.stored_due_ms)


def _revived(str user_id, bytes record, int64_t stored_due_ms):
    cdef User user = decode(user_id, record)
    user.stored_due_ms = stored_due_ms
    return user


# ---- the fold -------------------------------------------------------------------------------------------------------

cdef enum Outcome:      # the values of `Fold`, and WAITS: a timer must fire before the event is folded
    APPLIED
    DUPLICATE
    LATE
    SEEN
    WAITS

cdef tuple FOLDS = tuple(Fold)


def fold(User user not None, events, limits):
    """Fold a run of one user's events into `user`, in the order in which they were read; return the outcome of each.

    An event of the run may set a timer. The fold stops before the next event at or after the due time, because the
    timer must fire first. It then returns fewer outcomes than there are events.

    Shapes   `user.rows` has 0 to events_max rows, before and after.
    Units    milliseconds of event time; wall time plays no role.
    Errors   none: a repeated or late event is an outcome, not an exception.
    Promise  any order of events with distinct ids gives the same window (test_arrival_order_does_not_matter); of two
             events with the same id, the first to arrive is kept.
    """
    cdef Limits bounds
    cdef Event event
    cdef int outcome
    cdef list outcomes = []
    read_limits(limits, &bounds)
    for event in events:
        outcome = fold_one(user, event, &bounds, not outcomes)
        if outcome == WAITS:
            break
        outcomes.append(FOLDS[outcome])
    return outcomes


def fold_runs(dict users not None, events, limits):
    """Fold `events`, in order, into their users. A user's events stop where one of the user's timers must fire first.

    users    all users of `events`, by id
    Returns  runs, counts, rest
             runs    each touched user with the events applied, in the order of the users' first events
             counts  number of events per outcome, indexed by `Fold`
             rest    the events that wait for a timer
    """
    cdef Limits bounds
    cdef Event event
    cdef User user
    cdef int outcome
    cdef Py_ssize_t counts[5]
    cdef dict place_of = {}
    cdef list touched = [], applied = [], waiting = [], rest = []
    cdef Py_ssize_t place, i
    cdef void* found
    for i in range(5):
        counts[i] = 0
    read_limits(limits, &bounds)
    for event in events:
        found = <void*> PyDict_GetItem(place_of, event.user_id)
        if found == NULL:
            user = users[event.user_id]
            place = len(touched)
            place_of[event.user_id] = place
            touched.append(user)
            applied.append([])
            waiting.append(None)
            outcome = fold_one(user, event, &bounds, True)
        else:
            place = <object> found
            if waiting[place] is not None:
                (<list> waiting[place]).append(event)
                continue
            user = <User> touched[place]
            outcome = fold_one(user, event, &bounds, False)
        counts[outcome] += 1
        if outcome == APPLIED:
            (<list> applied[place]).append(event)
        elif outcome == WAITS:
            waiting[place] = [event]
    for run in waiting:
        if run is not None:
            rest += run
    return list(zip(touched, applied)), [counts[i] for i in range(4)], rest


def overdue(dict users not None, list events not None):
    """The users with a timer due at or before their first new event among `events`, ordered by due time, then id.

    A redelivered event, which is below the user's stored offset, fires no timer: it did when it first arrived.
    """
    cdef Event event
    cdef User user
    cdef int64_t newest_ms = 0
    cdef set waiting = set()
    cdef list due = []
    for event in events:
        if event.ts_ms > newest_ms:
            newest_ms = event.ts_ms
    for user in users.values():
        if 0 < user.due_ms <= newest_ms:
            waiting.add(user.user_id)
    if waiting:
        for event in events:
            if event.user_id in waiting:
                user = users[event.user_id]
                if event.offset >= user._next_offset[event.source]:
                    waiting.discard(event.user_id)
                    if user.due_ms <= event.ts_ms:
                        due.append(user)
    return sorted(due, key=lambda user: (user.due_ms, user.user_id))


def newest_ms(list events not None):
    """The newest event time of each source; 0 for a source without events."""
    cdef Event event
    cdef int64_t newest[2]
    newest[0] = newest[1] = 0
    for event in events:
        if event.ts_ms > newest[event.source]:
            newest[event.source] = event.ts_ms
    return [newest[0], newest[1]]


cdef int fold_one(User user, Event event, Limits* limits, bint first) except -1:
    cdef int64_t ts_ms = event.ts_ms
    cdef Py_ssize_t events, place
    cdef Row row
    if not first and 0 < user.due_ms <= ts_ms:
        return WAITS
    if event.offset < user._next_offset[event.source]:
        return SEEN
    user._next_offset[event.source] = event.offset + 1
    if ts_ms < user.last_seen_ms - limits.span_ms:
        user.late += 1
        return LATE
    if contains(user.ids, event.key):
        user.duplicate += 1
        return DUPLICATE
    row.ts_ms, row.item, row.basket, row.amount = ts_ms, event.item, event.basket, <float> event.amount
    row.category, row.type, row.rating = event.category, event.type, event.rating
    events = PyByteArray_GET_SIZE(user.ids) // ID_BYTES
    if ts_ms > user.last_seen_ms:
        insert(user, events, event.key, &row)
        user.last_seen_ms = ts_ms
        user.silence = 0
        user.due_ms = ts_ms + limits.silence_ms[0] if limits.silences else NO_TIMER
        drop_older(user, ts_ms - limits.span_ms)
    else:
        place = place_of_event(user, ts_ms, event.key)
        if not place and events == limits.events_max:
            user.late += 1
            return LATE
        insert(user, place, event.key, &row)
    if PyByteArray_GET_SIZE(user.ids) > limits.events_max * ID_BYTES:
        drop(user, 1)
    user._counts[event.type - 1] += 1
    if ts_ms < user.first_seen_ms or not user.first_seen_ms:
        user.first_seen_ms = ts_ms
    count_event(user, event)
    user.applied += 1
    return APPLIED


cdef bint contains(bytearray ids, uint64_t key) noexcept:
    cdef const uint64_t* at = <const uint64_t*> PyByteArray_AS_STRING(ids)
    cdef Py_ssize_t i
    for i in range(PyByteArray_GET_SIZE(ids) // ID_BYTES):
        if at[i] == key:
            return True
    return False


cdef Py_ssize_t place_of_event(User user, int64_t ts_ms, uint64_t key) noexcept:
    """The index where (ts_ms, key) belongs. The search starts at the newest row, because most old events are recent."""
    cdef const Row* rows = <const Row*> PyByteArray_AS_STRING(user.rows)
    cdef const uint64_t* ids = <const uint64_t*> PyByteArray_AS_STRING(user.ids)
    cdef Py_ssize_t place = PyByteArray_GET_SIZE(user.ids) // ID_BYTES
    while place and not (rows[place - 1].ts_ms < ts_ms
                         or (rows[place - 1].ts_ms == ts_ms and ids[place - 1] < key)):
        place -= 1
    return place


cdef int insert(User user, Py_ssize_t place, uint64_t key, Row* row) except -1:
    open_gap(user.ids, place * ID_BYTES, ID_BYTES)
    memcpy(PyByteArray_AS_STRING(user.ids) + place * ID_BYTES, &key, ID_BYTES)
    open_gap(user.rows, place * sizeof(Row), sizeof(Row))
    memcpy(PyByteArray_AS_STRING(user.rows) + place * sizeof(Row), row, sizeof(Row))
    return 0


cdef int open_gap(bytearray data, Py_ssize_t at, Py_ssize_t size) except -1:
    cdef Py_ssize_t before = PyByteArray_GET_SIZE(data)
    PyByteArray_Resize(data, before + size)
    if at < before:
        memmove(PyByteArray_AS_STRING(data) + at + size, PyByteArray_AS_STRING(data) + at, before - at)
    return 0


cdef int drop(User user, Py_ssize_t events) except -1:
    del user.ids[:events * ID_BYTES]
    del user.rows[:events * <Py_ssize_t> sizeof(Row)]
    return 0


cdef int drop_older(User user, int64_t horizon_ms) except -1:
    cdef const Row* rows = <const Row*> PyByteArray_AS_STRING(user.rows)
    cdef Py_ssize_t old = 0     # the newest row is never older than the horizon, so the loop ends there at the latest
    while rows[old].ts_ms < horizon_ms:
        old += 1
    if old:
        drop(user, old)
    return 0


cdef int count_event(User user, Event event) except -1:
    """Add the event to its day bucket, and its amount to the spend or the refunds."""
    cdef int64_t day = event.ts_ms // DAY_MS
    cdef Day* bucket
    cdef bint opens
    if event.type == PURCHASE:
        user.spend += event.amount
        opens = opens_order(user, event.ts_ms, event.basket)
        bucket = bucket_of(user, day)
        if bucket != NULL:
            if opens and bucket.orders != 0xFFFF:       # the counter saturates at 65,535
                bucket.orders += 1
            bucket.spend = <float> (<double> bucket.spend + event.amount)
    elif event.type == REFUND:
        user.refunds += event.amount
        bucket = bucket_of(user, day)
        if bucket != NULL:
            bucket.spend = <float> (<double> bucket.spend - event.amount)
    else:
        bucket = bucket_of(user, day)
        if bucket != NULL:
            if event.type == ADD_TO_CART:
                if bucket.carts != 0xFFFF:
                    bucket.carts += 1
            elif bucket.browses != 0xFFFF:
                bucket.browses += 1
    return 0


cdef bint opens_order(User user, int64_t ts_ms, uint32_t basket) noexcept:
    """Whether this purchase opens a new order. If not, it is another line of the newest order.

    If lines of several baskets arrive interleaved, each change of basket counts as a new order.
    """
    cdef double gap_days
    if user.orders and (basket == user.last_basket if basket else ts_ms == user.last_order_ms):
        return False
    if ts_ms >= user.last_order_ms:
        user.last_basket = basket
    if user.orders:
        gap_days = <double> (ts_ms - user.last_order_ms if ts_ms > user.last_order_ms
                             else user.last_order_ms - ts_ms) / <double> DAY_MS
        user.gaps += 1
        user.gap_days += gap_days
        user.gap_days_squared += gap_days * gap_days
    user.orders += 1
    if ts_ms > user.last_order_ms:
        user.last_order_ms = ts_ms
    return True


cdef Day* bucket_of(User user, int64_t day) except? NULL:
    """The day's bucket, created if it does not exist; NULL if the day is too old to be kept.

    Buckets that are `DAYS_KEPT` days or more older than the newest one are dropped.
    """
    cdef bytearray days = user.days
    cdef Day* buckets = <Day*> PyByteArray_AS_STRING(days)
    cdef Py_ssize_t count = PyByteArray_GET_SIZE(days) // <Py_ssize_t> sizeof(Day), at = count, old = 0
    cdef int64_t newest = day
    if count and buckets[count - 1].day > newest:
        newest = buckets[count - 1].day
    while at and buckets[at - 1].day >= day:
        if buckets[at - 1].day == day:
            return &buckets[at - 1]
        at -= 1
    if day <= newest - KEPT:
        return NULL
    open_gap(days, at * sizeof(Day), sizeof(Day))
    buckets = <Day*> PyByteArray_AS_STRING(days)
    buckets[at].day = <uint16_t> day
    buckets[at].browses = buckets[at].carts = buckets[at].orders = 0
    buckets[at].spend = 0.0
    while buckets[old].day <= newest - KEPT:
        old += 1
    if old:
        del days[:old * <Py_ssize_t> sizeof(Day)]
    return <Day*> PyByteArray_AS_STRING(days) + (at - old)


def clock_ms(User user not None, limits):
    """The user's clock in ms of event time: the newest event, or the due time of the newest timer fired since."""
    return user.last_seen_ms + (limits.silence_ms[user.silence - 1] if user.silence else 0)


def fire_timer(User user not None, limits):
    """Fire the silence timer that is due and set the next one; return the due time, in ms of event time."""
    due_ms = user.due_ms
    user.silence += 1
    user.due_ms = (user.last_seen_ms + limits.silence_ms[user.silence]
                   if user.silence < len(limits.silence_ms) else NO_TIMER)
    return due_ms


# ---- the codec ------------------------------------------------------------------------------------------------------

cdef int write_header(User user, char* into) except -1:
    cdef Header header
    header.format = FORMAT_NUMBER
    header.events = <uint16_t> (PyByteArray_GET_SIZE(user.ids) // ID_BYTES)
    header.days = <uint16_t> (PyByteArray_GET_SIZE(user.days) // <Py_ssize_t> sizeof(Day))
    header.alerting, header.tier = user.alerting, user.tier
    header.outbox_bytes = <uint32_t> PyBytes_GET_SIZE(user.outbox)
    header.generation, header.step = user.generation, user.step
    header.next_offset = user._next_offset
    header.applied, header.duplicate, header.late = user.applied, user.duplicate, user.late
    header.first_seen_ms, header.last_seen_ms = user.first_seen_ms, user.last_seen_ms
    header.counts = user._counts
    header.spend, header.refunds, header.orders = user.spend, user.refunds, user.orders
    header.last_basket, header.last_order_ms = user.last_basket, user.last_order_ms
    header.gaps, header.gap_days, header.gap_days_squared = user.gaps, user.gap_days, user.gap_days_squared
    header.due_ms, header.silence, header.power_grid = user.due_ms, user.silence, user.power_grid
    header.power_at_ms, header.intent_at_ms = user.power_at_ms, user.intent_at_ms
    header.churn_at_ms, header.decisions = user.churn_at_ms, user.decisions
    if (PyBytes_GET_SIZE(user.decision_id) != sizeof(header.decision_id)
            or PyBytes_GET_SIZE(user.model) != sizeof(header.model)
            or PyBytes_GET_SIZE(user.claims) != sizeof(header.claims)):
        raise ValueError(f'decision_id, model or claims of user {user.user_id!r} has another width than the layout')
    memcpy(header.decision_id, PyBytes_AS_STRING(user.decision_id), sizeof(header.decision_id))
    memcpy(header.model, PyBytes_AS_STRING(user.model), sizeof(header.model))
    memcpy(header.claims, PyBytes_AS_STRING(user.claims), sizeof(header.claims))
    memcpy(into, &header, sizeof(Header))
    return 0


cdef uint16_t FORMAT_NUMBER = FORMAT


def pack_header(User user not None):
    """The record's header, HEADER.size bytes."""
    cdef bytes header = PyBytes_FromStringAndSize(NULL, sizeof(Header))
    write_header(user, PyBytes_AS_STRING(header))
    return header


cpdef bytes encode(User user):
    """The user's record as bytes. `decode` is the inverse."""
    cdef Py_ssize_t days = PyByteArray_GET_SIZE(user.days), outbox = PyBytes_GET_SIZE(user.outbox)
    cdef Py_ssize_t ids = PyByteArray_GET_SIZE(user.ids), rows = PyByteArray_GET_SIZE(user.rows)
    cdef bytes record = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> sizeof(Header) + days + outbox + ids + rows)
    cdef char* at = PyBytes_AS_STRING(record)
    write_header(user, at)
    at += sizeof(Header)
    memcpy(at, PyByteArray_AS_STRING(user.days), days)
    memcpy(at + days, PyBytes_AS_STRING(user.outbox), outbox)
    memcpy(at + days + outbox, PyByteArray_AS_STRING(user.ids), ids)
    memcpy(at + days + outbox + ids, PyByteArray_AS_STRING(user.rows), rows)
    return record


def decode(str user_id, record):
    """Decode a stored record.

    Errors   StateError if the number of the layout is unknown, or the length does not match the header's counts.
    """
    cdef bytes data = record if type(record) is bytes else bytes(record)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data), days, ids, rows
    cdef const char* at = PyBytes_AS_STRING(data)
    cdef Header header
    cdef User user
    if size < <Py_ssize_t> sizeof(Header):
        raise damaged(user_id, f'{size} bytes, a header has {sizeof(Header)}')
    memcpy(&header, at, sizeof(Header))
    if header.format not in FORMATS_READ:
        raise StateError(
            f'The record of user {user_id!r} has layout {header.format}, this version reads layouts '
            f'{" and ".join(map(str, FORMATS_READ))}.',
            'run the version that wrote the record, on all workers of the group: the changelog has such records too.')
    days, ids, rows = header.days * sizeof(Day), header.events * ID_BYTES, header.events * sizeof(Row)
    if size != <Py_ssize_t> sizeof(Header) + days + header.outbox_bytes + ids + rows:
        raise damaged(user_id, f'{size} bytes, its header says '
                               f'{<Py_ssize_t> sizeof(Header) + days + header.outbox_bytes + ids + rows}')
    user = User.__new__(User)
    user.user_id = user_id
    user.alerting, user.tier = header.alerting, header.tier
    user.generation, user.step = header.generation, header.step
    user._next_offset = header.next_offset
    user.applied, user.duplicate, user.late = header.applied, header.duplicate, header.late
    user.first_seen_ms, user.last_seen_ms = header.first_seen_ms, header.last_seen_ms
    user._counts = header.counts
    user.spend, user.refunds, user.orders = header.spend, header.refunds, header.orders
    user.last_basket, user.last_order_ms = header.last_basket, header.last_order_ms
    user.gaps, user.gap_days, user.gap_days_squared = header.gaps, header.gap_days, header.gap_days_squared
    user.due_ms, user.silence, user.power_grid = header.due_ms, header.silence, header.power_grid
    user.stored_due_ms = header.due_ms
    user.power_at_ms, user.intent_at_ms = header.power_at_ms, header.intent_at_ms
    user.churn_at_ms, user.decisions = header.churn_at_ms, header.decisions
    user.decision_id = PyBytes_FromStringAndSize(header.decision_id, sizeof(header.decision_id))
    user.model = PyBytes_FromStringAndSize(header.model, sizeof(header.model))
    user.claims = PyBytes_FromStringAndSize(header.claims, sizeof(header.claims))
    at += sizeof(Header)
    user.days = PyByteArray_FromStringAndSize(at, days)
    user.outbox = PyBytes_FromStringAndSize(at + days, header.outbox_bytes)
    user.ids = PyByteArray_FromStringAndSize(at + days + header.outbox_bytes, ids)
    user.rows = PyByteArray_FromStringAndSize(at + days + header.outbox_bytes + ids, rows)
    return user


cdef damaged(str user_id, str what):
    return StateError(f'The record of user {user_id!r} is damaged: {what}.',
                      'move the state directory away and rebuild it.')


@cython.final
@cython.no_gc
@cython.freelist(1024)
cdef class Change:
    """A user's record after a step, and the change of the user's timer.

    due_before_ms  the due time that the timer index holds; NO_TIMER_MS if it holds none
    due_ms         the due time that the index must hold after the write
    new            whether the user had no record before
    """

    def __init__(self, bytes user_id, bytes record, int64_t due_before_ms, int64_t due_ms, bint new=False):
        self.user_id, self.record, self.new = user_id, record, new
        self.due_before_ms, self.due_ms = due_before_ms, due_ms


def change_of(User user not None, bint new=False):
    """The change to write for the user. Sets `stored_due_ms`, as if the timer index already held the new due time."""
    cdef Change change = Change.__new__(Change)
    change.user_id, change.record, change.new = user.user_id.encode(), encode(user), new
    change.due_before_ms, change.due_ms = user.stored_due_ms, user.due_ms
    user.stored_due_ms = user.due_ms
    return change


def gather(dict pending not None, list changes not None):
    """Add changes to those that wait to be written, `pending`, by user; return bytes, due_ms.

    Only the newest record of a user is written. The change that waited leaves it the timer that the index holds, and
    whether the user is new.

    Returns  bytes   by how much the records in `pending` have grown
             due_ms  the earliest due time among `changes`; NO_TIMER_MS if they set no timer
    """
    cdef Change change, before
    cdef Py_ssize_t grown = 0
    cdef int64_t due_ms = NO_TIMER
    cdef void* found
    for change in changes:
        found = <void*> PyDict_GetItem(pending, change.user_id)
        if found != NULL:
            before = <Change> found
            change.due_before_ms = before.due_before_ms
            change.new = change.new or before.new
            grown -= PyBytes_GET_SIZE(before.record)
        grown += PyBytes_GET_SIZE(change.record)
        if change.due_ms != NO_TIMER and (due_ms == NO_TIMER or change.due_ms < due_ms):
            due_ms = change.due_ms
        pending[change.user_id] = change
    return grown, due_ms


def stamp(list users not None, int64_t step, uint32_t generation):
    """Set step and generation of each user; return, for each, whether the user had no record before."""
    cdef User user
    cdef list new = []
    for user in users:
        new.append(user.step == 0)
        user.step, user.generation = step, generation
    return new


def keep(dict kept not None, list users not None, list changes not None, Py_ssize_t object_bytes):
    """Put the users into `kept`, by id; return by how many bytes `kept` has grown.

    changes       the users' changes, in the same order: a user takes the size of the record, plus `object_bytes`
    """
    cdef User user
    cdef Change change
    cdef Py_ssize_t grown = 0, size
    for user, change in zip(users, changes):
        size = PyBytes_GET_SIZE(change.record) + object_bytes
        grown += size - user._kept_bytes if user.user_id in kept else size
        user._kept_bytes = size
        kept[user.user_id] = user
    return grown


def join(list users not None):
    """Headers, days and rows of N users, each joined user after user."""
    cdef User user
    cdef Py_ssize_t days = 0, rows = 0
    for user in users:
        days += PyByteArray_GET_SIZE(user.days)
        rows += PyByteArray_GET_SIZE(user.rows)
    cdef bytes all_headers = PyBytes_FromStringAndSize(NULL, len(users) * <Py_ssize_t> sizeof(Header))
    cdef bytes all_days = PyBytes_FromStringAndSize(NULL, days)
    cdef bytes all_rows = PyBytes_FromStringAndSize(NULL, rows)
    cdef char* header_at = PyBytes_AS_STRING(all_headers)
    cdef char* days_at = PyBytes_AS_STRING(all_days)
    cdef char* rows_at = PyBytes_AS_STRING(all_rows)
    for user in users:
        write_header(user, header_at)
        header_at += sizeof(Header)
        memcpy(days_at, PyByteArray_AS_STRING(user.days), PyByteArray_GET_SIZE(user.days))
        days_at += PyByteArray_GET_SIZE(user.days)
        memcpy(rows_at, PyByteArray_AS_STRING(user.rows), PyByteArray_GET_SIZE(user.rows))
        rows_at += PyByteArray_GET_SIZE(user.rows)
    return all_headers, all_days, all_rows
