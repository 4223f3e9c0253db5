"""The model as an ONNX graph: written from torch, compared with torch, and quantized.

    ShopperModel -> model.onnx for any number of rows and slots -> the same scores as torch (parity)
                 -> int8, if asked for                          -> a row's scores do not depend on its batch

Quantization stores large weights, and what is multiplied with them, in 8 bits. It is static: every range is found once,
on training windows, so that a row's scores do not depend on the rows beside it, as they would with ranges found for
each batch. Weights have a scale per column, embeddings one per table. The rest stays in float: the attention's own
products, softmax, normalisation, the counters branch and the heads. They are small, and rounding would show there.
Weights use 7 of the 8 bits: a CPU without VNNI adds pairs of products in 16 bits, which 8 bits would overflow.

Source: onnxruntime.quantization, static, QDQ format.
"""
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch.nn.functional import pad

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS
from stream.errors import ModelError
from stream.learn.checkpoint import Checkpoint
from stream.learn.fit import rows_max
from stream.learn.inference import run
from stream.learn.model import HORIZONS, INPUT_NAMES, ShopperModel
from stream.learn.text.tuning import merged
from stream.scoring.artefact import ROWS_MAX, Precision
from stream.scoring.repository import Tensor

OPSET = 17
# How far a graph may be from torch: in any score, and in spend, which is relative for amounts above 1.
TOLERANCES = {'fp32': (1e-5, 1e-5), 'int8': (0.02, 0.1)}
NEIGHBOURS_TOLERANCE = 1e-5     # of a row alone from the same row among others
_HEADS = ('/head/', '/counters/')       # names of nodes that stay in float
_MULTIPLIED = ('MatMul', 'Gemm')

INPUTS = {'categories': Tensor('int32', (-1, 3)), 'numbers': Tensor('float32', (-1, SLOT_NUMBERS)),
          'counters': Tensor('float32', (COUNTERS,)), 'row_id': Tensor('int64', (1,))}


def outputs(model: ShopperModel) -> dict[str, Tensor]:
    """The graph's outputs in order, one row each."""
    one = Tensor('float32', (1,))
    told = {'purchase_intent': one, 'tier_probabilities': Tensor('float32', (model.tiers,)), 'expected_spend': one,
            'churn': one, 'row_id_out': Tensor('int64', (1,)), 'purchase': Tensor('float32', (HORIZONS,)),
            'typical_spend': one}
    return told | {'refund': one} if model.refund else told


def write_graph(model: ShopperModel, windows: dict[int, dict[str, torch.Tensor]], path: Path) -> None:
    """Write the model as ONNX, for any number of rows and slots. `windows`: real windows to trace it with."""
    model, example = merged(model), windows[max(windows)]
    with warnings.catch_warnings():
        # Torch deprecates this exporter; its successor needs one more package.
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        # The indices of masks and tables are never negative.
        warnings.filterwarnings('ignore', 'Exporting aten::index operator of advanced indexing', UserWarning)
        # Shapes read as Python numbers become constants; `parity` at every length shows that this is harmless.
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)    # pyright: ignore[reportPrivateImportUsage]
        torch.onnx.export(
            model, tuple(example[name] for name in INPUT_NAMES), path, dynamo=False, opset_version=OPSET,
            input_names=list(INPUT_NAMES), output_names=list(outputs(model)),
            dynamic_axes={name: {0: 'rows', 1: 'slots'} if tensor.row_shape[0] == -1 else {0: 'rows'}
                          for name, tensor in (INPUTS | outputs(model)).items()})


def parity(kept: Checkpoint, graph: Path, precision: Precision = 'fp32') -> float:
    """The largest difference between the graph and torch on the checkpoint's windows, padded to each length in turn,
    whole batches and single rows; relative for amounts above 1.

    Errors   ModelError if it is above what TOLERANCES allows.
    """
    session, names, worst = _session(graph), list(outputs(kept.model)), 0.0
    for length in LENGTHS:
        fitting = [padded(batch, length) for own, batch in kept.windows.items() if own <= length]
        for batch in (*fitting, *({name: part[:1] for name, part in batch.items()} for batch in fitting)):
            got = run(session, names, {name: part.numpy() for name, part in batch.items()})
            with torch.no_grad():
                expected = kept.model(*(batch[name] for name in INPUT_NAMES))
            for output, (mine, theirs) in zip(names, zip(got, expected, strict=True), strict=True):
                difference = _difference(output, mine, theirs.numpy())
                allowed = TOLERANCES[precision]['spend' in output]
                if not difference <= allowed:
                    raise ModelError(
                        f'The exported graph and torch differ by {difference:.1e} in {output} at length {length}, '
                        f'at most {allowed:.0e} is allowed.',
                        do='use the releases that pyproject.toml names.' if precision == 'fp32' else
                        'export it in fp32: this model loses too much in 8 bits.')
                worst = max(worst, difference)
    return worst


def check_neighbours(kept: Checkpoint, graph: Path) -> None:
    """Compare the checkpoint's windows, each alone, with the same ones in a full batch.

    Errors   ModelError if they differ by more than NEIGHBOURS_TOLERANCE: the scores would depend on the batching.
    """
    session, names = _session(graph), list(outputs(kept.model))
    for batch in kept.windows.values():
        parts = {name: part.numpy() for name, part in batch.items()}
        rows = np.arange(rows_max(kept.model)) % len(parts['row_id'])
        among = run(session, names, {name: part[rows] for name, part in parts.items()})
        for row in range(min(len(rows), len(parts['row_id']))):
            alone = run(session, names, {name: part[row:row + 1] for name, part in parts.items()})
            for output, mine, theirs in zip(names, alone, among, strict=True):
                difference = _difference(output, mine[0], theirs[row])
                if not difference <= NEIGHBOURS_TOLERANCE:
                    raise ModelError(f'A row alone and among others differ by {difference:.1e} in {output}.',
                                     do='export it in fp32.')


def _difference(output: str, mine: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative for numbers above 1. Typical spend is compared where both are above 0: at a
    probability of one half, rounding decides whether it is."""
    apart = np.abs(mine - theirs) / np.maximum(1.0, np.abs(theirs))
    return float((apart if output != 'typical_spend' else np.where((mine > 0) == (theirs > 0), apart, 0.0)).max())


def _session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3      # errors; they come as exceptions too
    return onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])


def padded(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The same windows with padding up to `length` slots."""
    missing = length - batch['categories'].shape[1]
    return batch | {name: pad(batch[name], (0, 0, 0, missing)) for name in ('categories', 'numbers')}


def quantize(graph: Path, windows: Mapping[int, Mapping[str, np.ndarray]], out: Path, rows_max: int = ROWS_MAX) -> None:
    """Write the int8 graph.

    windows   batches of training windows by length, each by input name: what finds the ranges
    rows_max  that are run at once
    Promise   the same graph and windows give the same bytes.
    """
    model = onnx.load(graph)
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = [node.name for node in model.graph.node
             if (node.op_type in _MULTIPLIED and node.input[1] in weights and not node.name.startswith(_HEADS))
             or (node.op_type == 'Gather' and node.input[0] in weights)]
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / 'prepared.onnx'
        quant_pre_process(graph, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared, out, _Windows(windows, rows_max), quant_format=QuantFormat.QDQ, nodes_to_quantize=nodes,
            op_types_to_quantize=[*_MULTIPLIED, 'Gather'], per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            # Products come out in float: the bias is added in float anyway.
            extra_options={'OpTypesToExcludeOutputQuantization': list(_MULTIPLIED)})


class _Windows(CalibrationDataReader):
    """The batches one after another, shortest first, of at most `rows_max` rows."""

    def __init__(self, windows: Mapping[int, Mapping[str, np.ndarray]], rows_max: int) -> None:
        self._batches = ({name: part[at:at + rows_max] for name, part in windows[length].items()}
                         for length in sorted(windows) for at in range(0, len(windows[length]['row_id']), rows_max))

    # None ends the batches: the base class's hint leaves it out.
    def get_next(self) -> dict[str, np.ndarray] | None:     # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)
