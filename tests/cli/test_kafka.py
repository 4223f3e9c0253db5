"""The installed commands that talk to Kafka, where there is none; with a broker they are in tests/integration."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stream.errors import InputError, KafkaError, UsageError

STREAM = Path(sys.executable).with_name('stream')
NOWHERE = '--set=brokers=127.0.0.1:1'


def stream(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([STREAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
                          env={'PATH': '/usr/bin:/bin', 'COLUMNS': '200'}, check=False)


@pytest.mark.parametrize('command', ['topics', 'check', 'publish', 'record'])
def test_every_command_has_help(tmp_path: Path, command: str):
    done = stream(tmp_path, command, '--help')
    assert done.returncode == 0
    assert f'stream {command}' in done.stdout


@pytest.mark.parametrize(('arguments', 'code', 'message'), [
    (('topics', NOWHERE), KafkaError.exit_code, 'No broker of 127.0.0.1:1 answers'),
    (('publish', 'events.jsonl', NOWHERE), KafkaError.exit_code, 'No broker'),
    (('record', '--out', 'r.jsonl.zst', NOWHERE), KafkaError.exit_code, 'No broker'),
    (('record', '--out', 'r.csv', NOWHERE), UsageError.exit_code, '.jsonl.zst'),
    (('record', '--out', 'r.jsonl', '--from', 'yesterday', NOWHERE), UsageError.exit_code, 'beginning'),
    (('record', '--out', 'events.jsonl', NOWHERE), UsageError.exit_code, 'never overwrites'),
    (('publish', 'absent.jsonl', NOWHERE), InputError.exit_code, 'absent.jsonl'),
    (('publish', 'events.jsonl', '--format', 'tapes', NOWHERE), UsageError.exit_code, 'kafka'),
    (('topics', '--set=brokers=here'), UsageError.exit_code, 'host:port'),
    (('topics', '--set=alerts_topic=clicks', NOWHERE), UsageError.exit_code, 'topic of its own'),
])
def test_an_error_is_one_line_with_what_to_do(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str):
    (tmp_path / 'events.jsonl').write_text('{}\n')
    done = stream(tmp_path, *arguments)
    assert done.returncode == code, done.stderr
    [line] = filter(None, done.stderr.splitlines())
    assert message in line
    assert ' Do: ' in line
    assert [path.name for path in tmp_path.iterdir()] == ['events.jsonl']
    assert (tmp_path / 'events.jsonl').read_text() == '{}\n'


def test_check_prints_a_line_for_everything(tmp_path: Path):
    done = stream(tmp_path, 'check', '--json', NOWHERE, '--set=admin_port=0')
    assert done.returncode == KafkaError.exit_code
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line['check']: line['outcome'] for line in lines} == {
        'settings': 'ok', 'brokers': 'problem', 'model': 'ok', 'state': 'ok', 'admin port': 'ok'}
    assert list(tmp_path.iterdir()) == []
