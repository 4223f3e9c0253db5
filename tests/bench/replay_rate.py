"""Rate of a replay on one core: with the constant scorer, and compared with onnxruntime alone on the same windows.

    .venv/bin/python tests/bench/replay_rate.py --events 1000000 --runs 5

Every figure is the median of interleaved runs in one process, with the smallest and the largest. `speed` is the time of
a fixed loop of plain Python next to each run. If it varies, the machine was busy with something else.
"""
import argparse
import asyncio
import gc
import io
import os
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from stream.config import SHIPPED_MODEL
from stream.core.features import Batch
from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.core.scores import Outputs
from stream.replay.recording import Recording
from stream.replay.replay import Replay
from stream.scoring.constant import ConstantScorer
from stream.scoring.embedded import EmbeddedScorer
from stream.simulator.shop import SimulatorOptions, simulate
from stream.state.replay_state import MemoryState

EVENTS_PER_SHOPPER = 170        # of the simulator's default of 180 days, rounded down


class KeepingScorer(EmbeddedScorer):
    """The embedded scorer. It keeps its inputs, so that onnxruntime can score the same again."""

    def __init__(self, version_dir: Path) -> None:
        super().__init__(version_dir, off_loop=False)
        self.asked: list[list[Batch]] = []

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        self.asked.append(list(batches))
        return await super().score(batches)


def replay_s(path: Path, scorer: Scorer) -> float:
    """Seconds of one replay, both passes over the file included."""
    began = time.perf_counter()
    recording = Recording([path], 'events')
    recording.scan()
    run = Replay(recording, MemoryState(), scorer, ReplayRules(), io.BytesIO(), io.BytesIO())
    asyncio.run(run.run())
    return time.perf_counter() - began


def loop_ms() -> float:
    """Milliseconds of a fixed loop."""
    began, total = time.perf_counter(), 0
    for number in range(2_000_000):
        total += number & 3
    return (time.perf_counter() - began) * 1000


def spread(values: list[float], digits: int = 0) -> str:
    """Median, smallest and largest."""
    return (f'{statistics.median(values):,.{digits}f} '
            f'({min(values):,.{digits}f} .. {max(values):,.{digits}f})')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--events', type=int, default=1_000_000)
    parser.add_argument('--model-events', type=int, default=60_000, help='of them, replayed with the model')
    parser.add_argument('--runs', type=int, default=5)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.set_threshold(100_000, 10, 10)       # as the command does

    with TemporaryDirectory() as folder:
        many, few = Path(folder) / 'many.jsonl', Path(folder) / 'few.jsonl'
        shop = simulate(SimulatorOptions(shoppers=options.events // EVENTS_PER_SHOPPER))
        lines = list(islice(shop.lines(), options.events))
        many.write_bytes(b'\n'.join(lines) + b'\n')
        few.write_bytes(b'\n'.join(lines[:options.model_events]) + b'\n')
        count = len(lines)
        del lines, shop

        rates, speeds, embedded, bare, windows = [], [], [], [], 0
        for number in range(options.runs):
            speeds.append(loop_ms())
            rates.append(count / replay_s(many, ConstantScorer()))
            scorer = EmbeddedScorer(SHIPPED_MODEL, off_loop=False)
            embedded.append(replay_s(few, scorer))
            windows = scorer.windows_scored
            keeping = KeepingScorer(SHIPPED_MODEL)
            replay_s(few, keeping)
            began = time.perf_counter()
            for batches in keeping.asked:
                keeping.score_now(batches)
            bare.append(time.perf_counter() - began)
            print(f'run {number + 1}: {rates[-1]:,.0f} events/s; with the model {windows / embedded[-1]:,.0f} '
                  f'windows/s, onnxruntime alone {windows / bare[-1]:,.0f}; speed {speeds[-1]:.0f} ms', flush=True)
    print(f'constant scorer, {count:,} events: {spread(rates)} events/s')
    print(f'embedded model, {windows:,} windows: {spread([windows / seconds for seconds in embedded])} windows/s')
    print(f'share of onnxruntime alone: {spread([b / e for b, e in zip(bare, embedded, strict=True)], 2)}')
    print(f'speed: {spread(speeds)} ms')


if __name__ == '__main__':
    main()
