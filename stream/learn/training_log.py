"""Files that a training writes while it runs: a state to resume from, and curves.

    <state>/<run>.pt   everything that the next epoch depends on, replaced after each epoch
    <curves>/<run>/    the losses of each epoch, for TensorBoard

A run (stream.learn.epochs) is, for example, the pretraining or the training of the window branch. A state stores a
digest of the weights, data and options that it came from, and only the same run resumes from it.
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
    """Where a training writes.

    state    folder of the states; None: keep none
    resume   whether to resume from the states that are there
    curves   folder of the curves; None: write none
    belongs  digest of what the states depend on beside a run's weights: data and options
    """

    state: Path | None = None
    resume: bool = False
    curves: Path | None = None
    belongs: bytes = b''

    def part(self, name: str) -> 'TrainingLog':
        """The log of a part of the training, in subfolders."""
        return replace(self, state=self.state and self.state / name, curves=self.curves and self.curves / name)

    def of(self, *belongs: Any) -> 'TrainingLog':
        """The log of a training with these arrays and options."""
        digest = hashlib.sha256()
        for thing in belongs:
            digest.update(thing.tobytes() if hasattr(thing, 'tobytes') else repr(thing).encode())
        return replace(self, belongs=digest.digest())

    def key(self, run: str, weights: Mapping[str, torch.Tensor]) -> str:
        """A digest of everything that the state of a run depends on: its first weights, and the arguments of `of`."""
        digest = hashlib.sha256(self.belongs + run.encode())
        for name, tensor in weights.items():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, run: str, state: dict[str, Any]) -> None:
        """Replace the run's state by a newer one."""
        if self.state is None:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        scratch = self.state / f'{run}.writing'
        torch.save(state, scratch)
        os.replace(scratch, self.state / f'{run}.pt')

    def saved(self, run: str, key: str) -> dict[str, Any] | None:
        """The state to resume from; None if there is none, or the training is to start anew.

        Errors   UsageError where it belongs to another training, StateError where it cannot be read.
        """
        if self.state is None or not self.resume or not (path := self.state / f'{run}.pt').is_file():
            return None
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            raise StateError(f'{path} cannot be read: {error}.', do='train without --resume.') from error
        if state['key'] != key:
            raise UsageError(f'{path} belongs to a training with other data, options or releases.',
                             do='give the same command as before, or train without --resume.')
        return state

    @contextmanager
    def plotter(self, run: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """A function that plots the figures of an epoch, given its number and the figures by name."""
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


NO_LOG = TrainingLog()     # writes nothing
