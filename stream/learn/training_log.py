"""What a training leaves behind while it runs: a state to go on from, and curves to look at.

    <state>/<run>.pt   all that the next pass depends on; of the newest pass, and whole
    <curves>/<run>/    the losses of each pass, for TensorBoard

A run is one run of passes (stream.learn.epochs), such as the pretraining, or the window's branch. A state belongs to
one run alone: it says from which weights, data and options it came, and nothing else goes on from it.
"""
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stream.errors import StateError, UsageError


@dataclass(frozen=True)
class TrainingLog:
    """Where it is kept.

    state    folder of the states; None: none is kept
    resume   whether to go on from those that are there
    curves   folder of the curves; None: none are written
    belongs  what the states depend on beside a run's weights: data, options
    """

    state: Path | None = None
    resume: bool = False
    curves: Path | None = None
    belongs: bytes = b''

    def part(self, name: str) -> 'TrainingLog':
        """That of a part of the training: folders of its own in these."""
        return replace(self, state=self.state and self.state / name, curves=self.curves and self.curves / name)

    def of(self, *belongs: Any) -> 'TrainingLog':
        """That of a training on these arrays, with these options."""
        digest = hashlib.sha256()
        for thing in belongs:
            digest.update(thing.tobytes() if hasattr(thing, 'tobytes') else repr(thing).encode())
        return replace(self, belongs=digest.digest())

    def key(self, run: str, weights: Mapping[str, torch.Tensor]) -> str:
        """What a state of the run must have come from: its weights at the start, and what `of` was given."""
        digest = hashlib.sha256(self.belongs + run.encode())
        for name, tensor in weights.items():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, run: str, state: dict[str, Any]) -> None:
        """Put the run's newest state in the place of the one before."""
        if self.state is None:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        scratch = self.state / f'{run}.writing'
        torch.save(state, scratch)
        os.replace(scratch, self.state / f'{run}.pt')

    def saved(self, run: str, key: str) -> dict[str, Any] | None:
        """The state to go on from; None where there is none, or where the training is to begin anew.

        Errors   UsageError where it is of another training, StateError where it cannot be read.
        """
        if self.state is None or not self.resume or not (path := self.state / f'{run}.pt').is_file():
            return None
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            raise StateError(f'{path} cannot be read: {error}.', do='train without --resume.') from error
        if state['key'] != key:
            raise UsageError(f'{path} is of a training with other data, options or releases.',
                             do='give the same command as before the cut, or train without --resume.')
        return state

    @contextmanager
    def plotter(self, run: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """What is given the figures of each pass, by name."""
        if self.curves is None:
            yield lambda number, figures: None
            return
        try:
            # Here and not above: only its users should need it.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError('Curves need TensorBoard, which is not installed.',
                             do='install it (pip install tensorboard), or leave --tensorboard out.') from error
        with SummaryWriter(self.curves / run) as writer:
            def plot(number: int, figures: Mapping[str, float]) -> None:
                for name, value in figures.items():
                    writer.add_scalar(name, value, number)
                writer.flush()

            yield plot


NO_LOG = TrainingLog()     # of whoever keeps nothing
