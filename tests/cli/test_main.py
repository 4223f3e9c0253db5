"""The installed command, as a person or a script would use it."""
import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stream.cli.main import os_problem
from stream.errors import InputError, ModelError, StateError, StreamError, UsageError

STREAM = Path(sys.executable).with_name('stream')
MODEL = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'
COUNTS = ['read', 'applied', 'duplicate', 'late', 'dead', 'users', 'scored', 'alerts']


def stream(folder: Path, *arguments: str, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([STREAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=240,
                          env={'PATH': '/usr/bin:/bin', 'COLUMNS': '200', **environment}, check=False)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp('cli')
    stream(made, 'simulate', 'events.jsonl', '--shoppers', '40', '--days', '120', '--noise', '0.01')
    (made / 'journal.jsonl').write_text(json.dumps({
        'topic': 'journal', 'partition': 0, 'offset': 0, 'partitions': 1, 'timestamp_ms': 0, 'key': '0', 'value': '{}',
        'headers': []}) + '\n')
    return made


def test_simulate_gives_the_same_bytes_and_the_truth(folder: Path):
    stream(folder, 'simulate', 'again.jsonl', '--shoppers', '40', '--days', '120', '--noise', '0.01')
    assert (folder / 'again.jsonl').read_bytes() == (folder / 'events.jsonl').read_bytes()
    assert len((folder / 'again.truth.jsonl').read_text().splitlines()) == 40


def test_replay_ends_with_one_line_of_counts_and_writes_its_files(folder: Path):
    done = stream(folder, 'replay', 'events.jsonl', '--model', str(MODEL), '--json', '--out', 'a.jsonl')
    counts = json.loads(done.stdout.splitlines()[-1])
    assert list(counts) == COUNTS
    assert counts['read'] == counts['applied'] + counts['duplicate'] + counts['late'] + counts['dead']
    assert len((folder / 'a.jsonl').read_text().splitlines()) == counts['alerts']
    assert len((folder / 'a.dead.jsonl').read_text().splitlines()) == counts['dead']
    assert '<html' in (folder / 'a.html').read_text()
    assert not list(folder.glob('*.part'))


def test_replay_twice_the_same_bytes_with_the_model(folder: Path):
    for name in ('one', 'two'):
        stream(folder, 'replay', 'events.jsonl', '--model', str(MODEL), '--publish', 'all', '--out', f'{name}.jsonl')
    for suffix in ('.jsonl', '.dead.jsonl', '.html'):
        assert (folder / f'one{suffix}').read_bytes() == (folder / f'two{suffix}').read_bytes()


def test_replay_in_rocksdb_equals_memory(folder: Path):
    arguments = ('replay', 'events.jsonl', '--scorer', 'constant', '--no-report')
    stream(folder, *arguments, '--out', 'memory.jsonl')
    stream(folder, *arguments, '--out', 'temporary.jsonl', '--state', 'rocksdb')
    stream(folder, *arguments, '--out', 'kept.jsonl', '--state-dir', 'state')
    assert (folder / 'memory.jsonl').read_bytes() == (folder / 'temporary.jsonl').read_bytes()
    assert (folder / 'memory.jsonl').read_bytes() == (folder / 'kept.jsonl').read_bytes()
    assert 'not empty' in stream(folder, *arguments, '--state-dir', 'state', expect=UsageError.exit_code).stderr


@pytest.mark.parametrize('publish', ['changes', 'all', 'events'])
def test_replay_with_several_workers_equals_one(folder: Path, publish: str):
    arguments = ('replay', 'events.jsonl', '--scorer', 'constant', '--publish', publish, '--json')
    told = [stream(folder, *arguments, '--out', f'workers{workers}.jsonl', '--workers', workers).stdout
            for workers in ('1', '2')]
    assert told[0] == told[1]
    for suffix in ('.jsonl', '.dead.jsonl', '.html'):
        assert (folder / f'workers1{suffix}').read_bytes() == (folder / f'workers2{suffix}').read_bytes()


def test_several_workers_keep_their_state_apart(folder: Path):
    arguments = ('replay', 'events.jsonl', '--scorer', 'constant', '--no-report', '--workers', '2')
    stream(folder, *arguments, '--out', 'apart.jsonl', '--state-dir', 'apart')
    assert sorted(path.name for path in (folder / 'apart').iterdir()) == ['shard-0', 'shard-1']
    assert 'not empty' in stream(folder, *arguments, '--state-dir', 'apart', expect=UsageError.exit_code).stderr


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_replay_with_workers_leaves_nothing(tmp_path: Path, folder: Path, number: signal.Signals):
    with subprocess.Popen([STREAM, 'replay', folder / 'events.jsonl', '--workers', '2', '--no-report', '--model',
                           str(MODEL)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          # A shell ignores SIGINT in what it starts in the background, and so would this process.
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob('*.part')):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)     # all processes have closed standard error
    assert process.returncode == (128 + 15 if number == signal.SIGTERM else 130)
    assert list(tmp_path.iterdir()) == []


def test_settings_reach_the_replay(folder: Path):
    arguments = ('replay', 'events.jsonl', '--scorer', 'constant', '--no-report', '--json', '--out', 's.jsonl')
    assert json.loads(stream(folder, *arguments).stdout)['alerts'] > 0
    quiet = stream(folder, *arguments, '--set', 'tier_events_min=100000')
    assert json.loads(quiet.stdout)['alerts'] == 0
    quiet = stream(folder, *arguments, STREAM_TIER_EVENTS_MIN='100000')
    assert json.loads(quiet.stdout)['alerts'] == 0


def test_a_variable_that_is_no_setting_is_told(tmp_path: Path):
    assert 'STREAM_CHRUN_RAISE' in stream(tmp_path, 'config', STREAM_CHRUN_RAISE='0.5').stderr
    assert stream(tmp_path, 'config', STREAM_CHURN_RAISE='0.9').stderr == ''


def test_a_model_trained_on_other_windows_or_money_is_told(folder: Path):
    arguments = ('replay', 'events.jsonl', '--model', str(MODEL), '--no-report', '--out', 'w.jsonl')
    told = stream(folder, *arguments, '--set', 'currency=USD', '--set', 'window_events_max=16').stderr
    assert 'trained on amounts in EUR' in told
    assert 'windows of 128 events' in told


def test_the_shipped_model_is_found_from_any_folder_and_says_what_it_was_trained_on(folder: Path):
    done = stream(folder, 'replay', 'events.jsonl', '--no-report', '--out', 'm.jsonl')
    assert 'trained on 9,000 simulated shoppers' in done.stdout


def test_a_file_of_another_format_is_noticed(folder: Path):
    done = stream(folder, 'replay', 'events.jsonl', '--format', 'cdnow', '--no-report', '--out', 'f.jsonl')
    assert 'check --format' in done.stdout


def test_a_stopped_replay_leaves_nothing(tmp_path: Path, folder: Path):
    with subprocess.Popen([STREAM, 'replay', folder / 'events.jsonl', '--publish', 'all'], cwd=tmp_path,
                          stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob('*.part')):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + 15
    assert 'stopped' in told
    assert list(tmp_path.iterdir()) == []


def test_demo_shows_alerts_with_reasons_and_where_the_report_is(tmp_path: Path):
    done = stream(tmp_path, 'demo', '--shoppers', '60', '--days', '120', '--set', f'model={MODEL}')
    assert 'churn.alert raised' in done.stdout
    assert '+ nothing for' in done.stdout
    assert done.stdout.startswith('60 simulated shoppers over 120 days: ')
    assert 'report: demo/alerts.html' in done.stdout
    assert (tmp_path / 'demo' / 'alerts.html').exists()


def test_config_prints_what_is_in_effect_and_the_schema(tmp_path: Path):
    assert 'churn_raise = 0.7' in stream(tmp_path, 'config', '--set', 'churn_raise=0.7').stdout
    schema = json.loads(stream(tmp_path, 'config', '--schema').stdout)
    assert 'EventRecord' in schema['$defs']


@pytest.mark.parametrize(('arguments', 'code', 'message'), [
    (('replay', 'absent.jsonl'), InputError.exit_code, 'absent.jsonl'),
    (('replay', 'events.jsonl', '--format', 'tapes'), UsageError.exit_code, 'use one of'),
    (('replay', 'events.jsonl', '--format', 'rees46', '--scorer', 'constant'), InputError.exit_code, '--format'),
    (('replay', 'journal.jsonl', '--format', 'kafka', '--scorer', 'constant'), InputError.exit_code, '--journal'),
    (('replay', 'events.jsonl', '--set', 'brokres=x'), UsageError.exit_code, 'did you mean brokers?'),
    (('replay', 'events.jsonl', '--config', '.'), UsageError.exit_code, 'is not a file'),
    (('replay', 'events.jsonl', '--model', 'nowhere'), ModelError.exit_code, 'no model'),
    (('replay', 'events.jsonl', '--publish', 'some'), UsageError.exit_code, 'publish'),
    (('replay', 'events.jsonl', '--set', 'churn_raise'), UsageError.exit_code, 'NAME=VALUE'),
    (('replay', 'events.jsonl', '--out', 'a.html'), UsageError.exit_code, '.jsonl'),
    (('replay', 'events.jsonl', '--out', 'no/where.jsonl'), UsageError.exit_code, 'existing folder'),
    (('replay', 'events.jsonl', '--config', 'absent.toml'), UsageError.exit_code, 'settings file'),
    (('replay', 'events.jsonl', '--out', 'events.jsonl'), UsageError.exit_code, 'files to replay'),
    (('replay', 'events.jsonl', '--state-dir', 'events.jsonl', '--scorer', 'constant'), UsageError.exit_code,
     'not a folder'),
    (('replay', 'events.jsonl', '--workers', '0'), UsageError.exit_code, 'from 1 to'),
    (('replay', 'events.jsonl', '--workers', '257'), UsageError.exit_code, 'from 1 to'),
    (('replay', 'events.jsonl', '--workers', '1.5'), UsageError.exit_code, '`auto`'),
    (('replay', 'journal.jsonl', '--format', 'kafka', '--journal', 'journal.jsonl', '--workers', '2'),
     UsageError.exit_code, 'leave --workers out'),
    (('export', '.'), ModelError.exit_code, 'not a checkpoint'),
    (('replay', 'events.jsonl', '--set', 'currency_rates={"USD":-1}'), UsageError.exit_code, 'currency_rates'),
    (('replay', 'events.jsonl', '--set', 'silence_days=[40000000000000]'), UsageError.exit_code, 'silence_days'),
    (('simulate', 'no/where.jsonl'), UsageError.exit_code, 'existing folder'),
    (('simulate', 'x.jsonl.gz'), UsageError.exit_code, '.jsonl'),
    (('train',), UsageError.exit_code, '--simulate'),
])
def test_errors_say_what_to_do_and_leave_nothing_half_done(folder: Path, arguments, code: int, message: str):
    before = {path.name for path in folder.iterdir()}
    done = stream(folder, *arguments, expect=code)
    assert message in done.stderr
    assert 'Do:' in done.stderr
    assert 'Traceback' not in done.stderr
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize('command', ['demo', 'simulate', 'replay', 'journal', 'train', 'export', 'predict', 'config',
                                     'worker', 'topics', 'check', 'publish', 'record'])
def test_every_command_has_help(tmp_path: Path, command: str):
    assert f'stream {command}' in stream(tmp_path, command, '--help').stdout


@pytest.mark.parametrize(('error', 'said'), [
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'x'), 'No such file or directory: x. Do: check the'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device. Do: make room'),
    (OSError(errno.EMFILE, 'Too many open files'), 'Too many open files. Do: raise the limit of open files'),
    (OSError(errno.ENOMEM, 'Cannot allocate memory'), 'Cannot allocate memory. Do: give the process more memory'),
    (OSError(errno.EIO, 'Input/output error'), 'Input/output error. Do: check the disk and the limits'),
    (OSError('closed'), 'closed. Do: '),
])
def test_an_error_of_the_system_comes_with_advice_that_fits(error: OSError, said: str):
    assert os_problem(error).startswith(said)


def test_exit_codes_are_distinct():
    codes = [error.exit_code for error in (StreamError, UsageError, InputError, StateError, ModelError)]
    assert len(set(codes)) == len(codes)
