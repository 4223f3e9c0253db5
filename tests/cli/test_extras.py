"""The base install, without any package of an extra: what works, and what says which extra it needs.

The packages are here, so each command runs in a process that cannot import them.
"""
import gzip
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import zstandard

from stream.errors import INSTALL_REPORT, UsageError

ROOT = Path(__file__).parents[2]
MODEL = ROOT / 'triton_models' / 'shopper' / '1'
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
REPORT = ('jinja2', 'markupsafe', 'matplotlib', 'pyarrow')
TRAIN = ('lightgbm', 'onnx', 'optuna', 'peft', 'safetensors', 'scipy', 'sklearn', 'tensorboard', 'threadpoolctl',
         'torch', 'transformers')
CONSTANT = ('--scorer', 'constant')


def run(folder: Path, code: str, *arguments: str, without: tuple[str, ...] = (*REPORT, *TRAIN)):
    blocked = f'import sys; sys.modules.update(dict.fromkeys({without!r})); sys.path.insert(0, {str(ROOT)!r}); '
    return subprocess.run([sys.executable, '-c', blocked + code, *arguments], cwd=folder, capture_output=True,
                          text=True, timeout=120, check=False)


def stream(folder: Path, *arguments: str, expect: int = 0, without: tuple[str, ...] = (*REPORT, *TRAIN)) -> str:
    done = run(folder, 'from stream.cli.main import main; main()', *arguments, without=without)
    assert done.returncode == expect, done.stderr
    assert 'Traceback' not in done.stderr
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stream(tmp_path, 'simulate', 'events.jsonl', '--shoppers', '10', '--days', '30')
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob('*')}


def test_the_extras_are_those_of_the_project():
    names = {entry.split('>')[0].split('=')[0].split('[')[0] for entry in PROJECT['dependencies']}
    extras = {extra: {entry.split('>')[0] for entry in entries}
              for extra, entries in PROJECT['optional-dependencies'].items()}
    assert extras['report'] == set(REPORT) and not names & set(REPORT)
    installed_as = {'sklearn': 'scikit-learn'}
    assert extras['train'] == {installed_as.get(name, name) for name in TRAIN} | {'stream-scoring[report]'}
    assert 'stream-scoring[report]' in extras['test']


@pytest.mark.parametrize('module', ['stream.engine.worker', 'stream.engine.preflight', 'stream.replay.record',
                                    'stream.replay.publish', 'stream.kafka.topics', 'stream.scoring.triton',
                                    'stream.scoring.embedded', 'deploy.local.stack'])
def test_the_worker_and_what_runs_beside_it_need_no_extra(tmp_path: Path, module: str):
    done = run(tmp_path, f'import {module}')
    assert done.returncode == 0, done.stderr


def test_a_replay_without_a_report_needs_none(folder: Path):
    content = (folder / 'events.jsonl').read_bytes()
    (folder / 'events.jsonl.gz').write_bytes(gzip.compress(content))
    (folder / 'events.jsonl.zst').write_bytes(zstandard.compress(content))
    for name in ('events.jsonl', 'events.jsonl.gz', 'events.jsonl.zst'):
        stream(folder, 'replay', name, '--no-report', '--out', f'{name}.out.jsonl', *CONSTANT)
    outputs = {path.read_bytes() for path in folder.glob('*.out.jsonl')}
    assert len(outputs) == 1 and outputs != {b''}


def test_a_demo_without_a_report_needs_none(tmp_path: Path):
    stream(tmp_path, 'demo', '--shoppers', '10', '--days', '30', '--no-report', '--set', f'model={MODEL}')
    assert not (tmp_path / 'demo' / 'alerts.html').exists()


def test_predict_needs_none(folder: Path):
    stream(folder, 'predict', 'events.jsonl', '--at', '2025-01-20', '--model', str(MODEL))
    assert (folder / 'predictions.jsonl').exists()


@pytest.mark.parametrize('missing', REPORT[:3])
@pytest.mark.parametrize('command', [('replay', 'events.jsonl', *CONSTANT), ('demo',)], ids=lambda it: it[0])
def test_a_report_says_what_it_needs_before_anything_is_done(folder: Path, command: tuple[str, ...], missing: str):
    before = files(folder)
    told = stream(folder, *command, expect=UsageError.exit_code, without=(missing,))
    assert f'The HTML report needs {missing}, which is not installed. Do: add --no-report, or {INSTALL_REPORT}' in told
    assert files(folder) == before


def test_evaluate_says_what_it_needs(folder: Path):
    before = files(folder)
    told = stream(folder, 'evaluate', 'events.jsonl', '--model', str(MODEL), expect=UsageError.exit_code,
                  without=REPORT)
    assert 'which is not installed' in told and INSTALL_REPORT in told
    assert files(folder) == before


@pytest.mark.parametrize('command', [('replay', 'events.parquet', '--no-report', *CONSTANT),
                                     ('predict', 'events.parquet', '--at', '2025-01-20')], ids=lambda it: it[0])
def test_a_parquet_file_says_what_it_needs(tmp_path: Path, command: tuple[str, ...]):
    (tmp_path / 'events.parquet').write_bytes(b'PAR1')
    before = files(tmp_path)
    told = stream(tmp_path, *command, '--set', f'model={MODEL}', expect=UsageError.exit_code)
    assert f'A Parquet file needs pyarrow, which is not installed. Do: {INSTALL_REPORT}' in told
    assert files(tmp_path) == before
