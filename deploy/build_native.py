"""Compiles the modules of the package that are written in Cython, whenever the package is built or installed.

The machine's C compiler is used; where there is none, one comes from the package index (the wheel of Zig brings clang)
and goes with the build's environment.
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

FLAGS = ('-O3', '-DNDEBUG', '-fPIC', '-shared', '-fno-strict-aliasing', '-fno-sanitize=undefined', '-w')
ZIG = 'ziglang==0.15.2'


class NativeHook(BuildHookInterface):
    """Hatchling's hook of the name `custom`."""

    def dependencies(self) -> list[str]:
        return ['cython==3.3.1'] + ([] if _compiler() else [ZIG])

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        for source in sorted((Path(self.root) / 'stream').rglob('*.pyx')):
            compile_module(source)
        build_data['pure_python'] = False
        build_data['infer_tag'] = True


def compile_module(source: Path) -> None:
    """`name.pyx` to `name.<platform>.so` beside it, whole or not at all.

    Errors   CalledProcessError, with the compiler's words on stderr.
    """
    generated = source.with_suffix('.c')
    target = source.with_suffix(sysconfig.get_config_var('EXT_SUFFIX'))
    half = target.with_suffix(f'.{os.getpid()}')
    try:
        subprocess.run([sys.executable, '-m', 'cython', '-3', '--output-file', str(generated), str(source)],
                       check=True, cwd=source.parents[2])
        subprocess.run([*(_compiler() or (sys.executable, '-m', 'ziglang', 'cc')), *FLAGS,
                        f'-I{sysconfig.get_path("include")}', str(generated), '-o', str(half)], check=True)
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
