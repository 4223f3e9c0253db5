"""Fetches Kafka and Triton into build/parts, once: the versions in pom.xml and triton-constraints.txt.

If several processes ask at the same time, one fetches and the others wait.
"""
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from deploy.local.processes import OR_DOCKER, PartError, run_to_end

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ROOT / 'build' / 'parts'
JAVA_MIN = 17


def install_kafka() -> Path:
    """The folder with the jars of the broker. The first call fetches them.

    Errors   PartError if Java or Maven is missing, or Maven fails.
    """
    java = shutil.which('java')
    if java is None:
        raise PartError('Kafka needs Java, which is not installed.',
                        f'install it (Debian: apt-get install openjdk-17-jre-headless maven){OR_DOCKER}')
    pom = HERE / 'pom.xml'

    def fetch(target: Path) -> None:
        version = subprocess.run([java, '-version'], capture_output=True, text=True, check=False).stderr
        found = re.search(r'version "(\d+)', version)
        if not found or int(found[1]) < JAVA_MIN:
            raise PartError(f'Kafka 4 needs Java {JAVA_MIN} or newer. `java -version` says: {version.strip()}.',
                            f'install it (Debian: apt-get install openjdk-17-jre-headless){OR_DOCKER}')
        if shutil.which('mvn') is None:
            raise PartError('Fetching Kafka needs Maven, which is not installed.',
                            f'install it (Debian: apt-get install maven){OR_DOCKER}')
        run_to_end(['mvn', '-q', '-B', '-f', str(pom), 'dependency:copy-dependencies', f'-DoutputDirectory={target}'],
                   'Maven cannot fetch Kafka', f'check that Maven reaches its repository{OR_DOCKER}')

    return _installed('kafka', pom.read_bytes(), fetch)


def install_triton() -> Path:
    """A folder with the server (`server`), and its Python backend with onnxruntime (`backends`).

    deploy/docker/Dockerfile makes the image of Triton from it too. Errors: as `install_kafka`, for uv.
    """
    pins = HERE / 'triton-constraints.txt'
    python = f'{sys.version_info.major}.{sys.version_info.minor}'
    uv = shutil.which('uv', path=f'{ROOT / ".venv" / "bin"}{os.pathsep}{os.environ.get("PATH", "")}')

    def fetch(target: Path) -> None:
        if uv is None:
            raise PartError('Fetching Triton needs uv, which is not installed.',
                            'use a `make` target, which installs it.')
        install = [uv, 'pip', 'install', '--quiet', '--python', sys.executable, '--constraint', str(pins), '--target']
        do = f'check that uv reaches the package index, on Linux with Python 3.11 or 3.12{OR_DOCKER}'
        backend = target / 'backends' / 'python'
        run_to_end([*install, str(target / 'server'), '--no-deps', 'nvidia-pytriton'], 'uv cannot fetch Triton', do)
        run_to_end([*install, str(backend), 'onnxruntime', 'numpy'],
                   "uv cannot fetch the Python backend's packages", do)
        served = target / 'server' / 'pytriton' / 'tritonserver'
        stub = served / 'python_backend_stubs' / python / 'triton_python_backend_stub'
        if not stub.is_file():
            raise PartError(f'This Triton has no backend for Python {python}.', f'use Python 3.11 or 3.12{OR_DOCKER}')
        shutil.copytree(served / 'backends' / 'python', backend, dirs_exist_ok=True)
        for program in (Path(shutil.copy2(stub, backend)), served / 'bin' / 'tritonserver'):
            program.chmod(0o755)

    return _installed('triton', f'{python} {platform.machine()}'.encode() + pins.read_bytes(), fetch)


def _installed(name: str, pins: bytes, fetch: Callable[[Path], None]) -> Path:
    """The folder `build/parts/<name>-<hash of the pins>`. It is renamed into place, so if it exists it is complete."""
    target = PARTS / f'{name}-{hashlib.sha256(pins).hexdigest()[:12]}'
    if target.exists():
        return target
    PARTS.mkdir(parents=True, exist_ok=True)
    with (PARTS / f'{name}.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_name(target.name + '.part')
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                fetch(part)
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target
