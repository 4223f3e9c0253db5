"""Which package imports which, where `make check` cannot look: import-linter reads no compiled module."""
import re
import tomllib
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
