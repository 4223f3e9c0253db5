"""The commands of the README, each followed by a test; those of the guides, each checked; examples, decoded."""
import ast
import json
import re
import shlex
import subprocess
import tomllib
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer.main

from stream.cli.main import app
from stream.config import Settings
from stream.core.events import TYPE_CODES, Decoder, Event, EventRules
from tests.skips import skip_without

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
CORE = (ROOT / 'stream' / 'core' / 'README.md').read_text()
DEPLOY = (ROOT / 'deploy' / 'README.md').read_text()
GUIDES = sorted(path for pattern in ('README.md', '.github/*.md', 'deploy/**/*.md', 'stream/**/*.md', 'tests/**/*.md')
                for path in ROOT.glob(pattern))
PROGRAMS = ('make', 'docker', 'stream', 'python', '.venv/bin/stream', '.venv/bin/python')

# What follows each command of the README: a test, and words of that test's file which show that it does.
FOLLOWED = {
    'make demo': ('tests/test_readme.py::test_make_demo', "'make', 'demo'"),
    'make test': ('tests/test_readme.py::test_the_two_commands_come_first', '.ci'),
    '.venv/bin/stream replay events.jsonl --out alerts.jsonl': ('tests/test_readme.py::test_the_replay_of_a_file',
                                                                'alerts.dead.jsonl'),
    'make up': ('tests/deploy/test_stack.py::test_up_brings_alerts_and_down_leaves_nothing', "'up'"),
    'make down': ('tests/deploy/test_stack.py::test_up_brings_alerts_and_down_leaves_nothing', "'down'"),
    '.venv/bin/python -m deploy.local.stack alerts': (
        'tests/deploy/test_stack.py::test_up_brings_alerts_and_down_leaves_nothing', "'alerts'"),
    'docker compose up --build': ('tests/deploy/test_docker.py::test_each_image_has_its_stage', 'docker-compose.yml'),
    '.venv/bin/stream check --config stream.toml': (
        'tests/cli/test_kafka.py::test_check_prints_a_line_for_everything', "'check'"),
    '.venv/bin/stream worker --config stream.toml': (
        'tests/deploy/test_stack.py::test_up_brings_alerts_and_down_leaves_nothing', 'worker'),
    'make chaos': ('tests/chaos/test_chaos.py::test_one_kill_and_one_rebalance_lose_nothing', 'chaos'),
}


def commands(text: str) -> list[str]:
    """The commands of a guide: lines of code in blocks, and code within sentences, without their comments."""
    code, open_fence, listed = [], False, False
    for line in text.splitlines():
        if line.strip().startswith('```'):
            open_fence, listed = not open_fence, line.strip() in ('```sh', '```bash')
        elif (open_fence and listed) or (not open_fence and line.startswith('    ')):
            code.append(line)
        elif not open_fence:
            code += re.findall(r'`([^`]+)`', line)
    found = [re.split(r'\s+#', line)[0].strip() for line in code]
    return [line for line in found if line.split(' ')[0] in PROGRAMS and ' ' in line]


def examples(text: str) -> list[dict[str, Any]]:
    """Its JSON."""
    return [json.loads(block) for block in re.findall(r'```json\n(.*?)\n```', text, re.DOTALL)]


# ---- the README -----------------------------------------------------------------------------------------------------

def test_the_two_commands_come_first():
    assert commands(README)[:2] == ['make demo', 'make test']
    assert 'make test' in (ROOT / '.ci' / 'run').read_text().splitlines()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_command_is_followed_by_a_test():
    assert set(commands(README)) == set(FOLLOWED), 'FOLLOWED and the README differ. Do: name a test for each command'
    for command, (name, words) in FOLLOWED.items():
        path, _, test = name.partition('::')
        source = (ROOT / path).read_text()
        tests = {getattr(node, 'name', '') for node in ast.parse(source).body}
        assert test in tests and words in source, f'{name} does not follow {command}'


def test_make_demo(tmp_path: Path):
    if not (ROOT / '.venv' / 'base').exists():
        skip_without('an environment of make')
    done = subprocess.run(['make', 'demo'], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert 'churn.alert raised' in done.stdout
    assert 'report: demo/alerts.html' in done.stdout


def test_the_replay_of_a_file(tmp_path: Path):
    (tmp_path / '.venv').symlink_to(ROOT / '.venv')
    (tmp_path / 'triton_models').symlink_to(ROOT / 'triton_models')
    (tmp_path / 'events.jsonl').write_text(json.dumps(examples(README)[0]) + '\n')
    runs = [command for command in commands(README) if 'events.jsonl' in command]
    assert runs
    for command in runs:
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert all((tmp_path / name).exists() for name in ('alerts.jsonl', 'alerts.dead.jsonl', 'alerts.html'))


def test_the_picture_of_an_alert_names_the_fields_of_a_real_one():
    picture = ElementTree.parse(ROOT / '.github' / 'images' / 'alert.svg')
    drawn = {name for element in picture.iter() if 'code' in element.get('class', '').split()
             for name in (element.text or '').split(', ')}
    real = {name for value in golden() if value['type'] == 'churn.alert' for name in value}
    assert drawn and drawn <= real


# ---- all guides -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_of_a_guide_exists(path: Path):
    for command in commands(path.read_text()):
        check(command)


@pytest.mark.parametrize('path', GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_of_a_guide_leads_somewhere(path: Path):
    for target in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)):
        if '://' in target:
            continue
        file, _, anchor = target.partition('#')
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f'{path.name} links to {target}'
        if anchor:
            headings = re.findall(r'^#+ (.*)$', there.read_text().lower(), re.MULTILINE)
            assert anchor in {re.sub(r'[^\w\- ]', '', heading).replace(' ', '-') for heading in headings}, target


def test_every_picture_of_the_readme_exists_and_is_told_in_words():
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert len(pictures) == 4 and all((ROOT / name).exists() for name in pictures)
    assert all(re.search(r'alt="[^"]{40,}"', tag) for tag in re.findall(r'<img [^>]*>', README))


def test_a_command_that_does_not_exist_is_noticed():
    for command in ('make nothing', 'stream nothing', 'stream replay --nothing', 'python -m tests.nothing',
                    'stream worker --set nothing=1'):
        with pytest.raises(AssertionError):
            check(command)


def check(command: str) -> None:
    """Errors: AssertionError where a target, a module, a command, one of its options or a setting does not exist."""
    program, *words = shlex.split(command)
    if program == 'make':
        targets = [word for word in words if '=' not in word]
        assert targets and set(targets) <= make_targets(), command
    elif program == 'docker':
        files = [word for word in words if word.endswith('.yml')]
        assert words[0] == 'compose' and all((ROOT / file).exists() for file in files), command
    elif program.endswith('python'):
        if words[0] == '-m':
            assert words[1] == 'tests.bench.NAME' or spec(words[1]) is not None, command
        else:
            assert words[0].startswith('-') or (ROOT / words[0]).exists(), command
    else:
        # `stream a | b` and `stream COMMAND` name commands in general.
        if words[0].isupper() or '|' in words:
            return
        assert words[0] in cli(), command
        given = {word.partition('=')[0] for word in words[1:] if re.match(r'--\w', word)}
        assert given <= cli()[words[0]] | {'--help'}, command
        for option, value in pairwise(words):
            if option == '--set' and value != 'NAME=VALUE':
                assert value.partition('=')[0] in Settings.model_fields, command


@cache
def make_targets() -> frozenset[str]:
    makefile = (ROOT / 'Makefile').read_text()
    return frozenset(re.findall(r'^([\w./-]+)(?: [\w./-]+)*:', makefile, re.MULTILINE))


@cache
def cli() -> dict[str, frozenset[str]]:
    """The options of each command."""
    group: Any = typer.main.get_command(app)
    return {name: frozenset(option for param in command.params for option in (*param.opts, *param.secondary_opts))
            for name, command in group.commands.items()}


def spec(module: str) -> Any:
    try:
        return find_spec(module)
    except ModuleNotFoundError:
        return None


# ---- what the guides say of the code --------------------------------------------------------------------------------

def golden() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / 'tests' / 'golden' / 'messages.jsonl').read_text().splitlines()]


def test_the_event_is_an_event():
    for example in (examples(README)[0], examples(CORE)[0]):
        assert isinstance(Decoder(EventRules())(json.dumps(example).encode()), Event)
    assert all(name in CORE for name in TYPE_CODES)


def test_the_message_has_the_fields_of_a_real_one():
    example = examples(CORE)[1]
    real = next(value for value in golden() if value['type'] == example['type'])
    assert list(example) == list(real)
    assert list(example['scores']) == list(real['scores'])
    assert list(example['reasons'][0]) == list(real['reasons'][0])
    assert all(value['type'] in CORE for value in golden())


def test_every_setting_that_is_named_exists_with_its_default():
    section = DEPLOY.split('### Settings that are changed most')[1].split('###')[0]
    rows = re.findall(r'^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|', section, re.MULTILINE)
    assert len(rows) >= 8
    for cell, default in rows:
        names = re.findall(r'`(\w+)`', cell)
        values = [Settings.model_fields[name].get_default(call_default_factory=True) for name in names]
        flat = [str(entry) for value in values for entry in (value if isinstance(value, list) else [value])]
        assert default == ', '.join(flat), cell


def test_the_settings_files_are_accepted():
    blocks = [re.sub(r'^ {3}', '', block, flags=re.MULTILINE)
              for block in re.findall(r'```toml\n(.*?)```', DEPLOY, re.DOTALL)]
    assert len(blocks) == 2
    given = [tomllib.loads(block) for block in blocks]
    for values in given:
        Settings(**values)
    defaults = Settings().model_dump()['actions']
    assert Settings(**given[1]).model_dump()['actions'] == defaults
