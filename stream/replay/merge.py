"""Puts the results of all shards of a run together, in the steps and in the order of a replay with one process.

A user's timers and events do not depend on other users. Only three things do, and they are decided here:

    which step a timer is in   A sweep fires the due timers of all users of the run, and of at most `users_max` other
                               users: those with the earliest timers. So a shard's sweeps hold other timers than those
                               of the whole replay, but each user's timers come in the same order
    the order in a step        after timers by due time and user id; after events by the user's first event in the run
    the reasons of a step      go to the most urgent alerts that fit into the budget
"""
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, zip_longest
from operator import attrgetter

from stream.core.reasons import Claim, within_budget
from stream.replay.shard_messages import Result, Round, Row

_place = attrgetter('at', 'user_id')
_NO_ROUND = Round()


def merged_steps(results: Sequence[Result], users_max: int) -> Iterator[list[Row]]:
    """The steps of a run, each with the rows of all shards in order. Steps without a row may be among them."""
    for shard, result in enumerate(results):
        _name(result, shard)
    for rounds in zip_longest(*(result.rounds for result in results), fillvalue=_NO_ROUND):
        silent = sweeps(list(chain.from_iterable(entry.silent for entry in rounds)), users_max)
        for fired in zip_longest(silent, *(entry.fired for entry in rounds), fillvalue=()):
            yield sorted(chain.from_iterable(fired), key=_place)
        yield sorted(chain.from_iterable(entry.folded for entry in rounds), key=_place)


def sweeps(rows: Sequence[Row], users_max: int) -> Iterator[list[Row]]:
    """Sweeps of silent users: each fires the next timer of at most `users_max` users, the earliest timers first.

    rows   of any number of users; those of one user in the order of the user's timers
    """
    by_user: dict[str, list[Row]] = {}
    for row in rows:
        by_user.setdefault(row.user_id, []).append(row)
    timers = {user_id: iter(of_user) for user_id, of_user in by_user.items()}
    due = [(row.at, row.user_id, row) for row in map(next, timers.values())]
    heapify(due)
    while due:
        sweep = [heappop(due)[2] for _ in range(min(users_max, len(due)))]
        yield sweep
        for fired in sweep:
            if (row := next(timers[fired.user_id], None)) is not None:
                heappush(due, (row.at, row.user_id, row))


def rows_to_explain(step: Sequence[Row], rows_max: int) -> list[Row]:
    """The rows of a step whose reasons fit into the budget."""
    claims = [Claim(number, row.urgency, row.variants) for number, row in enumerate(step) if row.urgency >= 0]
    return [step[number] for number in within_budget(claims, rows_max)]


def _name(result: Result, shard: int) -> None:
    for entry in result.rounds:
        for row in chain(entry.silent, entry.folded, *entry.fired):
            row.shard = shard
