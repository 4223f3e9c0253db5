"""Imports that `make check` does not see: those of compiled modules, and those outside of the package."""
import ast
import importlib.util
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['importlinter']['contracts']
LAYERS = [re.split(r' [|:] ', line) for line in
          next(contract for contract in CONTRACTS if contract.get('containers') == ['stream'])['layers']]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
KNOWING = {
    'only the engine knows Faust': {'engine'}, 'only learn knows torch': {'learn'},
    'only the command line knows Typer': {'cli'}, 'only the command line and learn know Rich': {'cli', 'learn'},
}
COMPILED = sorted(path for pattern in ('*.pyx', '*.pxd') for path in (ROOT / 'stream').rglob(pattern))


@pytest.mark.parametrize('path', COMPILED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_compiled_module_imports_downwards_only(path: Path):
    own = path.relative_to(ROOT / 'stream').parts[0]
    imported = re.findall(r'^\s*(?:from|import|cimport) stream\.(\w+)', path.read_text(), re.MULTILINE)
    for name in imported:
        assert name == own or LEVEL[name] > LEVEL[own], f'{own} imports {name}'


def test_the_core_asks_for_no_time_of_day():
    for path in (ROOT / 'stream' / 'core').glob('*.py*'):
        assert not re.search(r'\b(now|utcnow|today)\(', path.read_text()), path


def test_the_contracts_name_every_package():
    packages = {path.stem for path in (ROOT / 'stream').iterdir()
                if path.suffix == '.py' or (path.is_dir() and (path / '__init__.py').exists())} - {'__init__'}
    assert set(LEVEL) == packages
    found = {contract['name']: contract.get('source_modules') for contract in CONTRACTS}
    for name, knowing in KNOWING.items():
        left = packages - {module.removeprefix('stream.') for module in found[name]}
        # The command line stands above all packages, and the core has a contract of its own.
        assert left - {'cli', 'core'} == knowing - {'cli', 'core'}, name


def test_one_module_of_the_engine_knows_faust():
    contract = next(contract for contract in CONTRACTS if 'only faust_app knows Faust' in contract['name'])
    modules = {f'stream.engine.{path.stem}' for path in (ROOT / 'stream' / 'engine').glob('*.py')}
    others = {'stream.engine.__init__', 'stream.engine.faust_app', 'stream.engine.worker'}
    assert set(contract['source_modules']) == modules - others


OUTSIDE = sorted(path for folder in ('tests', 'deploy') for path in (ROOT / folder).rglob('*.py'))


@pytest.mark.parametrize('path', OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_benches_and_local_parts_import_what_exists(path: Path):
    """Nothing is run: a bench may need hours, or a model of its own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in ('stream', 'tests', 'deploy'):
            for name in node.names:
                assert _has(str(node.module), name.name), f'{path}:{node.lineno} imports {name.name} of {node.module}'


def _has(module: str, name: str) -> bool:
    """Whether a module has this name, or a package this module. Of a compiled module the stub says what it has."""
    spec = _spec(module)
    if spec is None:
        return False
    if spec.submodule_search_locations and _spec(f'{module}.{name}'):
        return True
    if spec.origin is None:
        return False
    source = Path(spec.origin)
    if source.suffix != '.py':
        source = source.with_name(f'{module.rpartition(".")[2]}.pyi')
    return name in _names(source)


@cache
def _names(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


@cache
def _spec(module: str):
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
