"""Run an exported graph for all its outputs: for evaluation and `stream predict`. Needs no torch."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime

from stream.core.features import Features, batches
from stream.scoring.artefact import ROWS_MAX


def session_of(graph: Path) -> onnxruntime.InferenceSession:
    """A graph ready to run on one thread, so that the number of cores does not change the answers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])


def run(session: onnxruntime.InferenceSession, names: Sequence[str] | None, feed: Mapping[str, np.ndarray],
        ) -> list[np.ndarray]:
    """The named outputs, all of them for None, in their order. Every output of our graphs is a plain tensor."""
    return cast(list[np.ndarray], session.run(names, feed))


def score(graph: Path, inputs: Features, rows_max: int = ROWS_MAX) -> dict[str, np.ndarray]:
    """All outputs of a model.onnx by name, rows in the order of `inputs`, at most `rows_max` of them at once."""
    session = session_of(graph)
    names = [output.name for output in session.get_outputs()]
    answers, rows = [], []
    for batch in batches(inputs, rows_max):
        found = run(session, names, {
            'categories': batch.categories, 'numbers': batch.numbers, 'counters': batch.counters,
            'row_id': batch.row_id})
        answers.append([part[:batch.windows] for part in found])        # without padding rows
        rows.append(batch.row_id[:batch.windows, 0])
    order = np.argsort(np.concatenate(rows))        # batches come by length
    return {name: np.concatenate(parts)[order] for name, *parts in zip(names, *answers, strict=True)}
