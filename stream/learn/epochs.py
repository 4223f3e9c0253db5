"""Training epochs until the validation loss stops falling: the loop of pretraining and of the window branch.

    1 resume     from the state of an interrupted training (stream.learn.training_log), or start
    2 epoch      draw batches and take an optimizer step on the loss of each
    3 validate   compute the validation loss; the weights of the best epoch are kept
    4 save       everything that the next epoch depends on, so that an interrupted training ends with the same bytes

Training uses a GPU if there is one. If the GPU supports bfloat16, it multiplies matrices in bfloat16 while weights are
learned. Losses, validation and calibration are in single precision, as is everything on a CPU.
"""
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from stream.core.features import Features
from stream.learn.training_log import TrainingLog

_LENGTH_NOISE = 8       # slots: neighbours in a batch are about as long as one another, and not always the same
# Learning rate, weight decay, and the weights that they are for.
Rated = tuple[float, float, Sequence[nn.Parameter]]


@dataclass(frozen=True)
class Run:
    """One training run.

    name          of its files and curves; `title` is shown to people
    module        the module to train
    weights       the weights to train, with their learning rate and weight decay
    batches       draws the batches of an epoch: the rows of each
    loss          the loss of a batch, a mean over its rows
    validate      the losses on the held-out rows: their sum as 'validation', and each by name
    epochs        the most epochs to run; `steps` is the number of optimizer steps in all of them. The learning rate
                  rises over the first `warmup_share` of the steps, then falls to 0
    clip_norm     the longest gradient
    patience      epochs without a better validation loss before the run stops
    """

    name: str
    title: str
    module: nn.Module
    weights: Sequence[Rated]
    batches: Callable[[np.random.Generator], Sequence[np.ndarray]]
    loss: Callable[[np.ndarray], Tensor]
    validate: Callable[[], dict[str, float]]
    epochs: int
    steps: int
    warmup_share: float
    clip_norm: float
    patience: int
    seed: int


def chunks(inputs: Features, rows: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """These rows as batches of about the same length, shortest first."""
    lengths = np.diff(inputs.starts)[rows]
    ordered = rows[np.argsort(lengths + rng.random(len(rows)) * _LENGTH_NOISE, kind='stable')]
    return [ordered[at:at + size] for at in range(0, len(rows), size)]


def shuffled(inputs: Features, rows: np.ndarray, count: int, size: int,
             ) -> Callable[[np.random.Generator], list[np.ndarray]]:
    """A function that draws the batches of an epoch: `count` of these rows, in random order."""
    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        batches = chunks(inputs, rng.choice(rows, count, replace=False), size, rng)
        return [batches[place] for place in rng.permutation(len(batches))]

    return draw


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Set seeds, one thread and deterministic kernels; restore the threads and kernels afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')     # else a GPU's matrix product may differ
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def device() -> torch.device:
    """The device to train on: the GPU if there is one."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def device_name() -> str:
    """The name of that device."""
    return torch.cuda.get_device_name() if device().type == 'cuda' else 'one CPU core'


def mixed_precision(where: torch.device) -> AbstractContextManager:
    """The context of a forward pass: bfloat16 where the device supports it, else single precision."""
    if where.type == 'cuda' and torch.cuda.is_bf16_supported():
        return torch.autocast('cuda', torch.bfloat16)
    return nullcontext()


def run_epochs(run: Run, log: TrainingLog, console: Console) -> tuple[list[dict[str, float]], int]:
    """Train the module and give it the weights of its best epoch.

    Returns  the losses of each epoch ('train' and those of `validate`), and the number of the best epoch
    Errors   UsageError where the saved state belongs to another training.
    Promise  on one machine the same run gives the same weights, interrupted and resumed or not; on a CPU to the bit.
    """
    began = time.monotonic()
    module = run.module
    optimizer, schedule = _optimizer(run)
    moving = [weight for _, _, weights in run.weights for weight in weights]
    rng = np.random.default_rng(run.seed)
    epochs, best, best_epoch, best_weights = [], math.inf, 0, _copied(module)

    # 1 resume

    key = log.key(run.name, best_weights) if log.state else ''
    if saved := log.saved(run.name, key):
        module.load_state_dict(saved['weights'])
        optimizer.load_state_dict(saved['optimizer'])
        schedule.load_state_dict(saved['schedule'])
        _set_random_state(saved['chance'], rng)
        epochs, best, best_epoch, best_weights = (
            saved[name] for name in ('epochs', 'best', 'best_epoch', 'best_weights'))
        console.print(f'  {run.title}: going on after epoch {len(epochs)}')

    with log.plotter(run.name) as plot:
        while len(epochs) < run.epochs and len(epochs) - best_epoch < run.patience:

            # 2 epoch

            module.train()
            trained, rows_seen = 0.0, 0
            batches = run.batches(rng)
            for rows in track(batches, f'{run.title} {len(epochs) + 1}', console=console, transient=True,
                              disable=not console.is_terminal):
                loss = run.loss(rows)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(moving, run.clip_norm, error_if_nonfinite=True)
                optimizer.step()
                schedule.step()
                trained += loss.item() * len(rows)
                rows_seen += len(rows)

            # 3 validate

            module.eval()
            figures = {'train': trained / rows_seen, **run.validate()}
            epochs.append(figures)
            if figures['validation'] < best:
                best, best_epoch, best_weights = figures['validation'], len(epochs), _copied(module)

            # 4 save

            log.save(run.name, {
                'key': key, 'weights': module.state_dict(), 'optimizer': optimizer.state_dict(),
                'schedule': schedule.state_dict(), 'chance': _random_state(rng), 'epochs': epochs, 'best': best,
                'best_epoch': best_epoch, 'best_weights': best_weights})
            plot(len(epochs), figures)
            console.print(f'  {run.title} {len(epochs)}/{run.epochs}  train {figures["train"]:.4f}  validation '
                          f'{figures["validation"]:.4f}  {time.monotonic() - began:.0f} s')
    if len(epochs) < run.epochs:
        console.print(f'  no better for {run.patience} epochs: stopped')
    module.load_state_dict(best_weights)
    module.eval()
    return epochs, best_epoch


def _optimizer(run: Run) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warm-up and a cosine to 0. Only matrices decay: a gain would be useless at 0."""
    optimizer = torch.optim.AdamW([
        {'params': [weight for weight in weights if (weight.ndim >= 2) == matrix], 'lr': rate,
         'weight_decay': decay if matrix else 0.0}
        for rate, decay, weights in run.weights for matrix in (True, False)])
    warmup = max(1, round(run.steps * run.warmup_share))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, run.steps - warmup))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _random_state(rng: np.random.Generator) -> dict[str, Any]:
    """The state of every random generator."""
    return {'numpy': rng.bit_generator.state, 'python': random.getstate(), 'torch': torch.get_rng_state(),
            'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any], rng: np.random.Generator) -> None:
    rng.bit_generator.state = state['numpy']
    random.setstate(state['python'])
    torch.set_rng_state(state['torch'])
    if state['cuda']:
        torch.cuda.set_rng_state_all(state['cuda'])
