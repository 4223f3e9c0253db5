"""`stream evaluate`: a served model judged as of cut-offs: nothing of the future in it, no torch, no training."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from stream.cli.main import app
from stream.core.events import EventRules
from stream.core.layout import DAY_MS
from stream.errors import ModelError, UsageError
from stream.learn.dataset import read
from stream.learn.inference import score
from stream.learn.judging import backtest as backtesting
from stream.learn.judging.backtest import SEEN, UNKNOWN, UNSEEN, BacktestOptions, backtest, learned
from stream.learn.judging.judge import LIKELIEST, MODEL, PAST_TIER, TYPICAL
from stream.learn.judging.quality import auc
from stream.learn.judging.report import doubts, evaluation_page
from stream.learn.judging.tasks import Cutoff, default_cutoffs, truth_of
from stream.scoring.artefact import load_artefact

SHIPPED = Path(__file__).parents[3] / 'triton_models' / 'shopper' / '1'
OPTIONS = BacktestOptions(seed=3, threshold=0.3, resamples=30)


@pytest.fixture(scope='module')
def cut_ms(history) -> int:
    return default_cutoffs(history)[0]


@pytest.fixture(scope='module')
def figures(history, cut_ms) -> dict:
    return backtest(history, [cut_ms], SHIPPED, OPTIONS, lambda line: None)


def asked(figures: dict, name: str) -> dict:
    return next(task for task in figures['cutoffs'][0]['tasks'] if task['name'] == name)


def test_figures_are_those_of_the_served_graph(history, cut_ms, figures):
    cutoff = Cutoff.of(history, cut_ms, OPTIONS.limits)
    manifest = load_artefact(SHIPPED).manifest
    purchase = score(SHIPPED / 'model.onnx', cutoff.asked.inputs)['purchase'].astype(float)
    assert len(cutoff.tasks) == len(figures['cutoffs'][0]['tasks']) > 2
    for task in cutoff.tasks:
        truth, found = truth_of(cutoff.asked, task), asked(figures, task.name)
        rows = ~np.isnan(truth)
        chances = purchase[rows, manifest.horizon_days.index(found['days'])]
        chances = 1 - chances if task.churn else chances
        assert found['contenders'][MODEL]['metrics']['auc'][0] == pytest.approx(auc(chances, truth[rows]))
        at = found['thresholds'][MODEL]['stated']
        assert (at['threshold'], at['true_positive']) == (0.3, ((chances >= 0.3) & (truth[rows] == 1)).sum())


def test_every_metric_has_an_interval_and_every_rule_is_there(figures):
    month = asked(figures, 'purchase_30d')
    assert set(month['contenders']) == {MODEL, 'recency rule', 'past rate', 'past spend', 'spend of 90 days'}
    assert month['best_reference'] in month['contenders'] and month['best_reference'] != MODEL
    cutoff = figures['cutoffs'][0]
    spend, = cutoff['spend']
    assert (spend['days'], spend['error_ratio']) == (90, {})
    assert set(spend['contenders']) == {MODEL, TYPICAL, LIKELIEST, 'past spend', 'spend of 90 days'}
    assert set(cutoff['tier']['contenders']) == {MODEL, PAST_TIER}
    judged = [month['contenders'][MODEL]['metrics'], spend['contenders'][MODEL]['metrics'],
              {name: month['thresholds'][MODEL]['stated'][name] for name in ('accuracy', 'precision', 'recall', 'f1')}]
    assert {'auc', 'pr_auc', 'log_loss', 'ece', 'top_decile_lift'} <= set(judged[0])
    assert {'mean_absolute_error', 'spearman'} <= set(judged[1])
    for metrics in judged:
        for name, (value, low, high) in metrics.items():
            assert low <= high and np.isfinite(value), name
    assert len(month['segments']) > 3 and month['curves'][MODEL]['lift'][0]


def test_what_comes_after_changes_no_score_but_the_answers(history, cut_ms, figures):
    """The same scores of a recording in which nobody buys any more: the answers are all no, and nothing is asked."""
    quiet = replace(history, events=[[event for event in events if event.ts_ms < cut_ms or event.type != 12]
                                     for events in history.events])
    seen, blind = (Cutoff.of(recording, cut_ms, OPTIONS.limits).asked.inputs for recording in (history, quiet))
    np.testing.assert_array_equal(seen.counters, blind.counters)
    np.testing.assert_array_equal(seen.numbers, blind.numbers)
    assert backtest(quiet, [cut_ms], SHIPPED, OPTIONS, lambda line: None)['cutoffs'][0]['tasks'] == []


def test_without_prices_nothing_is_said_of_money(lines, cut_ms):
    bare = read([orjson.dumps({name: value for name, value in orjson.loads(line).items() if name != 'price'})
                 for line in lines], EventRules())
    cutoff, = backtest(bare, [cut_ms], SHIPPED, OPTIONS, lambda line: None)['cutoffs']
    assert cutoff['spend'] == [] and cutoff['tier'] is None
    assert {*cutoff['tasks'][0]['contenders']} == {MODEL, 'recency rule', 'past rate'}


def test_a_horizon_that_the_model_does_not_tell_is_not_asked(history, cut_ms, monkeypatch):
    artefact = load_artefact(SHIPPED)

    def of(*days: int):
        return msgspec.structs.replace(artefact, manifest=msgspec.structs.replace(artefact.manifest, horizon_days=days))

    monkeypatch.setattr(backtesting, 'load_artefact', lambda version_dir: of(1, 7, 30))
    cutoff, = backtest(history, [cut_ms], SHIPPED, OPTIONS, lambda line: None)['cutoffs']
    assert all(task['days'] <= 30 for task in cutoff['tasks'])
    assert 'the model does not tell it' in {skip['reason'] for skip in cutoff['skipped']}
    monkeypatch.setattr(backtesting, 'load_artefact', lambda version_dir: of(2, 5))
    with pytest.raises(ModelError, match='within'):
        backtest(history, [cut_ms], SHIPPED, OPTIONS, lambda line: None)


# ---- what the model has learned from --------------------------------------------------------------------------------

def test_a_model_that_has_learned_from_later_days_is_told(figures, cut_ms):
    manifest = load_artefact(SHIPPED).manifest
    known = {until: learned(msgspec.structs.replace(manifest, known_until_ms=until), cut_ms)
             for until in (0, cut_ms, cut_ms + 1)}
    assert known == {0: UNKNOWN, cut_ms: UNSEEN, cut_ms + 1: SEEN}

    def told(answer: str, until_ms: int | None) -> list[str]:
        return doubts({'model': {'known_until_ms': until_ms}, 'cutoffs': [
            figures['cutoffs'][0] | {'learned': answer}]})

    assert told(UNSEEN, cut_ms) == []
    assert 'too good' in told(UNKNOWN, None)[0]
    assert 'knows answers' in told(SEEN, cut_ms + DAY_MS)[0]


def test_a_new_model_says_up_to_when_it_has_learned(checkpoint, history, cut_ms, tmp_path):
    from stream.learn.export import export

    version_dir = export(checkpoint, tmp_path)
    manifest = load_artefact(version_dir).manifest
    assert manifest.known_until_ms == history.end_ms + 1 and learned(manifest, cut_ms) == SEEN


# ---- the page and the command ---------------------------------------------------------------------------------------

def test_the_page_says_what_the_figures_say(figures):
    about = {'sources': ['<b>'], 'format': 'events', 'currency': 'EUR', 'warnings': ['Mind the gap.']}
    html = evaluation_page({'about': about} | figures)
    assert html == evaluation_page(orjson.loads(orjson.dumps({'about': about} | figures)))
    for words in ('Evaluation report', 'Mind the gap.', 'too good', 'Best rule', 'recency rule', '&lt;b&gt;',
                  'Tier of spend', f'{asked(figures, "purchase_30d")["contenders"][MODEL]["metrics"]["auc"][0]:.3f}'):
        assert words in html, words
    assert '<script' not in html and 'How training went' not in html and 'Comparison report' not in html


@pytest.fixture
def recording(lines, tmp_path) -> Path:
    path = tmp_path / 'events.jsonl'
    path.write_bytes(b'\n'.join(lines) + b'\n')
    return path


def test_the_command_needs_no_training_libraries(recording, tmp_path):
    """A whole run: files, table, warning, without torch, scikit-learn, SciPy or LightGBM."""
    out = tmp_path / 'there'
    program = ('import sys\n'
               "for name in ('torch', 'sklearn', 'scipy', 'lightgbm', 'transformers'): sys.modules[name] = None\n"
               'from stream.cli.main import main\n'
               f"sys.argv = ['stream', 'evaluate', {str(recording)!r}, '--at', '2025-05-30', '--threshold', '0.4', "
               f"'--out', {str(out)!r}]\nmain()")
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / 'figures.json').read_bytes())
    assert found['protocol']['threshold'] == 0.4 and found['model']['name'] == 'shopper'
    assert '<html' in (out / 'index.html').read_text()
    month = asked(found, 'purchase_30d')
    assert f'{month["contenders"][MODEL]["metrics"]["auc"][0]:.3f}' in done.stdout and 'recency rule' in done.stdout
    assert 'warning: ' in done.stderr and 'it knows answers' in done.stderr


def test_another_currency_is_warned_of(tmp_path):
    rows = ['InvoiceNo,StockCode,Quantity,InvoiceDate,UnitPrice,CustomerID']
    rows += [f'{user}{day},cup,1,2011-{1 + day // 28:02d}-{1 + day % 28:02d} 10:00,{1 + user % 7},{user}'
             for user in range(100, 160) for day in range(user % 5, 250, 11 + user % 60)]
    path = tmp_path / 'shop.csv'
    path.write_text('\n'.join(rows))
    done = CliRunner().invoke(app, ['evaluate', str(path), '--format', 'online-retail', '--at', '2011-06-01', '--out',
                                    str(tmp_path / 'out')])
    assert done.exit_code == 0, done.output
    assert 'these are in GBP' in done.stderr
    assert json.loads((tmp_path / 'out' / 'figures.json').read_bytes())['about']['currency'] == 'GBP'


def test_the_command_says_what_is_wrong(recording, tmp_path):
    (tmp_path / 'taken').touch()
    for arguments, error, words in ((('--out', str(tmp_path / 'taken')), UsageError, 'is a file'),
                                    (('--at', 'yesterday'), UsageError, 'yesterday is not a time'),
                                    (('--model', str(tmp_path)), UsageError, 'is not a model version'),
                                    (('--at', '2031-01-01'), UsageError, 'nothing to learn from')):
        done = CliRunner().invoke(app, ['evaluate', str(recording), *arguments])
        assert isinstance(done.exception, error) and words in str(done.exception)
