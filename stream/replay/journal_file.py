"""Reads a recorded journal from its file, and prints it for people."""
from collections.abc import Iterator, Sequence
from pathlib import Path

from stream.core.journal import Entry, EventsEntry, Kept, RecoveredEntry, TimersEntry, decode_entry, steps_of
from stream.errors import InputError
from stream.replay.formats import FORMATS
from stream.replay.topic_records import decode_record

DIGITS_SHOWN = 12       # how many digits of a model's SHA-256 are shown
_USERS_SHOWN = 5

Journal = dict[int, list[Entry]]        # lane -> its entries


def read_journal(path: Path) -> Journal:
    """Each lane's entries, in order. The lanes are in order, too.

    path     a recording of the journal topic by `stream record`, with partitions in any order; or entries, one per line
    Errors   InputError if the file cannot be read, contains anything else, or has no entry.
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
            raise InputError(f'The entries of lane {entry.lane} are in more than one topic partition, so their order '
                             'is unknown.', 'record only the journal topic, and never change its number of '
                             'partitions.')
        journal.setdefault(entry.lane, []).append(entry)
    if not journal:
        raise InputError(f'{path} has no journal entry.', 'name a recording of the journal topic (setting '
                                                          'journal_topic).')
    return dict(sorted(journal.items()))


def described(journal: Journal, topics: tuple[str, str], with_users: bool = False) -> Iterator[str]:
    """The journal as lines of text: a heading, then one line per entry, lane by lane.

    with_users   list all users of an entry instead of only the first ones
    """
    yield f'{"lane":>5} {"step":>9}  {"cause":<40} {"took effect":<14} {"model":<{DIGITS_SHOWN}} users'
    for lane, entries in journal.items():
        counted = {id(entry): kept for entry, kept in steps_of(entries)}
        for entry in entries:
            effect = model = users = ''
            if isinstance(entry, RecoveredEntry):
                cause = 'take-over, newest step found'
            else:
                model = entry.model[:DIGITS_SHOWN]
                effect = _effect(counted[id(entry)]) if id(entry) in counted else 'nothing'
                cause = (f'{len(entry.users)} timers' if isinstance(entry, TimersEntry)
                         else f'{topics[entry.source]} [{entry.start}, {entry.stop})')
            if not isinstance(entry, EventsEntry):
                users = 'all users of the step' if entry.users is None else _shown(entry.users, with_users)
            yield f'{lane:>5} {entry.step:>9}  {cause:<40} {effect:<14} {model:<{DIGITS_SHOWN}} {users}'.rstrip()


def _effect(kept: Kept | None) -> str:
    return 'all' if kept is None else f'to step {kept.step}'


def _shown(users: Sequence[str], all_of_them: bool) -> str:
    if all_of_them or len(users) <= _USERS_SHOWN:
        return ' '.join(users)
    return f'{" ".join(users[:_USERS_SHOWN])} and {len(users) - _USERS_SHOWN} more'
