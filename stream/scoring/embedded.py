"""The scorer inside the process: onnxruntime with the same ONNX file that Triton serves."""
import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from stream.core.features import Batch
from stream.core.scores import OUTPUT_NAMES, Outputs
from stream.errors import ModelError
from stream.scoring.artefact import load_artefact


class EmbeddedScorer:
    """Runs a model folder with onnxruntime.

    threads         of one model run; with 1 the result does not depend on the machine's core count
    off_loop        score in another thread, so that the event loop stays free; a replay needs no free loop
    windows_scored  so far
    """

    def __init__(self, version_dir: Path, threads: int = 1, rows_max: int = 256, off_loop: bool = True) -> None:
        artefact = load_artefact(version_dir)
        self.model = artefact.info
        self.manifest = artefact.manifest
        self.trained_on = artefact.manifest.trained_on
        self.tier_names = artefact.manifest.tier_names
        self.rows_max = min(rows_max, artefact.manifest.rows_max)
        self._off_loop = off_loop
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3      # errors only; they are raised as well
        try:
            self._session = onnxruntime.InferenceSession(artefact.weights, options, providers=['CPUExecutionProvider'])
        except Exception as error:      # onnxruntime's own exceptions have no common base
            raise ModelError(f'{artefact.weights} cannot be loaded: {error}.',
                             'export the model again for this version of onnxruntime.') from error
        self.windows_scored = 0

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        """Outputs of each batch. Errors: ModelError if onnxruntime refuses the inputs."""
        return await asyncio.to_thread(self.score_now, batches) if self._off_loop else self.score_now(batches)

    def score_now(self, batches: Sequence[Batch]) -> list[Outputs]:
        """The same, in the calling thread."""
        return [self._run(batch) for batch in batches]

    async def close(self) -> None:
        """Nothing is held beyond the session's memory."""

    def _run(self, batch: Batch) -> Outputs:
        try:
            outputs = self._session.run(OUTPUT_NAMES, {
                'categories': batch.categories, 'numbers': batch.numbers, 'counters': batch.counters,
                'row_id': batch.row_id})
        except Exception as error:      # onnxruntime's own exceptions have no common base
            raise ModelError(f'The model cannot run a batch of {batch.categories.shape}: {error}.',
                             'check that the model was exported by this version of the code.') from error
        self.windows_scored += batch.windows
        return Outputs(*(np.asarray(output) for output in outputs))
