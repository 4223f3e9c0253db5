"""A tiny training: its loss falls, it is the same twice, and its checkpoint is read back."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import io
import json
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console
from typer.testing import CliRunner

from stream.cli.main import app
from stream.errors import ModelError, UsageError
from stream.learn.backbones import BackboneOptions
from stream.learn.checkpoint import load
from stream.learn.dataset import ExampleOptions
from stream.learn.export import export
from stream.learn.train import UNFINISHED, simulated, train
from tests.learn.conftest import SHOP
from tests.learn.pretrained import save_tiny


def test_the_loss_falls(checkpoint):
    metrics = json.loads((checkpoint / 'metrics.json').read_bytes())
    losses = [epoch['train'] for epoch in metrics['epochs']]
    assert losses[-1] < losses[0]
    assert metrics['epochs'][metrics['best_epoch'] - 1]['validation'] == min(
        epoch['validation'] for epoch in metrics['epochs'])


def test_twice_the_same(checkpoint, tiny_options, tmp_path, two_threads):
    train(tiny_options(), tmp_path)
    for name in ('model.safetensors', 'windows.safetensors', 'config.json'):
        assert (tmp_path / name).read_bytes() == (checkpoint / name).read_bytes(), name
    first, second = (json.loads((where / 'metrics.json').read_bytes()) | {'seconds': 0}
                     for where in (checkpoint, tmp_path))
    assert first == second
    assert torch.get_num_threads() == two_threads and not torch.are_deterministic_algorithms_enabled()


def test_twice_the_same_of_a_pretrained_backbone(tiny_fit, tiny_options, tmp_path):
    source = save_tiny('gpt2', tmp_path / 'gpt2', positions=64)
    for name in ('one', 'two'):
        train(tiny_options(refit=False, fit=tiny_fit(
            examples=ExampleOptions(2, 1.0), rows_per_epoch=60, epochs=1,
            backbone=BackboneOptions('gpt2', str(source), 'lora'))), tmp_path / name)
    for name in ('model.safetensors', 'windows.safetensors', 'config.json'):
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes(), name
    first, second = (export(tmp_path / name, tmp_path / f'{name}-repository') for name in ('one', 'two'))
    assert (first / 'model.onnx').read_bytes() == (second / 'model.onnx').read_bytes()


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from rich.console import Console
from stream.learn.train import train

class Killing(Console):
    passes = 0

    def print(self, text='', *args, **kwargs):
        self.passes += text.startswith('  epoch 2/')
        if self.passes == 2:        # of the refit
            os.kill(os.getpid(), signal.SIGKILL)

train(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), Killing())
"""


def test_killed_and_gone_on_gives_the_same_bytes(checkpoint, tiny_options, tmp_path):
    (tmp_path / 'options').write_bytes(pickle.dumps(tiny_options()))
    killed = subprocess.run([sys.executable, '-c', KILLED, tmp_path / 'options', tmp_path / 'out'], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {UNFINISHED}
    said = Console(file=io.StringIO())
    train(tiny_options(resume=True), tmp_path / 'out', said)
    assert [words for words in said.file.getvalue().splitlines() if 'going on' in words] == [
        '  epoch: going on after epoch 3', '  epoch: going on after epoch 2']
    for name in ('model.safetensors', 'windows.safetensors', 'config.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert not (tmp_path / 'out' / UNFINISHED).exists()


def test_another_seed_gives_another_model(checkpoint, tiny_options, tmp_path):
    train(tiny_options(seed=4), tmp_path)
    assert (tmp_path / 'model.safetensors').read_bytes() != (checkpoint / 'model.safetensors').read_bytes()


def test_nothing_at_or_after_the_time_is_used(history, lines, tiny_options, tmp_path):
    until_ms = (history.start_ms + history.end_ms) // 2
    early = [line for line in lines if json.loads(line)['ts'] < until_ms]
    train(tiny_options(until_ms=until_ms), tmp_path / 'until')
    train(tiny_options(events=early, until_ms=until_ms), tmp_path / 'early')
    assert (tmp_path / 'until/model.safetensors').read_bytes() == (tmp_path / 'early/model.safetensors').read_bytes()


def test_the_test_is_of_other_users_and_later_days(checkpoint):
    config = json.loads((checkpoint / 'config.json').read_bytes())
    data = config['data']
    assert data['train_users'] + data['test_users'] <= data['users']
    assert data['start_ms'] < data['cut_ms'] < data['known_until_ms']
    assert config['refit'] and data['moments'] > data['train_moments']      # the kept model has seen all of them


def test_a_simulated_shop_has_a_ceiling(tiny_options, tmp_path):
    metrics = train(tiny_options(simulator=SHOP, refit=False), tmp_path)
    week = metrics['ceiling']['purchase within 7 d']
    assert week['moments'] > 50 and 0.5 < week['posterior'] < 1
    assert week['share'] == pytest.approx((week['model'] - week['recency rule'])
                                          / (week['posterior'] - week['recency rule']))


def test_load_gives_the_trained_model(checkpoint):
    kept = load(checkpoint)
    assert not kept.model.training
    assert kept.config['seed'] == 3 and kept.config['source'] == 'a tiny shop'
    assert all(part['categories'].shape[1] == length for length, part in kept.windows.items())


def test_a_checkpoint_of_another_layout_is_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'copy')
    config = json.loads((copy / 'config.json').read_bytes())
    config['layout']['counters'].reverse()
    (copy / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelError, match='layout'):
        load(copy)


def test_simulated_options_name_the_command():
    options = simulated(3, 20, 9)
    assert options.command == 'stream train --simulate 3 --days 20 --seed 9 --out DIR'
    assert options.seed == 9 and next(iter(options.events)).startswith(b'{"event_id"')


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """`stream train` without the training: what it asks for."""
    options = []
    monkeypatch.setattr('stream.learn.train.train', lambda asked, out, console: options.append(asked))
    monkeypatch.setattr('stream.learn.export.export', lambda checkpoint, repository: repository)
    (tmp_path / 'events.jsonl').write_bytes(b'{}\n')

    def ask(*arguments, file='events.jsonl'):
        done = CliRunner().invoke(app, ['train', *([str(tmp_path / file)] if file else []), *arguments])
        if done.exception:
            raise done.exception
        return options.pop()

    return ask


def test_make_train_asks_for_what_the_shipped_card_says(asked, monkeypatch):
    """Its command may say in words what is the default."""
    monkeypatch.setattr('stream.learn.train.simulate', lambda shop: SimpleNamespace(lines=lambda: iter(())))
    root = Path(__file__).parents[2]
    shipped = json.loads((root / 'triton_models/shopper/1/manifest.json').read_bytes())['command']
    made, = re.findall(r'\$\(BIN\)/(stream train .*)', (root / 'Makefile').read_text())
    mine, theirs = (asked(*shlex.split(command)[2:], file=None) for command in (made, shipped))
    assert (mine.source, mine.seed, mine.simulator, mine.limits) == (
        theirs.source, theirs.seed, theirs.simulator, theirs.limits)
    assert mine.fit == theirs.fit and mine.fit.rows_per_epoch == 24_000 and not mine.refit


def test_the_command_starts_and_goes_on_as_it_is_told(asked):
    plain = asked()
    assert (plain.fit.pretrain, plain.fit.start_from, plain.resume, plain.curves) == (None, None, False, None)
    told = asked('--pretrain', 'masked,next', '--from', 'other', '--resume', '--tensorboard', 'curves')
    assert told.fit.pretrain.objectives == {'masked': 1.0, 'next': 1.0}
    assert (told.fit.start_from, told.resume, told.curves) == ('other', True, Path('curves'))
    # What leads to other weights is in the command that reproduces them, and nothing else.
    assert told.command.endswith('--pretrain masked,next --from other --out DIR')
    with pytest.raises(UsageError, match='no pretraining'):
        asked('--pretrain', 'guessing')
