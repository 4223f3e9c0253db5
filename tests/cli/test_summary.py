"""What a demo prints, in terminals of several widths."""
from collections import Counter
from pathlib import Path

import pytest

from stream.cli.shared import progress_bar
from stream.cli.summary import TABLE_COLUMNS_MIN, ReplayOutcome, print_alerts, print_seen, print_summary
from stream.replay.replay import Counts

LONG = 'viewed an item worth 38.31 just before, and then put it in the cart together with eleven others of its kind'


def alert(**fields: object) -> dict:
    return {'type': 'churn.alert', 'state': 'raised', 'user_id': 'ann', 'as_of_ms': 1_751_209_114_691, 'tier': 1,
            'scores': {'purchase_intent': 0.04, 'purchase_power': 0.12, 'churn': 0.86}, 'action': 'coupon',
            'reasons': [{'text': 'nothing for 14 days', 'effect': 0.3}, {'text': LONG, 'effect': -0.1}], **fields}


def outcome(**fields: object) -> ReplayOutcome:
    known: dict = {'counts': Counts(read=4_990, alerts=1_462), 'alerts_shown': [], 'alerts_by': Counter(),
                   'refused_scores': 0, 'trained_on': 'simulated shoppers', 'out': Path('a.jsonl'),
                   'dead_letters': Path('a.dead.jsonl'), 'report': Path('a.html'), 'seconds': 1.0}
    return ReplayOutcome(**known | fields)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def at(columns: int, function, *arguments: object) -> str:
        monkeypatch.setenv('COLUMNS', str(columns))
        function(*arguments)
        return capsys.readouterr().out
    return at


@pytest.mark.parametrize('columns', [40, 80, 100, TABLE_COLUMNS_MIN, 200])
def test_every_fact_is_shown_and_no_line_is_too_long(printed, columns):
    text = printed(columns, print_alerts, [alert()])
    assert all(len(line) <= columns for line in text.splitlines())
    for fact in ('churn.alert raised', 'ann', '2025-06-29 14:58', '0.86', 'coupon', '+ nothing for 14 days'):
        assert fact in ' '.join(text.split())
    assert all(word in text for word in LONG.split())


@pytest.mark.parametrize('columns', [80, TABLE_COLUMNS_MIN - 1])
def test_a_narrow_terminal_gets_records(printed, columns):
    lines = printed(columns, print_alerts, [alert(), alert(user_id='bob', reasons=None, action=None, tier=None)])
    first, second = lines.split('\n\n')[1:3]
    assert first.splitlines()[:4] == [
        'churn.alert raised: ann, 2025-06-29 14:58 UTC', '  score 0.86, tier 1, proposed: coupon',
        '  + nothing for 14 days', next(line for line in first.splitlines() if line.startswith('  - viewed'))]
    assert all(line.startswith('    ') for line in first.splitlines()[4:])      # the rest of a long reason
    assert second.splitlines() == ['churn.alert raised: bob, 2025-06-29 14:58 UTC', '  score 0.86, tier -']
    assert lines == '\n'.join(line.rstrip() for line in lines.split('\n'))


def test_a_wide_terminal_gets_a_table(printed):
    text = printed(TABLE_COLUMNS_MIN, print_alerts, [alert(type='purchase_power.updated', state=None, previous_tier=0)])
    row = next(line for line in text.splitlines() if 'ann' in line)
    assert [cell.strip() for cell in row.split('│')[1:-1]] == [
        '2025-06-29 14:58', 'ann', 'purchase_power.updated', '0.12', '0 to 1', '+ nothing for 14 days', 'coupon']


@pytest.mark.parametrize('columns', [80, 200])
def test_a_user_id_is_no_markup(printed, columns):
    assert '[bold]:smile:[/x]' in printed(columns, print_alerts, [alert(user_id='[bold]:smile:[/x]')])


def test_the_account_counts_in_words_that_the_guides_use(printed):
    counts = Counts(read=7, applied=2, duplicate=1, dead=4, users=1, scored=2)
    text = printed(200, print_summary, outcome(counts=counts))
    assert text.startswith('7 rows in 1.0 s: 2 applied, 1 duplicate, 0 late, 4 dead letters. '
                           '1 user, 2 scores, 0 alerts.\n')


def test_without_a_terminal_there_is_no_progress(capsys: pytest.CaptureFixture[str]):
    with progress_bar() as progress:
        progress.advance(progress.add_task('replaying', total=1))
    assert capsys.readouterr().err == ''


def test_the_first_sentence_says_what_was_seen(printed):
    by = Counter({'purchase_power.updated': 1_300, 'churn.alert raised': 1})
    assert printed(200, print_seen, 300, 180, outcome(alerts_by=by)) == (
        '300 simulated shoppers over 180 days: 4,990 events and 1,462 alerts '
        '(1,300 new spend tiers, 1 churn risk).\n\n')
    assert '0 alerts.' in printed(200, print_seen, 3, 1, outcome(counts=Counts()))


def test_a_script_finds_each_fact_of_the_summary_on_one_line(printed):
    path = Path('a folder with a rather long name/' * 4) / 'a.jsonl'
    lines = printed(40, print_summary, outcome(out=path, report=None)).splitlines()
    assert lines[0].endswith('1,462 alerts.')
    assert lines[1:] == ['scored by a model trained on simulated shoppers', f'alerts: {path}',
                         'dead letters: a.dead.jsonl']
