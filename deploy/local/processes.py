"""Processes on this machine: free ports, commands that run to their end, and processes found by their pid files."""
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
    """A free port of 127.0.0.1, below the range that the system uses for outgoing connections.

    A client that retries while its server is down could otherwise get the server's own port, and keep it.
    """
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
    """`count` different free ports."""
    ports: set[int] = set()
    while len(ports) < count:       # this ends: `free_port` draws from thousands, or raises
        ports.add(free_port())
    return list(ports)


def answers(url: str) -> bool:
    """Whether a server on this machine answers 200. Ignores proxies set in the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def started_at(pid: int) -> int | None:
    """When a running process started, in clock ticks since boot. None if there is no such process.

    Pids are reused, but a pid and a start time together identify a process.
    """
    try:
        state, *fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return None if state in 'ZX' else int(fields[18])


def stop_process(pid: int, started: int, seconds_max: float = STOP_SECONDS_MAX) -> bool:
    """Send SIGTERM, and SIGKILL to its group if it does not end in time. Returns False if it had already ended."""
    if started_at(pid) != started:
        return False
    for number, bound in ((signal.SIGTERM, seconds_max), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
        if until(lambda: started_at(pid) != started, bound):
            with contextlib.suppress(ProcessLookupError):       # children that are still running
                os.killpg(pid, signal.SIGKILL)
            return True
    raise PartError(f'Process {pid} does not end.', 'find out what it waits for (ps, /proc).')


def recorded(pid_file: Path) -> tuple[int, int] | None:
    """Pid and start time from a pid file. None if that process does not run any more."""
    try:
        pid, started = map(int, pid_file.read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    return (pid, started) if started_at(pid) == started else None


def until(condition: Callable[[], bool], seconds_max: float) -> bool:
    """Wait for a condition. Returns False if it does not become true in time."""
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
    """Run a command. Errors: PartError with the end of its output if it fails, or takes too long."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors='replace', timeout=RUN_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired as error:
        raise PartError(f'{problem}: it did not end within {RUN_SECONDS_MAX} s.', do) from error
    if done.returncode:
        raise PartError(f'{problem}:\n{tail(done.stdout)}\n', do)
