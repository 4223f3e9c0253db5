"""What a lane did, one record per block or sweep, so that a replay can make the same steps.

Windows do not depend on how blocks are cut, but scores do: a user is scored at the end of a step. The journal says
where the steps were cut. A lane's entries stand in the order of its steps, in one partition of the journal topic:

    events      the lane took the records of one input at fetch positions [start, stop). Where it folded blocks of both
                inputs as one run, in the order of time, there are two entries with the same `step`. The run's steps, as
                `StepDriver.run` cuts them, are numbered from `step` upwards; a run without a valid event is one step
                that changes nothing
    timers      the lane fired the silence timers of `users`, in this order, in step `step`
    recovered   a new owner found step `step` to be the newest in the lane's state (0: there was none), and of that
                step only `users` (null: all of them); nothing of later ones. The next step is `step` + 1

An entry is acknowledged before the changelog of its first step is sent, so that nothing can be in the state that the
journal does not know. The other way round it can: the newest entries of an owner that was killed may have happened in
part, or not at all. What came of them is in the `recovered` entry of the next owner, who writes it before anything
else: `steps_of` cuts with it. Of a `recovered` entry that would be too large for a record, several may be written with
the same step, each with a part of the users. The producer is idempotent, so that no entry stands twice.

As JSON, in the order of the fields below:

    {"kind":"events","lane":3,"step":17,"source":1,"start":4800,"stop":5000,"model":"9c1f...","rules":"5d3f..."}
    {"kind":"timers","lane":3,"step":21,"users":["u1","u7"],"model":"9c1f...","rules":"5d3f..."}
    {"kind":"recovered","lane":3,"step":20,"users":["u4"]}
    {"kind":"recovered","lane":3,"step":31,"users":null}
"""
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta
from xxhash import xxh3_64_hexdigest

from stream.core.events import EventRules
from stream.core.rules import StepRules
from stream.errors import InputError

Count = Annotated[int, Meta(ge=0)]
Step = Annotated[int, Meta(ge=1)]


class EventsEntry(msgspec.Struct, frozen=True, tag='events', tag_field='kind'):
    """A block of one input's records.

    step     number of the first step of the run that the block belongs to
    start    first fetch position of the block, stop: the first one after it
    model    SHA-256 (hex) of the weights that score it
    rules    `rules_digest` of the settings that decide what comes out
    """

    lane: Count
    step: Step
    source: Annotated[int, Meta(ge=0, le=1)]     # `stream.core.events.Source`
    start: Count
    stop: Count
    model: str
    rules: str


class TimersEntry(msgspec.Struct, frozen=True, tag='timers', tag_field='kind'):
    """A sweep: one timer of each of `users` fires, in this order. `model`, `rules` as in `EventsEntry`."""

    lane: Count
    step: Step
    users: Sequence[str]
    model: str
    rules: str


class RecoveredEntry(msgspec.Struct, frozen=True, tag='recovered', tag_field='kind'):
    """What a new owner found: the newest step, and those of its users that have it (None: all of them)."""

    lane: Count
    step: Count
    users: Sequence[str] | None


Entry = EventsEntry | TimersEntry | RecoveredEntry

encode_entry = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


def decode_entry(value: bytes) -> Entry:
    """An entry from its JSON; fields that are not known here are ignored.

    Errors   InputError where it is none.
    """
    try:
        return _decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f'This is no journal entry: {error} ({value[:80]!r}).',
                         'name a recording of the journal topic (setting journal_topic), and nothing else.') from error


class Kept(msgspec.Struct, frozen=True):
    """How much counts: the steps up to `step`, and of that one only what was done to `users` (None: all of it)."""

    step: int
    users: frozenset[str] | None


def steps_of(entries: Sequence[Entry]) -> Iterable[tuple[EventsEntry | TimersEntry, Kept | None]]:
    """A lane's entries, in order, each with how much of it came to be; None: all of it.

    Entries of which nothing came to be are not given.
    """
    kept: Kept | None = None
    counted: list[tuple[EventsEntry | TimersEntry, Kept | None]] = []
    for entry in reversed(entries):
        if isinstance(entry, RecoveredEntry):
            found = Kept(entry.step, None if entry.users is None else frozenset(entry.users))
            if kept and found.step == kept.step and found.users is not None and kept.users is not None:
                found = Kept(found.step, found.users | kept.users)      # one in parts, or found again
            if kept is None or found.step <= kept.step:
                kept = found        # of two that found the same, the earlier one knows what was cut short
        elif kept is None or entry.step <= kept.step:
            counted.append((entry, kept))
    return reversed(counted)


def rules_digest(events: EventRules, steps: StepRules) -> str:
    """16 hex digits that change with every setting that decides what comes out of given blocks and a given model.

    Source   XXH3-64 of the settings as JSON with sorted keys.
    """
    values = [events, steps.limits, steps.policy, steps.publish, steps.reasons_rows_max]
    return xxh3_64_hexdigest(msgspec.json.encode(values, order='sorted'))
