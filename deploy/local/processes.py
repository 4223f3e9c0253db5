"""Processes of this machine: free ports, commands run to their end, and servers found again by their pid files."""
import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from stream.errors import StreamError

HOST = '127.0.0.1'
OR_DOCKER = ', or use Docker instead: docker compose up.'
STOP_SECONDS_MAX = 20.0
RUN_SECONDS_MAX = 900


class PartError(StreamError):
    """A local part cannot be fetched, started or stopped."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, below those that the system gives to outgoing connections: a client
    that tries again and again while its server is away could otherwise be given the server's own port, and keep it."""
    try:
        end = int(Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split()[0])
    except (OSError, ValueError):
        end = 32_768
    for _ in range(200):
        port = random.randrange(10_000, end) if end > 11_000 else 0
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            return probe.getsockname()[1]
    raise PartError('There is no free port on 127.0.0.1.', 'stop what listens there.')


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    ports: set[int] = set()
    while len(ports) < count:       # ends: `free_port` draws from thousands, or raises
        ports.add(free_port())
    return list(ports)


def answers(url: str) -> bool:
    """Whether a server of this machine says 200, whatever proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def started_at(pid: int) -> int | None:
    """When a running process started, in clock ticks since boot; None where there is none. With the pid it names a
    process for good: pids come again."""
    try:
        state, *fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return None if state in 'ZX' else int(fields[18])


def stop_process(pid: int, started: int, seconds_max: float = STOP_SECONDS_MAX) -> bool:
    """SIGTERM, and SIGKILL to its whole group when it has not ended in time; False where it was gone already."""
    if started_at(pid) != started:
        return False
    for number, bound in ((signal.SIGTERM, seconds_max), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
        if until(lambda: started_at(pid) != started, bound):
            with contextlib.suppress(ProcessLookupError):       # children that outlived it
                os.killpg(pid, signal.SIGKILL)
            return True
    raise PartError(f'Process {pid} does not end.', 'look at what it waits for (ps, /proc).')


def recorded(pid_file: Path) -> tuple[int, int] | None:
    """pid and start of the process that a part's pid file names, where it still runs."""
    try:
        pid, started = map(int, pid_file.read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    return (pid, started) if started_at(pid) == started else None


def until(condition: Callable[[], bool], seconds_max: float) -> bool:
    """Wait for a condition; False where it does not come in time."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def tail(text: str, lines: int = 30) -> str:
    """The last lines of a text."""
    return '\n'.join(text.strip().splitlines()[-lines:])


def run_to_end(command: Sequence[str], problem: str, do: str) -> None:
    """Run a command. Errors: PartError with the end of its output where it fails, or takes too long."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors='replace', timeout=RUN_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired as error:
        raise PartError(f'{problem}: no end within {RUN_SECONDS_MAX} s.', do) from error
    if done.returncode:
        raise PartError(f'{problem}:\n{tail(done.stdout)}\n', do)
