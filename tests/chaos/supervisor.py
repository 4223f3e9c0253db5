"""A supervised worker process: it is restarted whenever it ends, and can be told to stop, leave or die."""
import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[2]
STOP_S_MAX = 30.0           # time for a worker to end after SIGTERM
console = Console(width=min(Console().width, 200) if sys.stdout.isatty() else 180)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG


class SupervisedWorker:
    """A supervised worker. It is restarted whenever it ends, until it is told to leave."""

    def __init__(self, name: str, folder: Path, config: Path, note: Callable[[str, str], None],
                 ended: Callable[['SupervisedWorker', int], None]) -> None:
        self.name = name
        self.state = folder / f'state-{name}'
        self.log = folder / f'worker-{name}.log'
        self.orders = folder / f'orders-{name}.json'
        self.peak_memory_mib = self.peak_handles = 0.0
        self.starts = 0
        self.empty_next = False
        self.expected = False       # its end is no surprise
        self._config = config
        self._note = note
        self._ended = ended
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task | None = None
        self._leaving = False
        self._log_from = 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def start(self) -> None:
        """Start it, and keep it running."""
        self._leaving = False
        self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        while not self._leaving:
            if self.empty_next:
                self.empty_next = False
                await asyncio.to_thread(shutil.rmtree, self.state, True)
            with self.log.open('ab') as log:
                log.write(f'---- start {self.starts} ----\n'.encode())
                log.flush()
                self._log_from = log.tell()
                self._process = process = await asyncio.create_subprocess_exec(
                    sys.executable, '-m', 'tests.chaos.worker', str(self.orders), 'worker', '--config',
                    str(self._config), '--set', f'state_dir={self.state}', *self._identity(),
                    cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent)
            self.starts += 1
            code = await process.wait()
            if not self.expected:
                self._ended(self, code)
            self.expected = False
            await asyncio.sleep(0.2)

    def _identity(self) -> list[str]:
        # The first worker is a static member, which is back soon after a kill; the second one joins and leaves.
        return ['--set', f'instance_id=chaos-{self.name}'] if self.name == 'a' else []

    def _up(self) -> bool:
        """Whether it has started so far that it can shut down cleanly."""
        with self.log.open('rb') as log:
            log.seek(self._log_from)
            return b'health and metrics' in log.read(1 << 16)

    def tail(self, lines: int = 3) -> str:
        """The last lines of its log."""
        with self.log.open('rb') as log:
            log.seek(max(os.path.getsize(self.log) - 4_000, 0))
            return ' | '.join(log.read().decode(errors='replace').strip().splitlines()[-lines:])

    def kill(self) -> None:
        """Send SIGKILL. It is restarted."""
        self.expected = True
        if self.running and self._process:
            self._process.kill()

    async def terminate(self) -> None:
        """Send SIGTERM twice, and wait until it has ended. It is restarted."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.expected = True
        began, up = time.monotonic(), self._up()
        process.terminate()
        try:
            async with asyncio.timeout(STOP_S_MAX):
                await asyncio.sleep(0.3)
                if process.returncode is None:
                    process.terminate()
                await process.wait()
        except TimeoutError:
            self._note('C8', f'{self.name} did not end within {STOP_S_MAX:.0f} s of SIGTERM: {self.tail()}')
            process.kill()
            await process.wait()
            return
        if process.returncode != 0 and (up or process.returncode != -signal.SIGTERM):
            self._note('C8', f'{self.name} ended with {process.returncode} after SIGTERM: {self.tail()}')
        console.print(f'    {self.name} stopped within {time.monotonic() - began:.1f} s')

    async def leave(self) -> None:
        """Send SIGTERM, and do not restart it."""
        self._leaving = True
        await self.terminate()
        if self._supervisor:
            await self._supervisor

    async def end(self) -> None:
        """Kill it if it still runs, and do not restart it."""
        self._leaving = self.expected = True
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        if self.running and self._process:
            self._process.kill()
            await self._process.wait()

    def measure(self) -> None:
        """Record memory and file handles."""
        if not self.running or not self._process:
            return
        with contextlib.suppress(OSError, StopIteration, ValueError):
            status = Path(f'/proc/{self._process.pid}/status').read_text()
            line = next(line for line in status.splitlines() if line.startswith('VmHWM'))
            self.peak_memory_mib = max(self.peak_memory_mib, int(line.split()[1]) / 1024)
            self.peak_handles = max(self.peak_handles, len(os.listdir(f'/proc/{self._process.pid}/fd')))

    def disk_mib(self) -> float:
        """Size of its state directory."""
        return sum(path.stat().st_size for path in self.state.rglob('*') if path.is_file()) / (1 << 20)
