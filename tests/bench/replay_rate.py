"""Rate of a replay on one core: with the constant scorer, and compared with onnxruntime alone on the same windows.

    .venv/bin/python tests/bench/replay_rate.py --events 1000000 --runs 5

With `--workers 2` it measures how many times as fast a replay with the model is with so many processes, on all cores.
The start of the processes counts.

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
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from stream.config import SHIPPED_MODEL
from stream.core.features import Batch
from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.core.scores import Outputs
from stream.replay.processes import ShardProcesses
from stream.replay.recording import Recording
from stream.replay.replay import Replay
from stream.replay.shard import ShardRecipe
from stream.replay.sharded import ShardedReplay
from stream.scoring.constant import ConstantScorer
from stream.scoring.embedded import EmbeddedScorer
from stream.simulator.shop import SimulatorOptions, simulate
from stream.state.replay_state import MemoryState, state_of_shard

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


def sharded_s(path: Path, workers: int) -> float:
    """Seconds of one replay with the model in several processes, from their start to their end."""
    began = time.perf_counter()
    recording, rules = Recording([path], 'events'), ReplayRules()
    recording.scan()
    recipe = ShardRecipe(partial(EmbeddedScorer, SHIPPED_MODEL, off_loop=False), partial(state_of_shard, None, workers),
                         rules, recording.records)
    with ShardProcesses(workers, recipe) as shards:
        ShardedReplay(recording, shards, rules, io.BytesIO(), io.BytesIO()).run()
    return time.perf_counter() - began


def measure_workers(path: Path, workers: int, runs: int) -> None:
    """Compare replays with the model that directly follow each other."""
    ratios = []
    for number in range(runs):
        one = replay_s(path, EmbeddedScorer(SHIPPED_MODEL, off_loop=False))
        several = sharded_s(path, workers)
        ratios.append(one / several)
        print(f'run {number + 1}: one process {one:.1f} s, {workers} workers {several:.1f} s; speed {loop_ms():.0f} ms',
              flush=True)
    print(f'{workers} workers, compared with one process: {spread(ratios, 2)} times as fast')


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
    parser.add_argument('--workers', type=int, default=1, help='more than 1: measure only these, on all cores')
    options = parser.parse_args()
    if options.workers == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.set_threshold(100_000, 10, 10)       # as the command does

    with TemporaryDirectory() as folder:
        many, few = Path(folder) / 'many.jsonl', Path(folder) / 'few.jsonl'
        shop = simulate(SimulatorOptions(shoppers=options.events // EVENTS_PER_SHOPPER))
        lines = list(islice(shop.lines(), options.events))
        many.write_bytes(b'\n'.join(lines) + b'\n')
        few.write_bytes(b'\n'.join(lines[:options.model_events]) + b'\n')
        if options.workers > 1:
            measure_workers(few, options.workers, options.runs)
            return
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
