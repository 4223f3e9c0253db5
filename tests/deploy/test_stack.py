"""`make up` and `make down`: everything really starts, alerts come, and nothing is left."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.processes import recorded, started_at

ROOT = Path(__file__).parents[2]
NAMES = ['kafka', 'triton', 'worker', 'publisher']


# Parts that are there at once, for what does not need real ones.
STAND_INS = '''
class StandIn(stack.Part):
    brokers, address, port = '127.0.0.1:1', '127.0.0.1:2', 3
    _command = lambda self: (['sleep', '600'], {})
    _answers = lambda self: True

stack.Kafka = type('Kafka', (StandIn,), {'name': 'kafka'})
class StandInTriton(StandIn):
    name = 'triton'

    def __init__(self, folder, tied, others):
        super().__init__(folder, tied)

stack.Triton = StandInTriton
'''


class Stack:
    """stack.py with a folder of its own, so that what a user has up is left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changes = 'stack.SHOPPERS = 60'

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        code = (f'import pathlib; from deploy.local import stack\nstack.LOCAL = pathlib.Path({str(self.folder)!r})\n'
                f'{self.changes}\nstack.main()')
        return subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True, timeout=200,
                              check=False, cwd=ROOT)

    def pids(self) -> list[int]:
        found = [recorded(self.folder / name / f'{name}.pid') for name in NAMES]
        return [process[0] for process in found if process]


def runs_in(process: Path, folder: Path) -> bool:
    try:
        return os.readlink(process / 'cwd').startswith(str(folder))
    except OSError:
        return False


@pytest.fixture
def stack(tmp_path: Path):
    made = Stack(tmp_path / 'local')
    yield made
    made('down')


def test_up_brings_alerts_and_down_leaves_nothing(stack: Stack):
    assert stack('down').stdout == 'Nothing is running.\n'
    assert stack('status').stdout == 'Nothing is running.\n'

    done = stack('up')
    assert done.returncode == 0, done.stdout + done.stderr
    pids = stack.pids()
    assert len(pids) == 4
    shown = stack('alerts', '--count', '3')
    assert len([line for line in shown.stdout.splitlines() if line.startswith('20')]) == 3, shown.stderr
    assert 'purchase_power.updated' in shown.stdout
    address = json.loads((stack.folder / 'state.json').read_text())['brokers']
    assert address in done.stdout and 'deploy.local.stack alerts' in done.stdout

    again = stack('up')
    assert again.stdout.startswith('Already running.') and address in again.stdout
    assert stack.pids() == pids

    for name, place in (('worker', 2), ('triton', 1)):
        os.kill(pids[place], signal.SIGKILL)
        assert 'not running: see its log' in stack('status').stdout
        again = stack('up')
        assert again.stdout.startswith('Running again.') and f'{name} has stopped' in again.stderr.lower()
        assert len(stack.pids()) == 4
    os.kill(pids[0], signal.SIGKILL)
    ended = stack('up')
    assert ended.returncode == 1 and 'kafka stopped' in ended.stderr and 'make down' in ended.stderr

    pids = stack.pids()
    assert stack('down').stdout == 'Stopped: publisher, worker, triton.\n'
    assert not [pid for pid in pids if started_at(pid)]
    assert not stack.folder.exists()


def test_an_up_that_fails_says_why_and_stops_what_it_had_started(stack: Stack, tmp_path: Path):
    command = tmp_path / 'stream'
    command.write_text('#!/bin/sh\necho the dog ate the topics >&2; exit 6\n')
    command.chmod(0o755)
    stack.changes = f'{STAND_INS}\nstack.STREAM = pathlib.Path({str(command)!r})'
    done = stack('up')
    assert done.returncode == 1
    assert 'stream topics failed' in done.stderr and 'the dog ate the topics' in done.stderr and 'Do: ' in done.stderr
    assert not stack.folder.exists()
    assert not [pid for pid in Path('/proc').glob('[0-9]*') if runs_in(pid, stack.folder)]


def test_only_the_parts(stack: Stack):
    stack.changes = STAND_INS
    assert stack('alerts').stderr.startswith('Nothing is running.')
    done = stack('up', '--only-parts')
    assert done.returncode == 0, done.stderr
    assert len(stack.pids()) == 2 and 'worker' not in done.stdout
    assert all(runs_in(Path(f'/proc/{pid}'), stack.folder) for pid in stack.pids())
    assert stack('up', '--only-parts').stdout.startswith('Already running.')
    assert stack('down').stdout == 'Stopped: triton, kafka.\n'


def test_a_model_repository_for_another_triton(stack: Stack, tmp_path: Path):
    done = stack('models', 'tensorrt', str(tmp_path / 'models'))
    assert done.returncode == 0, done.stderr
    assert 'tensorrt' in (tmp_path / 'models' / 'shopper' / 'config.pbtxt').read_text()
    refused = stack('models', 'onnxruntime', str(ROOT / 'triton_models'))
    assert refused.returncode == 2 and 'another folder' in refused.stderr


def test_make_calls_it():
    for target in ('up', 'down'):
        lines = subprocess.run(['make', '-n', target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f'-m deploy.local.stack {target}' in lines
