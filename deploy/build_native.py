"""Compiles the modules of the package that are written in Cython, whenever the package is built or installed.

The machine's C compiler is used; where there is none, one comes from the package index (the wheel of Zig brings clang)
and goes with the build's environment. What is compiled runs on every processor of the machine's family.
"""
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stream.native import source_hash

CYTHON, ZIG = 'cython==3.3.1', 'ziglang==0.15.2'
# No `fp-contract`: where a processor can multiply and add in one instruction, the result would be rounded differently.
FLAGS = ('-O3', '-DNDEBUG', '-fPIC', '-shared', '-fno-strict-aliasing', '-ffp-contract=off', '-w')
# Zig's clang compiles for the machine that it runs on, and checks for undefined behaviour, unless it is told otherwise.
ZIG_FLAGS = ('-mcpu=baseline', '-fno-sanitize=undefined')
DARWIN_FLAGS = ('-undefined', 'dynamic_lookup')


class NativeHook(BuildHookInterface):
    """Hatchling's hook of the name `custom`."""

    def dependencies(self) -> list[str]:
        return [CYTHON] + ([] if _compiler() else [ZIG])

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        headers = Path(sysconfig.get_path('include'))
        if not (headers / 'Python.h').exists():
            raise SystemExit(f"{headers} has no Python.h, so that the package's compiled modules cannot be made. "
                             'Do: install the headers of this Python (Debian: apt-get install python3-dev).')
        for source in sorted((Path(self.root) / 'stream').rglob('*.pyx')):
            compile_module(source, headers)
        build_data['pure_python'] = False
        build_data['infer_tag'] = True


def compile_module(source: Path, headers: Path) -> None:
    """`name.pyx` to `name.<platform>.so` beside it, whole or not at all, unless it is there.

    Errors   CalledProcessError, with the compiler's words on stderr.
    """
    digest = source_hash(source)
    generated = source.with_suffix('.c')
    target = source.with_suffix(sysconfig.get_config_var('EXT_SUFFIX'))
    if target.exists() and digest.encode() in target.read_bytes():
        return      # it is of this source already
    half = target.with_suffix(f'.{os.getpid()}')
    compiler = _compiler() or (sys.executable, '-m', 'ziglang', 'cc', *ZIG_FLAGS)
    flags = (*FLAGS, *(DARWIN_FLAGS if sys.platform == 'darwin' else ()),
             f'-DSOURCE_HASH="{digest}"', f'-I{headers}')
    try:
        subprocess.run([sys.executable, '-m', 'cython', '-3', '--output-file', str(generated), str(source)],
                       check=True, cwd=source.parents[2])
        subprocess.run([*compiler, *flags, str(generated), '-o', str(half)], check=True)
        half.replace(target)
    finally:
        generated.unlink(missing_ok=True)
        half.unlink(missing_ok=True)


def _compiler() -> tuple[str, ...]:
    named = shlex.split(os.environ.get('CC', ''))
    if named:
        return tuple(named)
    found = shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')
    return (found,) if found else ()
