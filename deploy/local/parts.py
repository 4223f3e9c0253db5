"""A real Kafka 4 broker and a real Triton server without Docker, on free ports of 127.0.0.1.

`Kafka(folder)` and `Triton(folder)` can be started, stopped, paused and killed. A restart uses the same ports and data.
The command line is in stack.py.
"""
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from deploy.local.install import HERE, ROOT, install_kafka, install_triton
from deploy.local.processes import (
    HOST,
    OR_DOCKER,
    PartError,
    answers,
    free_ports,
    run_to_end,
    started_at,
    stop_process,
    tail,
    until,
)
from stream.scoring.repository import write_repository

SHIPPED = ROOT / 'triton_models' / 'shopper' / '1'
START_SECONDS_MAX = 90.0


# Waits for a word on standard input. If the input ends without it, the caller was killed: then it cleans up.
_GUARD = '''
read -r word
[ "$word" = done ] && exit
kill -s KILL -- "-$1"
rm -rf "$2" "/dev/shm/$3"*
'''


class Part:
    """A server process in its own process group, with data, log and pid file in `folder`.

    tied   when the process that started it ends, for any reason, it is killed and its folder removed
    """

    name = 'part'

    def __init__(self, folder: Path, tied: bool = True) -> None:
        self.folder = folder
        self.log = folder / f'{self.name}.log'
        self.pid_file = folder / f'{self.name}.pid'
        self.pid = 0
        self.started = 0        # clock ticks; see `started_at`
        self._tied = tied
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._was_up = False

    def start(self) -> Self:
        """Start it and wait until it answers.

        Errors   PartError with the end of its log if it ends, or does not answer in time. It is stopped then.
        """
        if self.running:
            return self
        self._ended()       # if it died by itself, remove what it left
        self.folder.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2, 3):
            try:
                self._launch()
                break
            except PartError as error:
                # Another process took the port between choosing and binding it.
                if self._was_up or attempt == 3 or 'already in use' not in str(error):
                    raise
                self._choose_ports()
        self._was_up = True
        return self

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after a time limit. Keeps data and ports for a later start."""
        try:
            if self.pid:
                self._reaping(lambda: stop_process(self.pid, self.started))
        finally:
            self._ended()

    def kill(self) -> None:
        """Send SIGKILL to its process group, like a crash. Keeps data and ports."""
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)
            self._reaping(lambda: until(lambda: not self.running, 10))
        self._ended()

    def pause(self) -> None:
        """Send SIGSTOP: its connections stay open, but it does not answer."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        os.killpg(self.pid, signal.SIGCONT)

    def restart(self) -> Self:
        """Stop it, and start it on the same ports and data."""
        self.stop()
        return self.start()

    def remove(self) -> None:
        """Stop it and remove its folder."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def running(self) -> bool:
        if self._process:
            self._process.poll()        # without this an ended child stays a zombie
        return self.pid != 0 and started_at(self.pid) == self.started

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.remove()

    # To be defined by each kind of part.
    def _choose_ports(self) -> None:
        raise NotImplementedError

    def _command(self) -> tuple[list[str], dict[str, str]]:
        """Arguments, and additions to the environment."""
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _shared_memory(self) -> str:
        """Prefix of the names of its shared memory."""
        return f'stream-none-{os.getpid()}'

    def _launch(self) -> None:
        command, environment = self._command()
        with self.log.open('ab') as log:
            begin = log.tell()
            self._process = process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder,
                env=os.environ | environment, start_new_session=True)
        self.pid, self.started = process.pid, started_at(process.pid) or 0
        self.pid_file.write_text(f'{self.pid} {self.started}\n')
        if self._tied:
            self._guard = subprocess.Popen(
                ['sh', '-c', _GUARD, 'guard', str(self.pid), str(self.folder), self._shared_memory()],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            if not until(lambda: process.poll() is not None or self._answers(), START_SECONDS_MAX):
                self._failed(f'does not answer within {START_SECONDS_MAX:.0f} s', begin)
            if process.poll() is not None:
                self._failed(f'ended with {process.returncode}', begin)
        except BaseException:
            self.kill()
            raise

    def _failed(self, what: str, begin: int) -> None:
        with self.log.open('rb') as log:
            log.seek(begin)
            end = tail(log.read().decode(errors='replace'))
        raise PartError(f'{self.name} {what}. The end of {self.log}:\n{end}\n', f'fix what the log reports{OR_DOCKER}')

    def _reaping(self, wait: Callable[[], object]) -> None:
        wait()
        if self._process:
            self._process.wait(10)

    def _ended(self) -> None:
        if self._process:
            self._process.wait(10)
        if self._guard and self._guard.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(b'done\n')
                self._guard.stdin.flush()
            self._guard.stdin.close()
            self._guard.wait(10)
        for path in Path('/dev/shm').glob(f'{self._shared_memory()}*'):
            path.unlink(missing_ok=True)
        self.pid_file.unlink(missing_ok=True)
        self._guard = self._process = None
        self.pid = self.started = 0


class Kafka(Part):
    """One process that is both broker and controller (KRaft). Replication factor 1; no record is deleted by age.

    properties   entries of server.properties that override those chosen here
    """

    name = 'kafka'

    def __init__(self, folder: Path, tied: bool = True, properties: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, tied)
        self._properties = dict(properties or {})
        self._libs = install_kafka()
        self._choose_ports()

    @property
    def brokers(self) -> str:
        """host:port"""
        return f'{HOST}:{self.port}'

    def _choose_ports(self) -> None:
        self.port, self._controller_port = free_ports(2)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        config, data = self.folder / 'server.properties', self.folder / 'data'
        settings = {
            'process.roles': 'broker,controller', 'node.id': '1',
            'controller.quorum.voters': f'1@{HOST}:{self._controller_port}',
            'listeners': f'PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{self._controller_port}',
            'advertised.listeners': f'PLAINTEXT://{HOST}:{self.port}',
            'controller.listener.names': 'CONTROLLER',
            'listener.security.protocol.map': 'PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT',
            'log.dirs': str(data),
            # A killed broker stays registered for this long, and cannot come back sooner.
            'broker.session.timeout.ms': '3000', 'broker.heartbeat.interval.ms': '500',
            'num.network.threads': '2', 'num.io.threads': '4', 'log.cleaner.dedupe.buffer.size': str(16 << 20),
            'auto.create.topics.enable': 'false',       # a misspelled topic name is an error
            'log.retention.ms': '-1',                   # recorded events are old and would be deleted at once
            'log.roll.ms': str(1 << 40),                # each week of them would open a new segment
            'offsets.topic.replication.factor': '1', 'offsets.topic.num.partitions': '8',
            'transaction.state.log.replication.factor': '1', 'transaction.state.log.min.isr': '1',
            'transaction.state.log.num.partitions': '8',
            'group.initial.rebalance.delay.ms': '0', 'group.min.session.timeout.ms': '1000',
        } | self._properties
        config.write_text(''.join(f'{key}={value}\n' for key, value in settings.items()))
        java = ['java', '-Xmx512m', '-Xms128m', '-XX:+ExitOnOutOfMemoryError',
                '-Dorg.slf4j.simpleLogger.showDateTime=true',
                '-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS', '-cp', f'{self._libs}/*']
        if not (data / 'meta.properties').exists():
            run_to_end([*java, 'kafka.tools.StorageTool', 'format', '-t', 'c3RyZWFtLWxvY2FsLWthZg', '-c', str(config)],
                       "Kafka's data folder cannot be formatted", f'check that {self.folder} can be written{OR_DOCKER}')
        return [*java, 'kafka.Kafka', str(config)], {}

    def _answers(self) -> bool:
        """Whether it answers a Metadata request, version 1, with at least one broker.

        Source   Kafka's protocol guide: a request header is API key, version, correlation id, client id.
        """
        request = struct.pack('>hhih5si', 3, 1, 7, 5, b'parts', 0)
        try:
            with socket.create_connection((HOST, self.port), timeout=2) as connection:
                connection.sendall(struct.pack('>i', len(request)) + request)
                answer = connection.recv(12, socket.MSG_WAITALL)
        except OSError:
            return False
        return len(answer) == 12 and struct.unpack('>iii', answer)[2] > 0


class Triton(Part):
    """Triton with the Python backend, which serves exported versions on the CPU.

    version_dir         folder of an exported version
    others              folders of versions of other models to serve as well
    queue_requests_max  with more requests waiting it answers UNAVAILABLE; 0: no bound
    python_model        the file that the Python backend runs
    """

    name = 'triton'

    def __init__(self, folder: Path, version_dir: Path = SHIPPED, tied: bool = True,
                 queue_requests_max: int = 0, python_model: Path = HERE / 'model.py',
                 others: Sequence[Path] = ()) -> None:
        super().__init__(folder, tied)
        self.version_dir = version_dir
        self.queue_requests_max = queue_requests_max
        self.python_model = python_model
        self.others = others
        self._installed = install_triton()
        self._choose_ports()

    @property
    def address(self) -> str:
        """host:port of the gRPC service"""
        return f'{HOST}:{self.port}'

    def _choose_ports(self) -> None:
        self.port, self.http_port, self.metrics_port = free_ports(3)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        models = self.folder / 'models'
        for version_dir in (self.version_dir, *self.others):
            write_repository(version_dir, models, 'python', self.python_model, self.queue_requests_max)
        server = self._installed / 'server'
        arguments = {
            'model-repository': models, 'backend-directory': self._installed / 'backends',
            'grpc-address': HOST, 'grpc-port': self.port, 'http-address': HOST, 'http-port': self.http_port,
            'metrics-address': HOST, 'metrics-port': self.metrics_port, 'allow-gpu-metrics': 'false',
            'disable-auto-complete-config': None, 'exit-timeout-secs': 10, 'log-info': 'false',
            'backend-config': f'python,shm-region-prefix-name={self._shared_memory()}',
        }
        libraries = f'{libpython()}:{server / "nvidia_pytriton.libs"}'
        return ([str(server / 'pytriton' / 'tritonserver' / 'bin' / 'tritonserver'),
                 *(f'--{key}' if value is None else f'--{key}={value}' for key, value in arguments.items())],
                {'LD_LIBRARY_PATH': libraries})

    def _answers(self) -> bool:
        return answers(f'http://{HOST}:{self.http_port}/v2/health/ready')

    def _shared_memory(self) -> str:
        return f'stream-triton-{self.port}-'


def libpython() -> Path:
    """The folder of this Python's shared library, which Triton's Python backend needs."""
    name = f'libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0'
    for folder in (sysconfig.get_config_var('LIBDIR'), f'/usr/lib/{sysconfig.get_config_var("MULTIARCH")}',
                   f'{sys.base_prefix}/lib'):
        if folder and (Path(folder) / name).exists():
            return Path(folder)
    package = name.removesuffix('.so.1.0')
    raise PartError(f"Triton's Python backend needs {name}.",
                    f'install it (Debian: apt-get install {package}){OR_DOCKER}')
