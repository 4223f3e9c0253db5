"""Whether the compiled modules are those of their sources: after a change of a `.pyx` they are not, until it is built.

`deploy/build_native.py` compiles the hash of its sources into each module.
"""
import hashlib
import importlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def source_hash(source: Path) -> str:
    """Of a `.pyx` file and of all declarations that it may use."""
    declarations = sorted(source.parents[1].rglob('*.pxd'))
    return hashlib.sha256(b'\0'.join(path.read_bytes() for path in [source, *declarations])).hexdigest()[:16]


def stale_modules() -> list[str]:
    """The compiled modules that are of another source than the one beside them; none where there are no sources."""
    stale = []
    for source in sorted(PACKAGE.rglob('*.pyx')):
        name = '.'.join([PACKAGE.name, *source.relative_to(PACKAGE).with_suffix('').parts])
        if source_hash(source) != importlib.import_module(name).SOURCE_HASH:
            stale.append(name)
    return stale
