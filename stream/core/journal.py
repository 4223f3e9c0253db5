"""The journal records what a lane did, with one record per block or sweep. A replay uses it to repeat the same steps.

A window does not depend on where the input is cut into blocks, but scores do: a user is scored at the end of a step.
The journal records where each step ends. The entries of a lane are in one partition of the journal topic, in the order
of its steps:

    events      The lane took the records of one input at fetch positions [start, stop). If the lane folded blocks of
                both inputs as one run, in time order, the run has two entries with the same `step`. `StepDriver.run`
                cuts the run into steps, which are numbered from `step` upwards. A run without a valid event is one step
                that changes nothing.
    timers      The lane fired the silence timers of `users`, in this order, in step `step`.
    recovered   A new owner took the lane over. The newest step in the state it found was `step` (0: the state was
                empty). Only `users` had the result of that step (null: all its users had). The next step is `step` + 1.

The broker acknowledges an entry before the lane sends the changelog of the entry's first step. So the state never
contains a step that the journal lacks. The reverse can happen: if an owner is killed, its newest entries may describe
steps that took effect in part or not at all. The next owner writes a `recovered` entry before anything else, which says
what took effect. `steps_of` drops the rest. If a `recovered` entry would be too large for a record, the owner writes
several entries with the same step, each with a part of the users. The producer is idempotent, so no entry is written
twice.

Entries are JSON, with the fields in the order of the classes below:

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
StepNumber = Annotated[int, Meta(ge=1)]


class EventsEntry(msgspec.Struct, frozen=True, tag='events', tag_field='kind'):
    """A block of one input's records.

    step         number of the first step of the run that the block belongs to
    start, stop  the block's fetch positions, [start, stop)
    model        SHA-256 (hex) of the weights that score it
    rules        `rules_digest` of the settings that determine the outputs
    """

    lane: Count
    step: StepNumber
    source: Annotated[int, Meta(ge=0, le=1)]     # `stream.core.events.Source`
    start: Count
    stop: Count
    model: str
    rules: str


class TimersEntry(msgspec.Struct, frozen=True, tag='timers', tag_field='kind'):
    """A sweep: one timer of each of `users` fires, in this order. `model` and `rules` are as in `EventsEntry`."""

    lane: Count
    step: StepNumber
    users: Sequence[str]
    model: str
    rules: str


class RecoveredEntry(msgspec.Struct, frozen=True, tag='recovered', tag_field='kind'):
    """What a new owner found: the newest step, and the users whose records have it (None: all users of the step)."""

    lane: Count
    step: Count
    users: Sequence[str] | None


Entry = EventsEntry | TimersEntry | RecoveredEntry

encode_entry = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


def decode_entry(value: bytes) -> Entry:
    """Decode an entry from JSON. Unknown fields are ignored.

    Errors   InputError if the value is not a journal entry.
    """
    try:
        return _decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f'This is not a journal entry: {error} ({value[:80]!r}).',
                         'name only recordings of the journal topic (setting journal_topic).') from error


class Kept(msgspec.Struct, frozen=True):
    """How much of an owner's work took effect: all steps before `step`, and step `step` for `users` (None: for all)."""

    step: int
    users: frozenset[str] | None


def steps_of(entries: Sequence[Entry]) -> Iterable[tuple[EventsEntry | TimersEntry, Kept | None]]:
    """A lane's entries in order, each with how much of it took effect; None if all of it did.

    Entries that had no effect are left out.
    """
    kept: Kept | None = None
    counted: list[tuple[EventsEntry | TimersEntry, Kept | None]] = []
    for entry in reversed(entries):
        if isinstance(entry, RecoveredEntry):
            found = Kept(entry.step, None if entry.users is None else frozenset(entry.users))
            if kept and found.step == kept.step and found.users is not None and kept.users is not None:
                # The entry was written in parts, or two owners found the same step.
                found = Kept(found.step, found.users | kept.users)
            if kept is None or found.step <= kept.step:
                kept = found        # if two owners found the same step, only the earlier one saw what was cut short
        elif kept is None or entry.step <= kept.step:
            counted.append((entry, kept))
    return reversed(counted)


def rules_digest(events: EventRules, steps: StepRules) -> str:
    """A digest, 16 hex digits, of every setting that determines the outputs for given blocks and a given model.

    Source   XXH3-64 of the settings as JSON with sorted keys.
    """
    values = [events, steps.limits, steps.policy, steps.publish, steps.reasons_rows_max]
    return xxh3_64_hexdigest(msgspec.json.encode(values, order='sorted'))
