# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Messages and outboxes. A user's outbox holds the messages of the user's newest step, in a compact form.

Each message can be rebuilt from the outbox byte for byte. An outbox is a list of items of two kinds:

    message     u32 length, then the JSON of a decision as it is published
    scores      u32 length with its top bit set, then, little-endian:
                    the model's SHA-256, 32 bytes; as-of time and timer in ms, i64; expected spend, f64;
                    purchase intent, purchase power and churn, u16; number of tiers, length of the model's name and
                    length of its version, u8; number of events, u32; the tier probabilities, u16;
                    name and version in UTF-8; for each event the length of its id, u16, and the id
                The item stands for one `scores.updated` message per event, or for a single one if it has no events.

Most messages are scores, and nearly everything in them is also in the rest of the user's record. So a scores item takes
a tenth of the size of its message. The same code renders the message the first time and whenever it is sent again.

Numbers are stored in steps of the grid on which scores are published. A table has the JSON text of each step.

A `Message` carries its facts beside its bytes, so no code has to parse the JSON again. The one exception is a decision
from a stored outbox, which has nothing but the bytes.
"""
cdef extern from *:
    const char* _SOURCE_HASH "SOURCE_HASH"

SOURCE_HASH = _SOURCE_HASH.decode()

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy

from stream.core.parse cimport Event
from stream.core.user cimport User

import msgspec
import orjson
from xxhash import xxh3_128_digest

from stream.core.decide import Kind
from stream.core.scores import STEPS_PER_UNIT
from stream.core.layout import NO_TIER
from stream.errors import StateError

cdef enum:
    GRID_MAX = 10000
    ID_HEX_BYTES = 32
    SCORES_BIT = 0x80000000

cdef packed struct ScoresItem:
    char sha256[32]
    int64_t as_of_ms
    int64_t timer_ms
    double spend
    uint16_t intent
    uint16_t power
    uint16_t churn
    uint8_t tiers
    uint8_t name_size
    uint8_t version_size
    uint32_t events

if GRID_MAX != STEPS_PER_UNIT:
    raise AssertionError('the compiled table of grid values does not match STEPS_PER_UNIT: install the package again')
cdef char GRID[GRID_MAX + 1][8]
cdef uint8_t GRID_SIZE[GRID_MAX + 1]
for _step in range(GRID_MAX + 1):
    _text = orjson.dumps(_step / STEPS_PER_UNIT)
    if len(_text) > 8:
        raise AssertionError(f'{_text!r} does not fit into the table of grid values')
    memcpy(GRID[_step], PyBytes_AS_STRING(_text), len(_text))
    GRID_SIZE[_step] = len(_text)
cdef bytes HEX = b'0123456789abcdef'
cdef int NONE = NO_TIER
cdef object SCORES = Kind.SCORES


class Facts(msgspec.Struct):
    """The facts of a decision, read from its JSON."""

    id: str
    type: Kind
    as_of_ms: int

cdef object decode_facts = msgspec.json.Decoder(Facts).decode


@cython.final
@cython.no_gc
@cython.freelist(1024)
cdef class Message:
    """One message as it is published, with the facts that its senders and counters need.

    kind        CloudEvents type, a `stream.core.decide.Kind`
    message_id  32 hex digits
    key         the user's id in UTF-8
    as_of_ms    the event time that the message is as of, Unix ms
    value       the JSON
    content     the values that the JSON was rendered from, for a decision that was just taken; None for other messages
    """

    def __init__(self, kind, bytes message_id not None, bytes key not None, int64_t as_of_ms, bytes value not None,
                 dict content=None):
        if PyBytes_GET_SIZE(message_id) != ID_HEX_BYTES:
            raise ValueError(f'an id has {ID_HEX_BYTES} hex digits, not {message_id!r}')
        memcpy(self.id_hex, PyBytes_AS_STRING(message_id), ID_HEX_BYTES)
        self.kind, self.key, self.as_of_ms = kind, key, as_of_ms
        self.value, self.content = value, content

    @property
    def message_id(self):
        return PyBytes_FromStringAndSize(self.id_hex, ID_HEX_BYTES)

    def __eq__(self, other):
        return (isinstance(other, Message) and self.value == (<Message> other).value
                and self.key == (<Message> other).key and self.kind == (<Message> other).kind
                and self.message_id == (<Message> other).message_id and self.as_of_ms == (<Message> other).as_of_ms)

    def __hash__(self):
        return hash(self.value)

    def __repr__(self):
        return f'Message({self.kind!r}, {self.message_id!r}, {self.key!r}, {self.as_of_ms}, {self.value!r:.200})'


# ---- growing buffers ------------------------------------------------------------------------------------------------

cdef struct Buffer:
    char* data
    Py_ssize_t size
    Py_ssize_t room

cdef Buffer PACKED      # the outbox that is being packed
cdef Buffer TEXT        # the JSON of the message that is being rendered
cdef Buffer NAME        # the text whose hash is the message's id


cdef int reserve(Buffer* into, Py_ssize_t more) except -1:
    cdef char* moved
    if into.size + more > into.room:
        moved = <char*> realloc(into.data, 2 * (into.size + more) + 256)
        if moved == NULL:
            raise MemoryError()
        into.data, into.room = moved, 2 * (into.size + more) + 256
    return 0


cdef int put(Buffer* into, const char* data, Py_ssize_t size) except -1:
    reserve(into, size)
    memcpy(into.data + into.size, data, size)
    into.size += size
    return 0


cdef int put_bytes(Buffer* into, bytes data) except -1:
    return put(into, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


cdef int put_number(Buffer* into, int64_t value) except -1:
    cdef char digits[20]
    cdef int at = 20
    cdef bint negative = value < 0
    if negative:
        value = -value
    while True:
        at -= 1
        digits[at] = <char> (48 + value % 10)
        value //= 10
        if not value:
            break
    if negative:
        put(into, b'-', 1)
    return put(into, digits + at, 20 - at)


cdef int put_grid(Buffer* into, uint16_t step) except -1:
    return put(into, GRID[step], GRID_SIZE[step])


cdef int put_string(Buffer* into, str text) except -1:
    """Append the text as a JSON string."""
    cdef Py_ssize_t size, i
    cdef const char* data = PyUnicode_AsUTF8AndSize(text, &size)
    for i in range(size):
        if data[i] == 0x22 or data[i] == 0x5C or not 0x20 <= <uint8_t> data[i] < 0x7F:
            return put_bytes(into, orjson.dumps(text))
    put(into, b'"', 1)
    put(into, data, size)
    return put(into, b'"', 1)


cdef int put_hex(Buffer* into, const char* data, Py_ssize_t size) except -1:
    reserve(into, 2 * size)
    write_hex(into.data + into.size, data, size)
    into.size += 2 * size
    return 0


cdef void write_hex(char* into, const char* data, Py_ssize_t size) noexcept:
    cdef Py_ssize_t i
    cdef const char* digits = PyBytes_AS_STRING(HEX)
    for i in range(size):
        into[2 * i] = digits[<uint8_t> data[i] >> 4]
        into[2 * i + 1] = digits[<uint8_t> data[i] & 15]


# ---- the outbox -----------------------------------------------------------------------------------------------------

def split_scores(messages):
    """Decisions and scores apart, each in order: they go to different topics."""
    cdef list decisions = [], scores = []
    cdef Message message
    for message in messages:
        (scores if message.kind is SCORES else decisions).append(message)
    return decisions, scores


def pack_messages(messages):
    """Pack the messages of decisions into the form that the outbox stores."""
    PACKED.size = 0
    pack_into(&PACKED, messages)
    return PyBytes_FromStringAndSize(PACKED.data, PACKED.size)


cdef int pack_into(Buffer* into, messages) except -1:
    cdef uint32_t size
    cdef Message message
    for message in messages:
        size = <uint32_t> PyBytes_GET_SIZE(message.value)
        put(into, <char*> &size, 4)
        put_bytes(into, message.value)
    return 0


@cython.final
cdef class ScoresPen:
    """Writes the scores of one step's users, from one model, into their outboxes.

    Arrays   the step's rows, rounded to the grid: intent, power, churn, spend float64 [N]; tiers float64 [N, tiers]
    """

    cdef ScoresItem _item
    cdef bytes _names
    cdef const double[:] _intent, _power, _churn, _spend
    cdef const double[:, :] _tiers

    def __init__(self, model, scores):
        cdef bytes name = model.name.encode(), version = model.version.encode(), sha256 = bytes.fromhex(model.sha256)
        if len(sha256) != sizeof(self._item.sha256) or max(len(name), len(version), scores.tiers.shape[1]) > 255:
            raise ValueError(f'{model} does not fit into an outbox: 255 is the limit for the bytes of its name and of '
                             'its version, and for its tiers; its SHA-256 has 32 bytes')
        memcpy(self._item.sha256, PyBytes_AS_STRING(sha256), sizeof(self._item.sha256))
        self._item.name_size, self._item.version_size = len(name), len(version)
        self._item.tiers = scores.tiers.shape[1]
        self._names = name + version
        self._intent, self._power, self._churn, self._spend = scores.intent, scores.power, scores.churn, scores.spend
        self._tiers = scores.tiers

    def write(self, User user not None, list decisions, Py_ssize_t row, int64_t as_of_ms, int64_t timer_ms, list events):
        """Set the user's outbox to the decisions and the scores of `row`; return the messages.

        decisions  messages of decisions, which come first; or None
        events     one message is written about each event; if empty or None, one message is written about the user
        """
        cdef ScoresItem* item = &self._item
        cdef Py_ssize_t i, before
        cdef uint32_t size = 0
        cdef uint16_t step
        cdef bytes event_id
        cdef Event event
        cdef list messages = []
        PACKED.size = 0
        if decisions:
            pack_into(&PACKED, decisions)
            messages += decisions
        before = PACKED.size
        item.as_of_ms, item.timer_ms, item.spend = as_of_ms, timer_ms, self._spend[row]
        item.intent, item.power, item.churn = on_grid(self._intent[row]), on_grid(self._power[row]), \
            on_grid(self._churn[row])
        item.events = len(events) if events is not None else 0
        put(&PACKED, <char*> &size, 4)
        put(&PACKED, <char*> item, sizeof(ScoresItem))
        for i in range(item.tiers):
            step = on_grid(self._tiers[row, i])
            put(&PACKED, <char*> &step, 2)
        put_bytes(&PACKED, self._names)
        if item.events:
            for event in events:
                event_id = event.event_id.encode()
                step = <uint16_t> PyBytes_GET_SIZE(event_id)
                put(&PACKED, <char*> &step, 2)
                put_bytes(&PACKED, event_id)
        size = <uint32_t> (PACKED.size - before - 4) | <uint32_t> SCORES_BIT
        memcpy(PACKED.data + before, &size, 4)
        user.outbox = PyBytes_FromStringAndSize(PACKED.data, PACKED.size)
        render(user, user.user_id.encode(), PACKED.data + before + 4, PACKED.size - before - 4, messages)
        return messages


cdef inline uint16_t on_grid(double value) noexcept:
    return <uint16_t> <int> (value * GRID_MAX + 0.5)


def unpack_outbox(User user not None):
    """The messages of the user's newest step, in order."""
    cdef bytes outbox = user.outbox
    cdef const char* data = PyBytes_AS_STRING(outbox)
    cdef Py_ssize_t at = 0, end = PyBytes_GET_SIZE(outbox)
    cdef uint32_t size
    cdef list messages = []
    cdef bytes key = user.user_id.encode()
    cdef bint scores
    while at < end:
        if end - at < 4:
            raise damaged(user)
        memcpy(&size, data + at, 4)
        at += 4
        scores = (size & <uint32_t> SCORES_BIT) != 0
        size &= ~<uint32_t> SCORES_BIT
        if size > end - at:
            raise damaged(user)
        if scores:
            try:
                render(user, key, data + at, size, messages)
            except UnicodeDecodeError as error:
                raise damaged(user) from error
        else:
            messages.append(read_decision(user, key, PyBytes_FromStringAndSize(data + at, size)))
        at += size
    return messages


cdef Message read_decision(User user, bytes key, bytes value):
    try:
        facts = decode_facts(value)
        return Message(facts.type, facts.id.encode(), key, facts.as_of_ms, value)
    # ValueError: invalid UTF-8, or an id of another length. OverflowError: a time beyond 64 bits.
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise damaged(user) from error


cdef damaged(User user):
    return StateError(f'The outbox of user {user.user_id!r} is damaged.',
                      'move the state directory away; the worker restores it from the changelog.')


cdef int render(User user, bytes key, const char* data, Py_ssize_t whole, list messages) except -1:
    """Append the messages of one scores item of `whole` bytes. Errors: StateError if the item is damaged."""
    cdef ScoresItem item
    cdef const uint16_t* tiers
    cdef const char* at
    cdef str name, version, event_id
    cdef const char* end = data + whole
    cdef uint16_t size
    cdef uint32_t i
    if whole < <Py_ssize_t> sizeof(item):
        raise damaged(user)
    memcpy(&item, data, sizeof(item))
    tiers = <const uint16_t*> (data + sizeof(item))
    if whole - <Py_ssize_t> sizeof(item) < 2 * item.tiers + item.name_size + item.version_size:
        raise damaged(user)
    for i in range(item.tiers):
        if tiers[i] > GRID_MAX:
            raise damaged(user)
    if item.intent > GRID_MAX or item.power > GRID_MAX or item.churn > GRID_MAX:
        raise damaged(user)
    at = data + sizeof(item) + 2 * item.tiers
    name = PyUnicode_DecodeUTF8(at, item.name_size, NULL)
    at += item.name_size
    version = PyUnicode_DecodeUTF8(at, item.version_size, NULL)
    at += item.version_size
    if not item.events:
        messages.append(render_one(user, key, &item, tiers, name, version, None))
    for i in range(item.events):
        if end - at < 2:
            raise damaged(user)
        memcpy(&size, at, 2)
        if end - at - 2 < size:
            raise damaged(user)
        event_id = PyUnicode_DecodeUTF8(at + 2, size, NULL)
        messages.append(render_one(user, key, &item, tiers, name, version, event_id))
        at += 2 + size
    if at != end:
        raise damaged(user)
    return 0


cdef Message render_one(User user, bytes key, ScoresItem* item, const uint16_t* tiers, str name, str version,
                        str event_id):
    cdef bytes identity
    cdef Message message = Message.__new__(Message)
    cdef int i
    # The id: which user, in which state, by which model, about which event.
    NAME.size = 0
    put(&NAME, b'[', 1)
    put_string(&NAME, user.user_id)
    put(&NAME, b',"scores.updated",', 18)
    put_string(&NAME, '' if event_id is None else event_id)
    put(&NAME, b',', 1)
    put_number(&NAME, item.timer_ms)
    put(&NAME, b',', 1)
    put_number(&NAME, user._next_offset[0])
    put(&NAME, b',', 1)
    put_number(&NAME, user._next_offset[1])
    put(&NAME, b',', 1)
    put_number(&NAME, user.applied)
    put(&NAME, b',"', 2)
    put_hex(&NAME, item.sha256, sizeof(item.sha256))
    put(&NAME, b'"]', 2)
    identity = xxh3_128_digest(PyBytes_FromStringAndSize(NAME.data, NAME.size))
    write_hex(message.id_hex, PyBytes_AS_STRING(identity), ID_HEX_BYTES // 2)

    TEXT.size = 0
    put(&TEXT, b'{"id":"', 7)
    put(&TEXT, message.id_hex, ID_HEX_BYTES)
    put(&TEXT, b'","type":"scores.updated","user_id":', 36)
    put_string(&TEXT, user.user_id)
    put(&TEXT, b',"as_of_ms":', 12)
    put_number(&TEXT, item.as_of_ms)
    put(&TEXT, b',"events_seen":', 15)
    put_number(&TEXT, user.applied)
    put(&TEXT, b',"cause":{"clicks_offset":', 26)
    put_number(&TEXT, user._next_offset[0])
    put(&TEXT, b',"carts_offset":', 16)
    put_number(&TEXT, user._next_offset[1])
    put(&TEXT, b',"timer_ms":', 12)
    if item.timer_ms:
        put_number(&TEXT, item.timer_ms)
    else:
        put(&TEXT, b'null', 4)
    put(&TEXT, b'},"model":{"name":', 18)
    put_string(&TEXT, name)
    put(&TEXT, b',"version":', 11)
    put_string(&TEXT, version)
    put(&TEXT, b',"sha256":"', 11)
    put_hex(&TEXT, item.sha256, sizeof(item.sha256))
    put(&TEXT, b'"}', 2)
    if event_id is not None:
        put(&TEXT, b',"event_id":', 12)
        put_string(&TEXT, event_id)
    put(&TEXT, b',"scores":{"purchase_intent":', 29)
    put_grid(&TEXT, item.intent)
    put(&TEXT, b',"purchase_power":', 18)
    put_grid(&TEXT, item.power)
    put(&TEXT, b',"churn":', 9)
    put_grid(&TEXT, item.churn)
    put(&TEXT, b',"expected_spend_90d":', 22)
    if item.spend == 0.0:
        put(&TEXT, b'0.0', 3)
    else:
        put_bytes(&TEXT, orjson.dumps(item.spend))
    put(&TEXT, b'},"tier_probabilities":[', 24)
    for i in range(item.tiers):
        if i:
            put(&TEXT, b',', 1)
        put_grid(&TEXT, tiers[i])
    put(&TEXT, b'],"tier":', 9)
    if user.tier == NONE:
        put(&TEXT, b'null', 4)
    else:
        put_number(&TEXT, user.tier)
    put(&TEXT, b'}', 1)
    message.kind, message.key, message.as_of_ms = SCORES, key, item.as_of_ms
    message.value = PyBytes_FromStringAndSize(TEXT.data, TEXT.size)
    return message
