"""What the local parts need: fetched once into build/parts, as pom.xml and triton-constraints.txt say.

Callers at the same time wait for each other.
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
    """The folder of the broker's jars; fetched on the first call, whoever calls meanwhile waits for that.

    Errors   PartError without Java or Maven, or where Maven fails.
    """
    java = shutil.which('java')
    if java is None:
        raise PartError('Kafka needs Java, and there is none.',
                        f'install it (Debian: apt-get install openjdk-17-jre-headless maven){OR_DOCKER}')
    pom = HERE / 'pom.xml'

    def fetch(target: Path) -> None:
        version = subprocess.run([java, '-version'], capture_output=True, text=True, check=False).stderr
        found = re.search(r'version "(\d+)', version)
        if not found or int(found[1]) < JAVA_MIN:
            raise PartError(f'Kafka 4 needs Java {JAVA_MIN} or newer, `java -version` says: {version.strip()}.',
                            f'install it (Debian: apt-get install openjdk-17-jre-headless){OR_DOCKER}')
        if shutil.which('mvn') is None:
            raise PartError('Fetching Kafka needs Maven, and there is none.',
                            f'install it (Debian: apt-get install maven){OR_DOCKER}')
        run_to_end(['mvn', '-q', '-B', '-f', str(pom), 'dependency:copy-dependencies', f'-DoutputDirectory={target}'],
                   'Maven cannot fetch Kafka', f'check that Maven reaches its repository{OR_DOCKER}')

    return _installed('kafka', pom.read_bytes(), fetch)


def install_triton() -> Path:
    """A folder with the server (`server`) and its Python backend with onnxruntime (`backends`); see `install_kafka`.

    The image of Triton is made of it too: deploy/docker/Dockerfile.
    """
    pins = HERE / 'triton-constraints.txt'
    python = f'{sys.version_info.major}.{sys.version_info.minor}'
    uv = shutil.which('uv', path=f'{ROOT / ".venv" / "bin"}{os.pathsep}{os.environ.get("PATH", "")}')

    def fetch(target: Path) -> None:
        if uv is None:
            raise PartError('Fetching Triton needs uv, and there is none.', 'run `make` targets, which install it.')
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
    """`build/parts/<name>-<hash of the pins>`: complete where it exists, since it is renamed into place."""
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
