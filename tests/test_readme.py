"""The README's commands, run; its examples, decoded."""
import json
import re
import subprocess
from pathlib import Path

import pytest

from stream.config import Settings
from stream.core.events import TYPE_CODES, Decoder, Event, EventRules

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
COMMANDS = re.findall(r'^    ((?:make|\.venv/bin/stream)\b.*?)(?:\s+#.*)?$', README, re.MULTILINE)
EXAMPLES = [json.loads(block) for block in re.findall(r'```json\n(.*?)\n```', README, re.DOTALL)]


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ['make demo', 'make test']
    assert 'make test' in (ROOT / '.ci' / 'run').read_text().splitlines()


def test_make_demo(tmp_path: Path):
    if not (ROOT / '.venv' / 'base').exists():
        pytest.skip('the environment was not made by make')
    done = subprocess.run(['make', 'demo'], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert 'churn.alert raised' in done.stdout
    assert 'report: demo/alerts.html' in done.stdout


def test_every_stream_command_runs(tmp_path: Path):
    (tmp_path / '.venv').symlink_to(ROOT / '.venv')
    (tmp_path / 'triton_models').symlink_to(ROOT / 'triton_models')
    (tmp_path / 'events.jsonl').write_text(json.dumps(EXAMPLES[0]) + '\n')
    commands = [command for command in COMMANDS if command.startswith('.venv')]
    assert commands
    for command in commands:
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / 'alerts.html').exists()


def test_the_event_is_an_event():
    assert isinstance(Decoder(EventRules())(json.dumps(EXAMPLES[0]).encode()), Event)
    assert all(name in README for name in TYPE_CODES if name != 'other')


def test_the_message_has_the_fields_of_a_real_one():
    golden = [json.loads(line) for line in (ROOT / 'tests' / 'golden' / 'messages.jsonl').read_text().splitlines()]
    real = next(value for value in golden if value['type'] == EXAMPLES[1]['type'])
    assert list(EXAMPLES[1]) == list(real)
    assert list(EXAMPLES[1]['scores']) == list(real['scores'])
    assert list(EXAMPLES[1]['reasons'][0]) == list(real['reasons'][0])


def test_every_setting_that_is_named_exists_with_its_default():
    section = README.split('## Commands and settings')[1]
    cells = re.findall(r'^\| (`\w+`(?:, `\w+`)*) \|', section, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r'`(\w+)`', cell)]
    assert len(names) >= 8
    assert set(names) <= set(Settings.model_fields)
    settings = Settings()
    assert f'| {settings.intent_raise}, {settings.intent_clear} |' in README
    assert f'| {settings.churn_raise}, {settings.churn_clear} |' in README
    assert f'| {", ".join(map(str, settings.silence_days))} |' in README
