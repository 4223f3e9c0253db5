"""A recorded journal: read from its file, and shown to a person."""
from collections.abc import Iterator, Sequence
from pathlib import Path

from stream.core.journal import Entry, EventsEntry, Kept, RecoveredEntry, TimersEntry, decode_entry, steps_of
from stream.errors import InputError
from stream.replay.formats import FORMATS
from stream.replay.topic_records import decode_record

DIGITS_SHOWN = 12       # of a model's SHA-256
_USERS_SHOWN = 5

Journal = dict[int, list[Entry]]        # lane -> its entries


def read_journal(path: Path) -> Journal:
    """Each lane's entries in order, lanes in order.

    path     what `stream record` wrote of the journal topic, in any order of partitions; or bare entries, one a line
    Errors   InputError where it cannot be read, holds something else, or holds no entry.
    """
    placed: dict[tuple[str, int, int], Entry] = {}
    for number, line in enumerate(FORMATS['events'].rows(path)):        # lines of JSON, maybe compressed
        assert isinstance(line, bytes)
        record = decode_record(line)
        if record is None:
            placed['', 0, number] = decode_entry(line)
        else:
            placed[record.topic, record.partition, record.offset] = decode_entry(record.value or b'')
    journal: Journal = {}
    homes: dict[int, tuple[str, int]] = {}
    for (topic, partition, _), entry in sorted(placed.items(), key=lambda item: item[0]):
        if homes.setdefault(entry.lane, (topic, partition)) != (topic, partition):
            raise InputError(f'The entries of lane {entry.lane} are in more than one topic partition, so that their '
                             'order is not known.', 'record the journal topic alone, as it is since it was created.')
        journal.setdefault(entry.lane, []).append(entry)
    if not journal:
        raise InputError(f'{path} has no journal entry.', 'record the journal topic (setting journal_topic).')
    return dict(sorted(journal.items()))


def described(journal: Journal, topics: tuple[str, str], with_users: bool = False) -> Iterator[str]:
    """The journal for a person: a heading, then one line an entry, lane by lane.

    with_users   name all users of an entry, not only the first ones
    """
    yield f'{"lane":>5} {"step":>9}  {"cause":<40} {"came to be":<14} {"model":<{DIGITS_SHOWN}} users'
    for lane, entries in journal.items():
        counted = {id(entry): kept for entry, kept in steps_of(entries)}
        for entry in entries:
            happened = model = users = ''
            if isinstance(entry, RecoveredEntry):
                cause = 'a new owner found this'
            else:
                model = entry.model[:DIGITS_SHOWN]
                happened = _happened(counted[id(entry)]) if id(entry) in counted else 'nothing'
                cause = (f'{len(entry.users)} timers' if isinstance(entry, TimersEntry)
                         else f'{topics[entry.source]} [{entry.start}, {entry.stop})')
            if not isinstance(entry, EventsEntry):
                users = 'all of the step' if entry.users is None else _shown(entry.users, with_users)
            yield f'{lane:>5} {entry.step:>9}  {cause:<40} {happened:<14} {model:<{DIGITS_SHOWN}} {users}'.rstrip()


def _happened(kept: Kept | None) -> str:
    return 'all' if kept is None else f'to step {kept.step}'


def _shown(users: Sequence[str], all_of_them: bool) -> str:
    if all_of_them or len(users) <= _USERS_SHOWN:
        return ' '.join(users)
    return f'{" ".join(users[:_USERS_SHOWN])} and {len(users) - _USERS_SHOWN} more'
