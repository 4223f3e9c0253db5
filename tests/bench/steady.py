"""A worker whose users have history, at a steady rate: what it uses, and how long events wait for their outputs."""
import argparse
import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stream.scoring.make import ROOT
from tests.bench.changelog import Pool, fill_changelog
from tests.bench.figures import Report
from tests.bench.live import APPEND_TIME, broker, make_topics, process_cpu_s, shop, wake_ups
from tests.bench.load import Shoppers
from tests.bench.open_loop import BURST_S, SMOOTH_S, Output, Sent, drive, latencies_ms, warm_broker
from tests.integration.running import Shop, Worker

SENDER_CORE_MAX = 0.25      # above it, the sender disturbs what it measures
LATE_MS_MAX = 10.0


@dataclass(frozen=True)
class Reading:
    """Counts of a process at one time (monotonic). Steps and rows only of our worker."""

    at_s: float
    cpu_s: float
    wake_ups: int
    steps: float = 0.0
    rows: float = 0.0

    @staticmethod
    def of(pid: int, worker: Worker | None = None) -> 'Reading':
        steps, rows = (worker.metric('stream_steps_total'), worker.metric('stream_scored_rows_total')) \
            if worker else (0.0, 0.0)
        return Reading(time.monotonic(), process_cpu_s(pid), wake_ups(pid), steps, rows)


@dataclass(frozen=True)
class Use:
    """What a process used between two readings.

    core        share of a core
    wake_ups    a second
    steps       a second
    rows        windows scored a second
    """

    core: float
    wake_ups: float
    steps: float
    rows: float

    @staticmethod
    def between(before: Reading, after: Reading) -> 'Use':
        seconds = after.at_s - before.at_s
        return Use((after.cpu_s - before.cpu_s) / seconds, (after.wake_ups - before.wake_ups) / seconds,
                   (after.steps - before.steps) / seconds, (after.rows - before.rows) / seconds)

    @property
    def rows_a_step(self) -> float:
        return self.rows / self.steps if self.steps else 0.0

    @property
    def cpu_ms_a_step(self) -> float:
        return 1000 * self.core / self.steps if self.steps else 0.0


@contextlib.contextmanager
def triton(folder: Path, with_triton: bool) -> Iterator[str]:
    """The address of a Triton server, or '' without one."""
    if not with_triton:
        yield ''
        return
    from deploy.local.parts import Triton
    with Triton(folder / 'triton') as served:
        yield served.address


@contextlib.contextmanager
def restorable(options: argparse.Namespace, users: int, window: int, scorer: str = 'constant',
               **settings: Any) -> Iterator[tuple[Shop, Shoppers, str]]:
    """A shop, its shoppers and Triton's address. A worker of it restores all users, with `window` events each.

    Without events there is nobody to restore.
    The topics keep the time of appending. There is a Triton only if that is the scorer.
    """
    with broker() as (brokers, folder), triton(folder, scorer == 'triton') as address:
        more = {'triton': address} if address else {}
        with shop(brokers, folder, options, **{
                'publish': 'all', 'scorer': scorer, 'session_timeout_ms': 120_000,
                'model': str(ROOT / 'triton_models/shopper/1')} | more | settings) as of:
            asyncio.run(warm_broker(brokers))
            make_topics(of, input=APPEND_TIME, alerts=APPEND_TIME, scores=APPEND_TIME)
            shoppers = Shoppers(users, of.partitions)
            if window:
                fill_changelog(of, shoppers, Pool(window), users)
            yield of, shoppers, address


async def used(of: Shop, pid: int, worker: Worker | None, shoppers: Shoppers, rate: float, warm_s: float,
               seconds: float, **how: Any) -> tuple[Sent, Use]:
    """Drive the shop for `warm_s` and then `seconds`; what the process used in the latter. `how`: see `drive`."""
    loop = asyncio.get_running_loop()
    beginning: asyncio.Future[float] = loop.create_future()
    driving = asyncio.create_task(drive(of, shoppers, rate, warm_s + seconds, **how,
                                        started=lambda at: loop.call_soon_threadsafe(beginning.set_result, at)))
    await asyncio.wait((driving, beginning), return_when=asyncio.FIRST_COMPLETED)
    if not beginning.done():
        await driving       # it failed
    began_s = beginning.result()
    readings = []
    for at_s in (began_s + warm_s, began_s + warm_s + seconds):
        await asyncio.sleep(max(at_s - time.monotonic(), 0))
        readings.append(await asyncio.to_thread(Reading.of, pid, worker))
    return await driving, Use.between(*readings)


def percentiles(report: Report, name: str, values_ms: np.ndarray, p50_at_most: float | None = None,
                p99_at_most: float | None = None, p999_at_most: float | None = None) -> float:
    """p50, p99 and p99.9 as figures; returns p99."""
    found = np.percentile(values_ms, (50, 99, 99.9))
    for what, value, at_most in zip(('p50', 'p99', 'p99.9'), found, (p50_at_most, p99_at_most, p999_at_most),
                                    strict=True):
        report.add(f'{name}: {what}', value, 'ms', at_most=at_most)
    return float(found[1])


def waited_ms(sent: Sent, outputs: Iterable[Output], warm_s: float,
              which: Callable[[bytes], bool] = bool) -> np.ndarray:
    """Latencies after the warm-up, of the events of some users. Errors: AssertionError if an event has no output."""
    first_ms = sent.first_ms
    later = [output for output in outputs if output.at_ms >= first_ms]
    found, missing = latencies_ms(sent, later, warm_s, which)
    assert not missing, f'{missing:,} events have no output'
    return found


def sender(report: Report, name: str, sent: Sent, seconds: float) -> None:
    """How well the open loop kept to its plan, and what it took."""
    report.add(f"{name}: the loop's own delay, p99", float(np.percentile(sent.late_ms, 99)), 'ms', at_most=LATE_MS_MAX)
    report.add(f"{name}: the loop's own share of a core", sent.cpu_s / seconds, '1', at_most=SENDER_CORE_MAX)


def add_load_options(made: argparse.ArgumentParser, users: int | str = 100_000, window: int = 22, seconds: float = 60,
                     warm_s: float = 10, tick_ms: float = SMOOTH_S * 1000) -> None:
    """Options that every steady load has."""
    made.add_argument('--users', type=type(users), default=users, help='(default: %(default)s)')
    made.add_argument('--window', type=int, default=window,
                      help='events of each user at the beginning (default: %(default)s)')
    made.add_argument('--seconds', type=float, default=seconds, help='that are measured (default: %(default)s)')
    made.add_argument('--warm-s', type=float, default=warm_s, help='seconds of load before that (default: %(default)s)')
    made.add_argument('--tick-ms', type=float, default=tick_ms,
                      help=f'the events of this many milliseconds are sent together; {BURST_S * 1000:.0f} gives bursts '
                           '(default: %(default)s)')
