"""int8: a graph's large weights, and what is multiplied with them, in 8 bits.

    the graph, windows of training -> the range of each activation -> the graph with numbers of 8 bits in between

Static: every range is found once, on windows of training, so that a row's scores do not depend on the rows beside it,
as they would with ranges found anew for each batch. Weights have a scale for each of their columns, and embeddings one
for the table. What stays in float: the attention's own products, softmax, normalisation, the counters' branch and the
heads, which are small and where a rounded number would be seen.

Weights use 7 of the 8 bits: a CPU without VNNI adds pairs of products in 16 bits, which 8 bits would overflow.

Source: onnxruntime.quantization, static, QDQ format.
"""
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from stream.scoring.artefact import ROWS_MAX

_HEADS = ('/head/', '/counters/')       # names of nodes that stay in float
_MULTIPLIED = ('MatMul', 'Gemm')


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
            # What is multiplied comes out in float: the next step, adding a bias, is done in float anyway.
            extra_options={'OpTypesToExcludeOutputQuantization': list(_MULTIPLIED)})


class _Windows(CalibrationDataReader):
    """The batches one after another, shortest first, of at most so many rows."""

    def __init__(self, windows: Mapping[int, Mapping[str, np.ndarray]], rows_max: int) -> None:
        self._batches = ({name: part[at:at + rows_max] for name, part in windows[length].items()}
                         for length in sorted(windows) for at in range(0, len(windows[length]['row_id']), rows_max))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)
