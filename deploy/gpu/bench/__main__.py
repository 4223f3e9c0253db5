"""How fast each backbone trains and scores on a GPU, and how much of the card's arithmetic that uses.

    python deploy/gpu/bench                         # on the GPU; writes build/gpu-bench/results.json and results.md
    python deploy/gpu/bench --device cpu --quick    # tiny models on the CPU: whether it works

Every way (see ways.py) at batches of 64 to 4,096 full windows. A figure is the median of calls that take one second
together, after warm-up; it includes the copies to the card and back. The share of the peak is the products counted by
torch's own counter, times the rate, in the card's dense peak by its name (PEAKS). What cannot be run stands in the
table with its reason.
"""
import argparse
import copy
import functools
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault('NVIDIA_TF32_OVERRIDE', '0')      # before torch: fp32 is what it says, in every library
import numpy as np
import torch
from models import BACKBONES, make_model, windows
from torch.utils.flop_counter import FlopCounterMode
from ways import PRECISIONS, WAYS, NotHereError, Run, half_of, open_way

from stream.core.features import SLOTS_MAX
from stream.learn.graph import write_graph
from stream.learn.model import ShopperModel

ROOT = Path(__file__).parents[3]
BATCHES, QUICK_BATCHES = (64, 256, 1024, 4096), (2, 4)
SECONDS, WARM_CALLS = 1.0, 3
# Dense TFLOP/s of fp32 (no tensor cores) and of 16 bits, from the vendor's data sheets. Of two that fit, the longer.
PEAKS = {'H200': (67, 989), 'H100': (67, 989), 'H100 PCIe': (51, 756), 'A100': (19.5, 312), 'L40S': (91.6, 362),
         'L4': (30.3, 121), 'A10': (31.2, 125), 'V100': (15.7, 125), 'T4': (8.1, 65)}
CHANCES = ('purchase_intent', 'churn', 'tier_probabilities', 'purchase', 'refund')


def peak_tflops(card: str, precision: str) -> float | None:
    """The card's peak; None where its name is not among PEAKS."""
    words = card.replace('-', ' ').split()
    fitting = [name for name in PEAKS if all(word in words for word in name.split())]
    return PEAKS[max(fitting, key=len)][precision == 'mixed'] if fitting else None


class Subject:
    """One backbone's model, and what is the same for every way in which it is run, found when first asked for."""

    def __init__(self, backbone: str, quick: bool, folder: Path) -> None:
        self.backbone, self._folder = backbone, folder
        self._made = make_model(backbone, quick)
        self._tflops: dict[bool, float] = {}

    def model(self) -> ShopperModel:
        """A copy of its own for each way."""
        return copy.deepcopy(self._made)

    def graph(self) -> Path:
        """The model as ONNX."""
        path = self._folder / f'{self.backbone}.onnx'
        if not path.is_file():
            write_graph(self.model(), {SLOTS_MAX: windows(2)}, path)
        return path

    def tflop(self, training: bool) -> float:
        """Products and sums that one window takes, in 10^12."""
        if training not in self._tflops:
            run = open_way('training' if training else 'torch', self.model(), self.graph, 'cpu', 'fp32')
            with FlopCounterMode(display=False) as counter:
                run(windows(2))
            self._tflops[training] = counter.get_total_flops() / 2 / 1e12
        return self._tflops[training]

    @functools.cached_property
    def answers(self) -> dict[str, np.ndarray]:
        """What torch gives in fp32 on the CPU for two windows."""
        return open_way('torch', self.model(), self.graph, 'cpu', 'fp32')(windows(2))

    def differs_by(self, run: Run) -> float:
        """The largest difference of any chance from `answers`."""
        mine = run(windows(2))
        return max(float(np.abs(mine[name] - self.answers[name]).max()) for name in CHANCES)


def seconds_of(run: Run, rows: int, seconds: float) -> float:
    """Median seconds of one call, of `seconds` together at least. Answers lie in the machine's memory: a call is over
    when it returns."""
    batch, found, began = windows(rows), [], time.perf_counter()
    for _ in range(WARM_CALLS):
        run(batch)
        if time.perf_counter() - began > seconds:
            break
    while sum(found) < seconds or not found:
        began = time.perf_counter()
        run(batch)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measured(subject: Subject, way: str, precision: str, options: argparse.Namespace, card: str) -> Iterator[dict]:
    """A figure of each batch size, or the reason why there is none."""
    about = {'backbone': subject.backbone, 'way': way, 'precision': precision}
    try:
        run = open_way(way, subject.model(), subject.graph, options.device, precision)
        tflop = subject.tflop(way == 'training')
        difference = None if way == 'training' else subject.differs_by(run)
    except Exception as error:      # noqa: BLE001  (whatever is missing here: the table says it, and the others go on)
        yield about | {'reason': _reason(error)}
        return
    peak = peak_tflops(card, precision)
    for rows in options.batches:
        try:
            seconds = seconds_of(run, rows, options.seconds)
        except Exception as error:  # noqa: BLE001  (out of memory, mostly: larger batches are not tried)
            yield about | {'batch': rows, 'reason': _reason(error)}
            return
        rate = rows / seconds
        yield about | {'batch': rows, 'ms': seconds * 1e3, 'windows_per_s': rate, 'gflop_per_window': tflop * 1e3,
                       'tflops': tflop * rate, 'share_of_peak': tflop * rate / peak if peak else None,
                       'differs_by': difference}


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return str(error) if isinstance(error, NotHereError) else f'{type(error).__name__}: {text[0][:160] if text else ""}'


def table(machine: dict[str, str], rows: list[dict]) -> str:
    """Markdown."""
    lines = [', '.join(f'{name} {value}' for name, value in machine.items()), '',
             '| backbone | way | precision | batch | ms | windows/s | TFLOP/s | of the peak | differs by |',
             '|---|---|---|---|---|---|---|---|---|']
    for row in rows:
        about = f'| {row["backbone"]} | {row["way"]} | {row["precision"]} | {row.get("batch", "")} |'
        if 'reason' in row:
            lines.append(f'{about} not run: {row["reason"].replace("|", "/")} | | | | |')
            continue
        share = '' if row['share_of_peak'] is None else f'{row["share_of_peak"]:.1%}'
        difference = '' if row['differs_by'] is None else f'{row["differs_by"]:.0e}'
        lines.append(f'{about} {row["ms"]:.2f} | {row["windows_per_s"]:,.0f} | {row["tflops"]:.2f} | {share} | '
                     f'{difference} |')
    return '\n'.join(lines) + '\n'


def main() -> int:
    """The command line; exit code 2 where there is no such device."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    made.add_argument('--quick', action='store_true', help='tiny models, small batches, one call each')
    made.add_argument('--backbones', nargs='+', choices=BACKBONES, default=BACKBONES)
    made.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS)
    made.add_argument('--precisions', nargs='+', choices=PRECISIONS, default=PRECISIONS)
    made.add_argument('--seconds', type=float, help=f'of each figure, default {SECONDS}')
    made.add_argument('--batches', nargs='+', type=int, help=f'default: {BATCHES}')
    made.add_argument('--out', type=Path, default=ROOT / 'build' / 'gpu-bench')
    options = made.parse_args()
    options.batches = options.batches or (QUICK_BATCHES if options.quick else BATCHES)
    options.seconds = options.seconds or (0.0 if options.quick else SECONDS)
    if options.device == 'cuda' and not torch.cuda.is_available():
        print('torch sees no GPU. Do: install torch for CUDA, or measure with --device cpu.', file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if options.device == 'cuda' else platform.processor() or platform.machine()
    machine = {'device': card, 'torch': torch.__version__, 'mixed': str(half_of(options.device)),
               'sizes': 'tiny' if options.quick else 'published'}
    rows = []
    options.out.mkdir(parents=True, exist_ok=True)
    for backbone in options.backbones:
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(backbone, options.quick, Path(folder))
            for way, precision in itertools.product(options.ways, options.precisions):
                for row in measured(subject, way, precision, options, card):
                    print(row, file=sys.stderr, flush=True)
                    rows.append(row)
                if options.device == 'cuda':
                    torch.cuda.empty_cache()
        # After each backbone, so that a run that is cut off leaves what it measured.
        (options.out / 'results.json').write_text(json.dumps({'machine': machine, 'results': rows}, indent=1) + '\n')
        (options.out / 'results.md').write_text(table(machine, rows))
    print(table(machine, rows))
    return 0


if __name__ == '__main__':
    sys.exit(main())
