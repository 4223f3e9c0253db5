"""Detects compiled modules that are out of date: a `.pyx` source has changed since the module was built.

`deploy/build_native.py` compiles the hash of the sources into each module.
"""
import hashlib
import importlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def source_hash(source: Path) -> str:
    """The hash of a `.pyx` file and of all `.pxd` declarations that it may use."""
    declarations = sorted(source.parents[1].rglob('*.pxd'))
    return hashlib.sha256(b'\0'.join(path.read_bytes() for path in [source, *declarations])).hexdigest()[:16]


def stale_modules() -> list[str]:
    """Names of the compiled modules whose hash differs from their source's. Empty if the sources are not installed."""
    stale = []
    for source in sorted(PACKAGE.rglob('*.pyx')):
        name = '.'.join([PACKAGE.name, *source.relative_to(PACKAGE).with_suffix('').parts])
        if source_hash(source) != importlib.import_module(name).SOURCE_HASH:
            stale.append(name)
    return stale
