"""When `make` installs and when it does not, in a folder that has the project's files but nothing in them."""
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / 'Makefile').read_text()
INSTALLS = 'uv pip install'
STAMPS = ('.venv/bin/uv', '.venv/base', '.venv/test')
SOURCES = [path.relative_to(ROOT) for pattern in ('*.pyx', '*.pxd') for path in (ROOT / 'stream').rglob(pattern)]
MODULES = [path.with_suffix('.cpython-311-x86_64-linux-gnu.so') for path in SOURCES if path.suffix == '.pyx']
USING_BASE = ('demo', 'up')
USING_TEST = ('test', 'chaos', 'bench', 'check', 'train')
NOT_INSTALLING = ('help', 'down', 'clean')


def made(folder: Path, *arguments: str) -> str:
    done = subprocess.run(['make', *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False,
                          env={'PATH': os.environ['PATH']})
    assert done.returncode == 0, done.stderr
    return done.stdout


def put(folder: Path, name: str | Path, at_s: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (at_s, at_s))


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A clone on which nothing was ever installed."""
    (tmp_path / 'Makefile').write_text(MAKEFILE)
    for name in ('pyproject.toml', 'deploy/constraints.txt', 'deploy/build_native.py', *SOURCES):
        put(tmp_path, name, 1_000)
    return tmp_path


@pytest.fixture
def installed(fresh: Path) -> Path:
    """The same after an install: all modules are compiled, and the stamps are newer than the sources."""
    for name in (*MODULES, *STAMPS):
        put(fresh, name, 2_000)
    return fresh


def test_every_target_is_listed_and_tested():
    names = re.search(r'^\.PHONY: (help .*)$', MAKEFILE, re.MULTILINE)
    assert names and set(names[1].split()) == {*USING_BASE, *USING_TEST, *NOT_INSTALLING}
    assert len(MODULES) >= 4        # with one source alone, the empty results of foreach make no space


@pytest.mark.parametrize('target', [*USING_BASE, *USING_TEST, *NOT_INSTALLING])
def test_nothing_is_installed_twice(installed: Path, target: str):
    assert INSTALLS not in made(installed, '-n', target)


@pytest.mark.parametrize('target', [*USING_BASE, *USING_TEST])
def test_the_first_use_installs_what_it_needs(fresh: Path, target: str):
    commands = made(fresh, '-n', target)
    assert '-m venv .venv' in commands
    assert ('--extra test' in commands) == (target in USING_TEST)
    assert ('--extra report' in commands) == (target in USING_BASE)
    assert '--editable .' in commands


@pytest.mark.parametrize('missing', MODULES, ids=str)
@pytest.mark.parametrize('target', ['demo', 'test'])
def test_a_missing_module_is_compiled(installed: Path, missing: Path, target: str):
    (installed / missing).unlink()
    assert '--editable .' in made(installed, '-n', target)


@pytest.mark.parametrize('changed', [*SOURCES, 'deploy/build_native.py', 'pyproject.toml', 'deploy/constraints.txt'],
                         ids=str)
@pytest.mark.parametrize('target', ['demo', 'test'])
def test_a_newer_source_is_installed(installed: Path, changed: str | Path, target: str):
    put(installed, changed, 3_000)
    assert '--editable .' in made(installed, '-n', target)


@pytest.mark.parametrize('target', NOT_INSTALLING)
def test_these_install_nothing_even_at_first(fresh: Path, target: str):
    before = sorted(fresh.rglob('*'))
    printed = made(fresh, target)
    assert sorted(fresh.rglob('*')) == before
    if target == 'down':
        assert printed == 'Nothing is up.\n'


def test_down_stops_what_runs_though_a_module_is_missing(installed: Path):
    (installed / MODULES[0]).unlink()
    commands = made(installed, '-n', 'down')
    assert '-m deploy.local.stack down' in commands
    assert INSTALLS not in commands


def test_down_stops_what_runs_though_the_environment_is_gone(fresh: Path):
    put(fresh, 'build/local/state.json', 1_000)
    commands = made(fresh, '-n', 'down')
    assert '--editable .' in commands.partition('-m deploy.local.stack down')[0]


def test_the_help_names_every_target_and_fits_80_columns(fresh: Path):
    lines = made(fresh, 'help').splitlines()
    assert all(len(line) <= 80 for line in lines)
    named = [line.split()[1] for line in lines if line.startswith('make ')]
    assert sorted(['help', *named]) == sorted([*USING_BASE, *USING_TEST, *NOT_INSTALLING])


def test_an_install_says_what_it_is_doing(fresh: Path):
    told = re.findall(r"^echo '(.*)'$", made(fresh, '-n', 'demo'), re.MULTILINE)
    assert [line.split()[0] for line in told] == ['Creating', 'Installing', 'Compiling']
    assert all(len(line) <= 80 and line.endswith('.') for line in told)
