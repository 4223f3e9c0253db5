"""Cost and gain of smaller models and of length buckets, in one table.

    .venv/bin/python -m tests.bench.small_models                # trains four models and two teachers: ten minutes
    .venv/bin/python -m tests.bench.small_models --models DIR   # keeps their graphs, and trains what is not there
    .venv/bin/python -m tests.bench.small_models --shoppers 300 --days 200 --epochs 2 --runs 3     # to try it
    .venv/bin/python -m tests.bench.small_models --triton       # and buckets through the local Triton

Models are trained on simulated shoppers and judged on users and days that they have not seen, both as `stream train`
does: AUROC and ECE of a purchase within 7 days, and the largest difference of any chance from that of the same weights
in fp32.

    fp32                 the default sizes
    int8                 the same in 8 bits (stream.learn.graph)
    pruned               trained like fp32, then half of the attention heads cut out
    small                half as wide, one layer, by itself
    distilled            as small, taught by two that are twice as wide, with a layer more
    ... + int8           each in 8 bits

Speed is that of the exported graph in onnxruntime on one thread, per second of CPU time: windows of 64 slots in batches
of 256, and the worker's own moments in two simulated shops, one in its first month and one after half a year, either
padded to 64 slots or cut as the worker cuts them. Figures are medians of interleaved rounds, a ratio is one of the same
round.
"""
import argparse
import asyncio
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
from rich.console import Console

from stream.core.events import EventRules
from stream.core.features import LENGTHS, SLOTS_MAX, Batch, Features, batches, padded
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.step_scorer import PADDING_SLOTS_MAX
from stream.learn import dataset
from stream.learn.backbones import EncoderOptions
from stream.learn.checkpoint import some_training_windows, some_windows
from stream.learn.compress import DistilOptions
from stream.learn.dataset import INTENT, ExampleOptions, Examples, SnapshotKind
from stream.learn.fit import FitOptions, fit
from stream.learn.graph import quantize, write_graph
from stream.learn.inference import score
from stream.learn.judging import quality
from stream.learn.train import split
from stream.scoring.artefact import MANIFEST, ROWS_MAX, WEIGHTS, sha256
from stream.simulator.shop import SimulatorOptions, simulate
from tests.bench.figures import Report, main, parser, say

SMALL = EncoderOptions(hidden=32, layers=1, heads=2, intermediate=64)
TIMED_WINDOWS = 1024
FULL_MIN, MIX_MIN = 3_000, 6_000
INT8_DIFFERENCE_MAX, INT8_LOSS_MAX = 0.02, 0.002
CHANCES = ('purchase_intent', 'tier_probabilities', 'churn', 'purchase', 'refund')
MIXES = {'first month': 30, 'half a year': 180}


# ---- models ----------------------------------------------------------------------------------------------------------

def trained(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], Examples]:
    """The graph of each model, and the moments that judge them. Models in the folder are not trained again."""
    shop = SimulatorOptions(shoppers=options.shoppers, days=options.days, seed=options.seed)
    history = dataset.read(simulate(shop).lines(), EventRules())
    cut_ms = history.end_ms + 1 - options.days // 4 * DAY_MS
    seen, users, test_users = split(history, cut_ms, 0.25, options.seed)
    test = dataset.sample(history, test_users, cut_ms, history.end_ms + 1, ExampleOptions(6, 4.0), WindowLimits(),
                          options.seed)
    plain = FitOptions(seed=options.seed, epochs=options.epochs, rows_per_epoch=options.rows)
    graphs = {}
    for name, fitting in {
        'fp32': plain, 'pruned': replace(plain, heads_kept=0.5), 'small': replace(plain, encoder=SMALL),
        'distilled': replace(plain, encoder=SMALL, distil=DistilOptions(2, wider=2.0)),
    }.items():
        small = 'int8' if name == 'fp32' else f'{name} + int8'
        graphs |= {each: folder / f'{each}.onnx' for each in (name, small)}
        if graphs[small].exists():
            continue
        say(f'training: {name}')
        fitted = fit(seen, users, cut_ms, fitting, WindowLimits(), Console(stderr=True, soft_wrap=True),
                     ranked=False)
        write_graph(fitted.model, some_windows(test), graphs[name])
        training = {length: {key: part.numpy() for key, part in batch.items()}
                    for length, batch in some_training_windows(fitted.data, options.seed).items()}
        quantize(graphs[name], training, graphs[small])
    return graphs, test


def judged(graph: Path, like: Path, test: Examples) -> tuple[float, float, float]:
    """AUROC and ECE of the intent, and the largest difference of a chance from that of another graph."""
    mine, theirs = score(graph, test.inputs), score(like, test.inputs)
    truth, chance = test.labels.bought[:, INTENT], mine['purchase'][:, INTENT].astype(float)
    known = ~np.isnan(truth)
    return (quality.auc(chance[known], truth[known]), quality.ece(chance[known], truth[known]),
            max(float(np.abs(mine[name] - theirs[name]).max()) for name in CHANCES))


# ---- speed -----------------------------------------------------------------------------------------------------------

def worker_moments(days: int, seed: int) -> tuple[Features, np.ndarray]:
    """Windows as the worker scores them in a simulated shop of so many days, and which rows are timed."""
    history = dataset.read(simulate(SimulatorOptions(shoppers=500, days=days, seed=seed)).lines(), EventRules())
    moments = dataset.sample(history, range(len(history.user_ids)), history.start_ms, history.end_ms + 1,
                             ExampleOptions(1, 10.0), WindowLimits(), seed)
    own = np.flatnonzero(moments.kind != SnapshotKind.CUTOFF)
    return moments.inputs, np.random.default_rng(seed).permutation(own)[:TIMED_WINDOWS]


def some(inputs: Features, rows: np.ndarray) -> Features:
    """These rows alone."""
    lengths = np.diff(inputs.starts)[rows]
    slots = np.concatenate([np.arange(inputs.starts[row], inputs.starts[row + 1]) for row in rows] or [[]]).astype(int)
    nobody = len(inputs.categories) - 1
    slots = np.append(slots, nobody)
    return Features(inputs.categories[slots], inputs.numbers[slots], np.concatenate([[0], np.cumsum(lengths)]),
                    inputs.counters[rows], np.zeros(0, np.int64))


def workloads(test: Examples, seed: int) -> dict[str, list[Batch]]:
    full = np.flatnonzero(np.diff(test.inputs.starts) == SLOTS_MAX)[:TIMED_WINDOWS]
    found = {'full': _uncut(some(test.inputs, full))}
    for name, days in MIXES.items():
        inputs = some(*worker_moments(days, seed))
        shares = np.bincount(np.searchsorted(LENGTHS, np.diff(inputs.starts)), minlength=len(LENGTHS)) / len(
            inputs.counters)
        say(f'{name}: ' + ', '.join(f'{share:.0%} up to {length} slots' for length, share
                                    in zip(LENGTHS, shares, strict=True)))
        found[f'{name}, padded'] = _uncut(inputs)
        found[f'{name}, buckets'] = list(batches(inputs, ROWS_MAX, PADDING_SLOTS_MAX))
    return found


def _uncut(inputs: Features) -> list[Batch]:
    rows = np.arange(len(inputs.counters))
    return [padded(inputs, rows[at:at + ROWS_MAX], SLOTS_MAX) for at in range(0, len(rows), ROWS_MAX)]


def session_of(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])


def windows_per_s(session: onnxruntime.InferenceSession, work: Sequence[Batch]) -> float:
    began = time.thread_time()
    for batch in work:
        session.run(None, {'categories': batch.categories, 'numbers': batch.numbers, 'counters': batch.counters,
                           'row_id': batch.row_id})
    return sum(batch.windows for batch in work) / (time.thread_time() - began)


# ---- Triton ----------------------------------------------------------------------------------------------------------

def through_triton(graph: Path, work: dict[str, list[Batch]], runs: int, report: Report) -> None:
    """The same windows through the local Triton, in buckets and padded, by the wall clock."""
    from deploy.local.parts import SHIPPED, Triton
    from stream.config import Settings
    from tests.bench.triton import scored
    in_flight = Settings.model_fields['triton_in_flight_max'].default
    with TemporaryDirectory() as path:
        version_dir = Path(path) / 'shopper' / '1'
        shutil.copytree(SHIPPED.parent, version_dir.parent)
        shutil.copyfile(graph, version_dir / WEIGHTS)
        manifest = json.loads((version_dir / MANIFEST).read_bytes()) | {'files': {WEIGHTS: sha256(graph)}}
        (version_dir / MANIFEST).write_text(json.dumps(manifest))
        with Triton(Path(path) / 'triton', version_dir) as triton:
            for mix in MIXES:
                rates = {how: [] for how in ('padded', 'buckets')}
                for _ in range(runs):
                    for how, found in rates.items():
                        batches_ = work[f'{mix}, {how}']
                        windows = sum(batch.windows for batch in batches_)
                        found.append(windows / asyncio.run(scored(triton, batches_, in_flight)))
                for how, found in rates.items():
                    report.spread(f'Triton, {mix}, {how}', found, 'windows/s')
                report.spread(f'Triton, {mix}, buckets / padded',
                              [b / p for b, p in zip(rates['buckets'], rates['padded'], strict=True)], 'x')


def bench(options: argparse.Namespace) -> int:
    report = Report('small_models', options)
    with TemporaryDirectory() as path:
        folder = options.models or Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        graphs, test = trained(options, folder)
        work = workloads(test, options.seed)
        sessions = {name: session_of(graph) for name, graph in graphs.items()}
        for session in sessions.values():
            for batches_ in work.values():
                windows_per_s(session, batches_)    # warm
        rates = {name: {what: [] for what in work} for name in graphs}
        for _ in range(options.runs):
            for what, batches_ in work.items():
                for name, session in sessions.items():
                    rates[name][what].append(windows_per_s(session, batches_))
        rows, aurocs = [], {}
        for name, graph in graphs.items():
            like = 'fp32' if name == 'int8' else name.removesuffix(' + int8')
            aurocs[name], ece, difference = judged(graph, graphs[like], test)
            mine = {what: statistics.median(found) for what, found in rates[name].items()}
            ratio = statistics.median(own / base for own, base in zip(rates[name]['full'], rates['fp32']['full'],
                                                                      strict=True))
            gains = {mix: statistics.median(b / p for b, p in zip(rates[name][f'{mix}, buckets'],
                                                                  rates[name][f'{mix}, padded'], strict=True))
                     for mix in MIXES}
            report.spread(f'{name}: full length', rates[name]['full'], 'windows/s', at_least=FULL_MIN)
            report.spread(f'{name}: first month in buckets', rates[name]['first month, buckets'], 'windows/s',
                          at_least=MIX_MIN)
            if like != name:
                report.add(f'{name}: largest difference of a chance from fp32', difference, '1',
                           at_most=INT8_DIFFERENCE_MAX)
                report.add(f'{name}: AUROC lost', aurocs[like] - aurocs[name], '1', at_most=INT8_LOSS_MAX)
            rows.append(f'| {name} | {graph.stat().st_size / 1e6:.2f} | {aurocs[name]:.4f} | {ece:.4f} | '
                        f'{mine["full"]:,.0f} | {ratio:.2f} | ' + ' | '.join(
                            f'{mine[f"{mix}, padded"]:,.0f} | {mine[f"{mix}, buckets"]:,.0f} | {gains[mix]:.2f}'
                            for mix in MIXES) + f' | {difference:.4f} |')
        say('\n| | MB | AUROC | ECE | windows/s, 64 slots | / fp32 | ' + ' | '.join(
            f'{mix}, padded | in buckets | gain' for mix in MIXES) + ' | differs by |')
        say('|---' * (7 + 3 * len(MIXES)) + '|')
        say('\n'.join(rows) + '\n')
        if options.triton:
            through_triton(graphs['fp32'], work, options.runs, report)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--shoppers', type=int, default=1_500)
    made.add_argument('--days', type=int, default=365)
    made.add_argument('--epochs', type=int, default=12)
    made.add_argument('--rows', type=int, default=6_000, help='moments of each pass')
    made.add_argument('--seed', type=int, default=11)
    made.add_argument('--runs', type=int, default=7)
    made.add_argument('--models', type=Path, metavar='DIR', help='where the graphs are kept')
    made.add_argument('--triton', action='store_true', help='measure buckets through the local Triton too')
    main(bench, made.parse_args())
