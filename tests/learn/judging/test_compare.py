"""The protocol: who is taught by whom, and that nothing of the future or of the judged gets in."""
from dataclasses import replace

import numpy as np
import orjson
import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from typer.testing import CliRunner

from stream.cli.main import app
from stream.core.events import EventRules
from stream.core.layout import DAY_MS
from stream.errors import ModelError, UsageError
from stream.learn.backbones import EncoderOptions
from stream.learn.dataset import HORIZON_DAYS, SPEND, ExampleOptions, History, history_of, part_of, read
from stream.learn.fit import FitOptions
from stream.learn.judging import compare as comparing
from stream.learn.judging.compare import CompareOptions, FoldScores, compare, fold_of, score_fold
from stream.learn.judging.judge import (
    BOUGHT,
    COMMONEST,
    COUNTERS,
    LIKELIEST,
    MODEL,
    OWN,
    PAST_TIER,
    POPULAR,
    RECENT,
    SASREC,
    TYPICAL,
    WINDOW,
)
from stream.learn.judging.ranking import ASKED_MIN
from stream.learn.judging.report import CONTENDERS, comparison_page, difference, interval, question
from stream.learn.judging.sasrec import SasRecOptions
from stream.learn.judging.tasks import Task, day_of, default_cutoffs
from tests.outline import Outline

FIT = FitOptions(encoder=EncoderOptions(hidden=16, layers=1, heads=2, intermediate=32), epochs=2, rows_per_epoch=100,
                 examples=ExampleOptions(90, 1))
OPTIONS = CompareOptions(seed=3, folds=2, resamples=30, fit=FIT,
                         sasrec=SasRecOptions(hidden=8, blocks=1, length=8, epochs=2))
TASKS = [Task(HORIZON_DAYS.index(30)), Task(HORIZON_DAYS.index(90), churn=True)]
LONGEST = HORIZON_DAYS.index(273)
NASTY = '''<script>alert("1")</script>'&amp;'''


def ms(day: str) -> int:
    return int(np.datetime64(day, 'ms').astype(np.int64))


@pytest.fixture(scope='module')
def cut_ms(history) -> int:
    return default_cutoffs(history)[0]


@pytest.fixture(scope='module')
def first_part(history, cut_ms) -> FoldScores:
    """Predictions in this process."""
    return score_fold(history, cut_ms, 0, TASKS, OPTIONS)


@pytest.fixture(scope='module')
def figures(history, cut_ms) -> dict:
    """Of one cut-off, in this process."""
    said = []
    found = compare(history, [cut_ms], OPTIONS, said.append)
    assert [line.split(':')[0] for line in said[:2]] == [f'{day_of(cut_ms)}, part {part} of 2' for part in (1, 2)]
    return found


def test_next_items_and_categories_are_ranked_beside_the_others(figures):
    ranking = figures['cutoffs'][0]['ranking']
    assert [(part['column'], part['days']) for part in ranking] == [('item', 30), ('category', 30)]
    for part in ranking:
        assert list(part['contenders']) == [MODEL, POPULAR, RECENT, OWN, BOUGHT, SASREC] and part['rows'] >= ASKED_MIN
        for scored in part['contenders'].values():
            for value, low, high in scored['metrics'].values():
                assert 0 <= low <= value <= high <= 1
    page = comparison_page({'about': {'sources': ['a'], 'format': 'events', 'currency': 'EUR'}} | figures)
    assert 'Next items, within 30 days' in page and 'Next categories, within 30 days' in page and 'SASRec' in page


# ---- who is taught by whom ------------------------------------------------------------------------------------------

def test_folds_cut_the_users_and_leave_each_training_its_validation_users():
    users = [f'user {number}' for number in range(6000)]
    options = replace(OPTIONS, folds=3)
    parts = np.array([fold_of(user, options) for user in users])
    assert (abs(np.bincount(parts, minlength=3) - 2000) < 150).all()
    validation = np.array([part_of(user, (0.15,), options.seed) == 0 for user in users])
    for part in range(3):
        assert 0.12 < validation[parts != part].mean() < 0.18


def test_everybody_is_scored_once(history, cut_ms, first_part):
    found = [first_part, score_fold(history, cut_ms, 1, TASKS, OPTIONS)]
    users = np.concatenate([scores.user for scores in found])
    seen = [user for user, events in enumerate(history.events) if events[0].ts_ms < cut_ms]
    assert sorted(users.tolist()) == seen
    for part, scores in enumerate(found):
        assert {fold_of(history.user_ids[user], OPTIONS) for user in scores.user} == {part}
        assert all(len(scored.scores) == len(scores.user) for scored in scores.chances['purchase_30d'].values())


def test_neither_the_future_nor_the_judged_teach(history, cut_ms, first_part):
    """What comes after the cut-off is taken away, and what the judged did before it: the training is the same. What is
    foretold of the judged is the same without the future, too."""
    def scored(changed: History):
        return score_fold(changed, cut_ms, 0, TASKS, OPTIONS)

    whole = first_part
    blind = scored(replace(history.before(cut_ms), end_ms=history.end_ms))
    ids = [[changed.user_ids[user] for user in scores.user] for changed, scores in
           ((history, whole), (history.before(cut_ms), blind))]
    assert ids[0] == ids[1]
    assert whole.training == blind.training
    for task, by_name in whole.chances.items():
        for name, scores in by_name.items():
            assert np.array_equal(scores.scores, blind.chances[task][name].scores), name
    assert whole.spend.keys() == blind.spend.keys() == {SPEND}
    assert np.array_equal(whole.spend[SPEND][MODEL], blind.spend[SPEND][MODEL])
    assert not np.array_equal(whole.tier, blind.tier)       # the answers, of course, are not

    others = {user_id: events if fold_of(user_id, OPTIONS) else events[:1]
              for user_id, events in zip(history.user_ids, history.events, strict=True)}
    assert scored(history_of(others)).training == whole.training


def test_a_horizon_that_is_not_settled_is_told_from_the_longest_that_is(history, cut_ms):
    tasks = [Task(HORIZON_DAYS.index(days)) for days in (7, 90, 273)]
    chances = score_fold(history, cut_ms, 0, tasks, OPTIONS).chances
    assert chances['purchase_7d']['logistic regression'].is_chance
    far = chances['purchase_273d']
    assert not far['logistic regression'].is_chance
    assert far['BG/NBD'].is_chance
    assert far[MODEL].is_chance
    assert (far[MODEL].scores >= chances['purchase_90d'][MODEL].scores).all()
    assert (far['BG/NBD'].scores[far['BG/NBD'].scores > 0] <= 1).all()


def test_spend_of_39_weeks_is_told_by_what_learned_90_days(history, cut_ms):
    """As of a day that has 273 days to come, and fewer before."""
    longer = replace(history, end_ms=cut_ms + 273 * DAY_MS)
    scores = score_fold(longer, cut_ms, 0, [Task(LONGEST)], OPTIONS)
    assert list(scores.spend) == [SPEND, LONGEST]
    near, far = scores.spend[SPEND], scores.spend[LONGEST]
    assert near.keys() == far.keys() and {MODEL, TYPICAL, LIKELIEST, 'LightGBM', 'BG/NBD + Gamma-Gamma'} <= near.keys()
    for name in ('LightGBM', 'MLP regression', 'spend of 90 days'):
        assert far[name] == pytest.approx(273 / 90 * near[name]), name
    assert (far[MODEL] > near[MODEL]).all() and (far[MODEL] <= 273 / 90 * 1.001 * near[MODEL]).all()
    assert np.array_equal(far[LIKELIEST], scores.chances['purchase_273d'][MODEL].scores)


# ---- figures --------------------------------------------------------------------------------------------------------

def test_figures_are_there_of_everybody(figures):
    cutoff = figures['cutoffs'][0]
    for task in cutoff['tasks']:
        assert {MODEL, WINDOW, COUNTERS, 'BG/NBD', 'logistic regression', 'LightGBM', 'recency rule',
                'past spend'} <= set(task['contenders'])
        assert set(task['contenders']) <= set(CONTENDERS)
    month = next(task for task in cutoff['tasks'] if task['name'] == 'purchase_30d')
    assert month['contenders']['logistic regression']['metrics']['auc'][0] > 0.6     # shoppers differ, and it shows
    spend, = cutoff['spend']        # 273 days are not settled
    assert spend['days'] == 90
    assert {MODEL, TYPICAL, LIKELIEST, 'BG/NBD + Gamma-Gamma', 'LightGBM'} < set(spend['contenders']) <= set(CONTENDERS)
    assert spend['error_ratio'].keys() == {MODEL, TYPICAL}
    assert set(cutoff['tier']['contenders']) == {MODEL, COMMONEST, PAST_TIER, 'logistic regression'}
    assert np.sum(cutoff['tier']['confusion']) == cutoff['tier']['rows'] == cutoff['users']
    assert [len(part['epochs']) for part in cutoff['training']] == [2, 2]
    assert set(cutoff['training'][0]['network']) <= {task['name'] for task in cutoff['tasks']} != set()


def test_without_prices_nothing_is_said_of_money(lines, cut_ms):
    bare = [orjson.dumps({name: value for name, value in orjson.loads(line).items() if name != 'price'})
            for line in lines]
    found = score_fold(read(bare, EventRules()), cut_ms, 0, [Task(2)], OPTIONS)
    assert (found.spend, found.tiers) == ({}, {})
    assert not {'past spend', 'spend of 90 days'} & set(found.chances['purchase_30d'])


def test_another_process_gives_the_same(history, cut_ms, first_part):
    with comparing.runner(2) as run:
        again, = run(score_fold, [(history, cut_ms, 0, TASKS, OPTIONS)])
    assert again.training == first_part.training
    assert again.chances.keys() == first_part.chances.keys() and again.left_out == first_part.left_out

    def all_scores(part: FoldScores) -> dict[tuple[str, str], np.ndarray]:
        answers = {'spend': part.spend[SPEND]} | {task: {name: scored.scores for name, scored in by_name.items()}
                                           for task, by_name in (*part.chances.items(), ('tier', part.tiers))}
        return {(task, name): scores for task, by_name in answers.items() for name, scores in by_name.items()}

    mine, theirs = all_scores(again), all_scores(first_part)
    assert mine.keys() == theirs.keys() and {task for task, _ in mine} == {
        'spend', 'tier', *(task.name for task in TASKS)}
    for place, scores in mine.items():
        assert np.array_equal(scores, theirs[place]), place


def test_answers_come_in_the_order_of_the_jobs():
    with comparing.runner(2) as run:
        assert list(run(divmod, [(number, 7) for number in range(40)])) == [divmod(number, 7) for number in range(40)]


# ---- the page -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def told(figures) -> dict:
    return {'about': {'sources': [NASTY], 'format': 'events', 'currency': 'EUR'}} | figures


@pytest.fixture(scope='module')
def html(told) -> str:
    return comparison_page(told)


def test_the_page_says_what_the_figures_say(told, html, cut_ms):
    page = Outline(html)
    assert page.open == []
    for words in (f'As of {day_of(cut_ms)}', 'A user buys within 30 days', 'A user buys nothing within 90 days', 'EUR',
                  'Spend within 90 days', 'Tier of spend in 90 days', 'the recording ends before it is settled'):
        assert words in page.text
    for task in told['cutoffs'][0]['tasks']:
        value, bounds = interval(task['contenders'][MODEL]['metrics']['auc'])
        assert f'{value}{bounds}' in page.text
        assert ''.join(difference(task['contenders'][task['best_reference']]['model_less']['auc'])) in page.text


def test_the_page_says_what_was_cleaned(told, html):
    assert 'cleaned' not in html
    removed = {'step': 'duplicates', 'lines': 7, 'users': 2, 'money': 3.5, 'money_share': 0.012, 'bound': ''}
    cutoff, = told['cutoffs']
    first, *others = cutoff['training']
    page = Outline(comparison_page(told | {
        'protocol': told['protocol'] | {'cleaning': ['duplicates']},
        'cutoffs': [cutoff | {'tasks': [], 'training': [first | {'removed': [removed]}, *others]}]}))
    assert 'What everybody learns from was cleaned first (duplicates)' in page.text
    assert 'what part 1 learned from: duplicates: 7 lines of 2 training users, 1.2% of their money.' in page.text


def test_the_page_needs_nothing_and_runs_nothing(told, html):
    page = Outline(html)
    assert NASTY in page.text
    assert not {'script', 'link', 'img', 'iframe', 'object', 'image'} & {tag for tag, _ in page.tags}
    assert all(attributes.get(name, '#').startswith('#') for _, attributes in page.tags
               for name in ('href', 'xlink:href', 'src'))
    plots = [attributes for tag, attributes in page.tags if tag == 'svg' and 'plot' in attributes.get('class', '')]
    assert len(plots) == 5 * len(told['cutoffs'][0]['tasks']) + 2 + 2
    assert all(plot['aria-label'] for plot in plots)
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_is_made_of_the_written_figures_and_the_same_each_time(told, html):
    assert comparison_page(orjson.loads(orjson.dumps(told))) == html


def test_words_of_figures():
    assert interval([0.8412, 0.8, float('nan')]) == ('0.841', '0.800 to –')
    assert difference([0.0123, -0.0002, 0.025]) == ('+0.012', '0.000 to +0.025')
    assert difference([-0.5, None, 0]) == ('−0.500', '– to 0.000')
    assert question({'days': 273, 'churn': False}) == 'buys within 273 days (39 weeks)'
    assert question({'days': 1, 'churn': False}) == 'buys within 1 day'
    assert question({'days': 90, 'churn': True}) == 'buys nothing within 90 days'


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture
def run(lines, tmp_path, monkeypatch, figures):
    """`stream compare` in a folder, with figures that are there already."""
    asked = []

    def made(history, cutoffs_ms, options, say):
        asked.append((len(history), cutoffs_ms, options))
        return figures

    monkeypatch.setattr(comparing, 'compare', made)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'events.jsonl').write_bytes(b'\n'.join(lines))

    def run(*arguments):
        return CliRunner().invoke(app, ['compare', 'events.jsonl', *arguments]), asked

    return run


def test_the_command_writes_the_page_and_the_figures(run, tmp_path, lines, cut_ms, figures):
    done, asked = run('--folds', '4', '--seed', '11', '--clean', 'outliers', '--at', '2024-05-06', '--at', '2024-04-01',
                      '--fit', 'hidden=32', '--pretrain', 'next', '--fit', 'pretrain.epochs=4', '--out', 'there')
    assert done.exit_code == 0, done.output
    (events, cutoffs, options), = asked
    assert (events, cutoffs) == (len(lines), [ms('2024-04-01'), ms('2024-05-06')])
    assert (options.folds, options.seed, options.fit.clean) == (4, 11, ('outliers',))
    assert options.fit.encoder.hidden == 32 and options.fit.epochs == FitOptions().epochs
    assert (list(options.fit.pretrain.objectives), options.fit.pretrain.epochs) == (['next'], 4)
    assert '<html' in (tmp_path / 'there' / 'index.html').read_text()
    kept = orjson.loads((tmp_path / 'there' / 'figures.json').read_bytes())
    assert kept['about']['sources'] == ['events.jsonl']
    assert kept['cutoffs'] == orjson.loads(orjson.dumps(figures['cutoffs']))
    assert 'buys within 30 days' in done.stdout
    assert interval(figures['cutoffs'][0]['tasks'][0]['contenders'][MODEL]['metrics']['auc'])[0] in done.stdout
    spend, = figures['cutoffs'][0]['spend']
    assert interval(spend['error_ratio'][TYPICAL])[0] in done.stdout and LIKELIEST in done.stdout


def test_a_backbone_that_cannot_be_is_told_before_hours_of_work(run):
    done, compared = run('--backbone', 'lstm')
    assert isinstance(done.exception, UsageError) and "no backbone 'lstm'" in str(done.exception) and not compared


def test_the_command_shows_what_another_shop_brings(run, tmp_path, monkeypatch, checkpoint, cut_ms):
    asked = []

    def curve(history, at_ms, source, options, say):
        asked.append((at_ms, source, options))
        return {'source': 'another', 'at_ms': at_ms, 'shares': [], 'tasks': []}

    monkeypatch.setattr('stream.learn.judging.transfer.transfer', curve)
    done, compared = run('--pretrained-on', str(checkpoint))
    assert isinstance(done.exception, ModelError) and not compared      # other sizes, seen before hours of work
    monkeypatch.setattr('stream.learn.judging.transfer.check_source', lambda source, options: None)
    done, compared = run('--pretrained-on', str(checkpoint), '--out', 'there')
    assert done.exit_code == 0, done.output
    assert asked == [(compared[0][1][0], checkpoint, compared[0][2])]
    assert orjson.loads((tmp_path / 'there' / 'figures.json').read_bytes())['transfer']['source'] == 'another'
    assert 'What another shop' in (tmp_path / 'there' / 'index.html').read_text()


def test_the_command_finds_its_cutoffs(run, cut_ms):
    _, asked = run()
    assert asked[0][1][0] == cut_ms


def test_the_command_says_what_is_wrong(run, tmp_path):
    (tmp_path / 'taken').touch()
    for arguments, words in ((('--at', 'yesterday'), 'yesterday is not a time'), (('--out', 'taken'), 'is a file')):
        done, asked = run(*arguments)
        assert isinstance(done.exception, UsageError)
        assert words in str(done.exception)
        assert not asked
