"""Each step by hand-made lines; and that only what is learned changes, by what was known and by the training users."""
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from stream.cli.main import app
from stream.core.events import EventRules, EventType
from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn.clean import STEPS, clean, in_words, outliers, steps_named
from stream.learn.dataset import ExampleOptions, History, SnapshotKind, history_of, outcomes, read, sample
from tests.learn.test_dataset import at, decoded, line

FOREVER_MS = 1 << 60


def history(*values: bytes) -> History:
    return read(values, EventRules())


def told(before: History, *steps: str) -> tuple[list[list[tuple]], dict]:
    """Type and amount of what is left of each user, and what the last step took away."""
    cleaned = clean(before, range(len(before.user_ids)), steps, FOREVER_MS)
    return [[(event.type, event.amount) for event in events] for events in cleaned.history.events], cleaned.removed[-1]


BUY, BACK, LOOK = EventType.PURCHASE, EventType.REFUND, EventType.VIEW


def test_of_equal_lines_one_counts():
    same = {'item_id': 'cup', 'price': 3, 'quantity': 2, 'order_id': 'o1'}
    before = history(
        line(1, 0, 'purchase', **same), line(2, 0, 'purchase', **same),     # two ids, one content
        line(2, 0, 'purchase', **same),                                     # the second of them once more
        line(3, 0, 'purchase', **same | {'price': 4}), line(4, 1, 'purchase', **same),
        line(5, 0, 'purchase', **same, user='bob'),
        line(6, 2, 'view', item_id='cup'), line(7, 2, 'view', item_id='cup'))
    left, removed = told(before, 'duplicates')
    assert left == [[(BUY, 6), (BUY, 8), (BUY, 6), (LOOK, 0), (LOOK, 0)], [(BUY, 6)]]
    assert (removed['users'], removed['money_share']) == (1, pytest.approx(removed['money'] / (6 * 5 + 8)))


def test_a_refund_goes_with_its_purchase():
    before = history(
        line(1, 0, 'purchase', item_id='cup', price=3), line(2, 1, 'purchase', item_id='cup', price=3),
        line(3, 2, 'refund', item_id='cup', price=3),                       # takes back that of day 1
        line(4, 3, 'refund', item_id='pot', price=9),                       # its purchase was never seen
        line(5, 4, 'purchase', item_id='pot', price=9),                     # came later
        line(6, 5, 'purchase', item_id='tea', price=8), line(7, 6, 'refund', item_id='tea', price=4),   # a part of it
        line(8, 7, 'purchase', price=5), line(9, 8, 'refund', price=5),     # of no item: nobody knows
        line(10, 9, 'refund', item_id='cup', price=3, user='bob'))
    cleaned = clean(before, [0, 1], ['cancellations'], FOREVER_MS)
    assert [[event.ts_ms for event in events] for events in cleaned.history.events] == [
        [at(day) for day in (0, 3, 4, 5, 6, 7, 8)], [at(9)]]
    assert {name: cleaned.removed[0][name] for name in ('lines', 'users', 'money')} == {
        'lines': 2, 'users': 1, 'money': 6}
    assert outcomes(cleaned.history.events[0], [(SnapshotKind.CUTOFF, at(1))], FOREVER_MS)[0, 0] == 0
    assert outcomes(before.events[0], [(SnapshotKind.CUTOFF, at(1))], FOREVER_MS)[0, 0] == 1


def test_a_refund_that_is_read_twice_takes_back_one_purchase():
    before = history(*(line(number, number, 'purchase', item_id='cup', price=3) for number in (1, 2)),
                     *[line(3, 3, 'refund', item_id='cup', price=3)] * 2)
    assert told(before, 'cancellations')[0] == [[(BUY, 3)]]


def test_amounts_beyond_the_bound_are_cut_to_it():
    prices = [1, 2, 4, 8, 16]           # logs with a median of log 4, a median distance of log 2
    before = history(*(line(number, number, 'purchase', price=price) for number, price in enumerate(prices)),
                     line(9, 9, 'purchase', price=1e6, user='bob'), line(10, 10, 'refund', price=1e6))
    after, _, removed = outliers(before, [0])
    bound = 4 * 2 ** (3.5 / 0.6745)
    assert [event.amount for event in after.events[0]] == pytest.approx([*prices, bound])
    assert after.events[1][0].amount == 1e6 and before.events[0][-1].amount == 1e6     # who teaches nothing, the given
    assert (removed.lines, removed.users, removed.money) == (1, 1, pytest.approx(1e6 - bound))
    assert f'{bound:,.2f}' in in_words(vars(removed))


def test_nobody_learns_from_wholesalers():
    usual = [line(number, 0, 'purchase', user=f'user {number}', price=2.0 ** (number % 5)) for number in range(25)]
    lines = [line(100 * number + more, more, 'purchase', user=f'user {number}', price=0.01)
             for number in range(25) for more in range(number % 4)]
    rich = line(9000, 1, 'purchase', user='rich', price=1e6)
    busy = [line(9001 + more, 1, 'purchase', user='busy', price=0.001) for more in range(400)]
    before = history(*usual, *lines, rich, *busy)
    cleaned = clean(before, range(len(before.user_ids)), ['wholesalers'], FOREVER_MS)
    assert {before.user_ids[user] for user in set(range(len(before.user_ids))) - set(cleaned.users)} == {'rich', 'busy'}
    assert cleaned.removed[0]['users'] == 2
    assert 'of spend or' in cleaned.removed[0]['bound']
    rich_alone = [before.user_ids.index('rich')]
    assert clean(before, rich_alone, ['wholesalers'], FOREVER_MS).users == rich_alone   # others set no bound


def test_what_is_not_known_yet_changes_nothing():
    lines = [line(1, 0, 'purchase', item_id='cup', price=3), line(2, 9, 'refund', item_id='cup', price=3)]
    assert clean(history(*lines), [0], ['cancellations'], at(9)).removed[0]['lines'] == 0
    assert clean(history(*lines), [0], ['cancellations'], at(9) + 1).removed[0]['lines'] == 2


def test_windows_are_as_recorded_and_labels_are_cleaned(lines):
    noisy = read(lines, EventRules())
    again = [event for event in decoded(lines) if event.type == BUY]
    for event in again:
        event.key ^= 1 << 40        # every purchase a second time, in another event
    doubled = history_of({user_id: sorted([*events, *(event for event in again if event.user_id == user_id)],
                                          key=lambda event: event.ts_ms)
                          for user_id, events in zip(noisy.user_ids, noisy.events, strict=True)})
    users, until_ms = range(len(doubled.user_ids)), doubled.end_ms
    cleaned = clean(doubled, users, ['duplicates'], until_ms)
    drawn = (doubled.start_ms, until_ms, ExampleOptions(3, 0), WindowLimits(), 3)
    raw, mine = sample(doubled, users, *drawn), sample(doubled, users, *drawn, told=cleaned.history)
    assert raw.snapshots.rows.tobytes() == mine.snapshots.rows.tobytes()
    assert raw.snapshots.headers.tobytes() == mine.snapshots.headers.tobytes()
    single = sample(noisy, users, *drawn)
    np.testing.assert_array_equal(mine.labels.bought, single.labels.bought)
    np.testing.assert_allclose(mine.labels.spend, single.labels.spend)
    assert np.nansum(raw.labels.spend) > 1.3 * np.nansum(mine.labels.spend)


def test_steps_by_name():
    assert steps_named('') == ()
    assert steps_named('wholesalers, duplicates') == ('duplicates', 'wholesalers')
    with pytest.raises(UsageError, match=r'dirt is not a cleaning step.*duplicates'):
        steps_named('duplicates,dirt')


def test_a_training_says_what_was_cleaned(tiny_options, tmp_path):
    from stream.learn.export import export
    from stream.learn.train import train

    options = tiny_options()
    train(replace(options, fit=replace(options.fit, clean=tuple(STEPS))), tmp_path / 'checkpoint')
    card = (export(tmp_path / 'checkpoint', tmp_path / 'models').parent / 'README.md').read_text()
    assert 'The examples to learn from were cleaned' in card and all(f'{step}: ' in card for step in STEPS)


def test_the_commands_refuse_what_is_no_step(lines, tmp_path):
    pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')
    path = tmp_path / 'events.jsonl'
    path.write_bytes(b'\n'.join(lines))
    for command in ('train', 'compare'):
        done = CliRunner().invoke(app, [command, str(path), '--clean', 'dirt', '--out', str(tmp_path / 'out')])
        assert isinstance(done.exception, UsageError) and 'dirt is not a cleaning step' in str(done.exception)
