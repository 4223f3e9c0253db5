"""The bench for GPUs, on the CPU: it goes every way that there is here, and says why it does not go the others."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import skip_without

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

BENCH = Path(__file__).parents[2] / 'deploy' / 'gpu' / 'bench'


def test_every_row_has_figures_or_a_reason(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, BENCH, '--device', 'cpu', '--quick', '--backbones', 'events', 'bert', '--ways', 'training',
         'torch', 'onnxruntime', 'tensorrt', '--batches', '2', '3', '--out', tmp_path],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / 'results.json').read_bytes())['results']
    run = {(row['backbone'], row['way'], row['precision'], row['batch']): row for row in results if 'reason' not in row}
    assert set(run) == {(backbone, way, precision, batch) for backbone in ('events', 'bert') for way, precision in (
        ('training', 'fp32'), ('training', 'mixed'), ('torch', 'fp32'), ('torch', 'mixed'), ('onnxruntime', 'fp32'))
        for batch in (2, 3)}
    for (_, way, precision, batch), row in run.items():
        assert row['windows_per_s'] == pytest.approx(batch / row['ms'] * 1e3)
        assert row['tflops'] == pytest.approx(row['gflop_per_window'] / 1e3 * row['windows_per_s'])
        assert row['gflop_per_window'] > 0
        if way != 'training':
            assert row['differs_by'] <= (1e-5 if precision == 'fp32' else 0.01)
    work = {(backbone, way): row['gflop_per_window'] for (backbone, way, *_), row in run.items()}
    for backbone in ('events', 'bert'):     # backward takes twice what forward does, less the first layer's inputs
        assert 2 < work[backbone, 'training'] / work[backbone, 'torch'] < 3.1
    reasons = {(row['way'], row['precision']): row['reason'] for row in results if 'reason' in row}
    assert set(reasons) == {('onnxruntime', 'mixed'), ('tensorrt', 'fp32'), ('tensorrt', 'mixed')}
    assert all(reason in (tmp_path / 'results.md').read_text() for reason in reasons.values())


def test_the_peak_is_that_of_the_card_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location('gpu_bench', BENCH / '__main__.py')
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    for card, peak in (('NVIDIA H100 80GB HBM3', (67, 989)), ('NVIDIA H100 PCIe', (51, 756)), ('Tesla T4', (8.1, 65)),
                       ('NVIDIA L4', (30.3, 121)), ('NVIDIA A100-SXM4-80GB', (19.5, 312))):
        assert (bench.peak_tflops(card, 'fp32'), bench.peak_tflops(card, 'mixed')) == peak, card
    assert bench.peak_tflops('NVIDIA GeForce RTX 4090', 'fp32') is None


def test_without_a_gpu_it_says_so(tmp_path: Path):
    import torch
    if torch.cuda.is_available():
        skip_without('a machine without a GPU')
    done = subprocess.run([sys.executable, BENCH, '--out', tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'Do: ' in done.stderr and not list(tmp_path.iterdir())
