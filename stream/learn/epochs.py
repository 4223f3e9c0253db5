"""Passes over moments until none does better: what pretraining and the window's branch have in common.

    1 go on    from the state that a training before a cut has left (stream.learn.training_log), or begin
    2 a pass   draws batches and takes a step down the loss of each
    3 judge    by the validation loss; the weights of the best pass are kept
    4 save     all that the next pass depends on, so that a training cut off after any pass ends with the same bytes

On a GPU where there is one: there matrices are multiplied in bfloat16 if it can do that while weights are learned;
losses, and all that is judged or calibrated, are in single precision like everything on a CPU.
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
from stream.learn.training_log import Journal

_LENGTH_NOISE = 8       # slots: neighbours in a batch are about as long as one another, and not always the same
# Learning rate, weight decay, and the weights that they are for.
Rated = tuple[float, float, Sequence[nn.Parameter]]


@dataclass(frozen=True)
class Course:
    """What is to be learned.

    name      of files and curves; `title` in words
    module    whose weights move
    weights   how fast they do, and how far they decay
    draw      the batches of a pass, each the rows of a step
    loss      of a batch, the mean over its rows
    judge     the losses on what is held out: their sum as 'validation', and each by name
    passes    at most; `steps` in all of them. The rates rise over the first `warmup_share` of the steps, then fall to 0
    clip_norm longest gradient
    patience  passes without a better validation loss before it stops
    """

    name: str
    title: str
    module: nn.Module
    weights: Sequence[Rated]
    draw: Callable[[np.random.Generator], Sequence[np.ndarray]]
    loss: Callable[[np.ndarray], Tensor]
    judge: Callable[[], dict[str, float]]
    passes: int
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
    """What draws a pass: so many of these rows, as batches in any order."""
    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        batches = chunks(inputs, rng.choice(rows, count, replace=False), size, rng)
        return [batches[place] for place in rng.permutation(len(batches))]

    return draw


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeds set, one thread, deterministic kernels; threads and kernels are as before afterwards."""
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
    """Where to train: on the GPU if there is one."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def device_name() -> str:
    """Where that is, in words."""
    return torch.cuda.get_device_name() if device().type == 'cuda' else 'one CPU core'


def mixed_precision(where: torch.device) -> AbstractContextManager:
    """In which a model runs forwards. A CPU, or a GPU without bfloat16, stays at single precision."""
    if where.type == 'cuda' and torch.cuda.is_bf16_supported():
        return torch.autocast('cuda', torch.bfloat16)
    return nullcontext()


def improve(course: Course, journal: Journal, console: Console) -> tuple[list[dict[str, float]], int]:
    """Give the module the weights of its best pass.

    Returns  of each pass its losses, 'train' and what the judge says; the number of the best one
    Errors   UsageError where the journal's state is of another training.
    Promise  on one machine the same course gives the same weights, on a CPU to the bit, cut off and gone on or not.
    """
    began = time.monotonic()
    module = course.module
    optimizer, schedule = _optimizer(course)
    moving = [weight for _, _, weights in course.weights for weight in weights]
    rng = np.random.default_rng(course.seed)
    epochs, best, best_epoch, best_weights = [], math.inf, 0, _copied(module)

    # 1 go on

    key = journal.key(course.name, best_weights) if journal.state else ''
    if saved := journal.saved(course.name, key):
        module.load_state_dict(saved['weights'])
        optimizer.load_state_dict(saved['optimizer'])
        schedule.load_state_dict(saved['schedule'])
        _set_chance(saved['chance'], rng)
        epochs, best, best_epoch, best_weights = (
            saved[name] for name in ('epochs', 'best', 'best_epoch', 'best_weights'))
        console.print(f'  {course.title}: going on after epoch {len(epochs)}')

    with journal.plotter(course.name) as plot:
        while len(epochs) < course.passes and len(epochs) - best_epoch < course.patience:

            # 2 a pass

            module.train()
            trained, rows_seen = 0.0, 0
            batches = course.draw(rng)
            for rows in track(batches, f'{course.title} {len(epochs) + 1}', console=console, transient=True,
                              disable=not console.is_terminal):
                loss = course.loss(rows)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(moving, course.clip_norm, error_if_nonfinite=True)
                optimizer.step()
                schedule.step()
                trained += loss.item() * len(rows)
                rows_seen += len(rows)

            # 3 judge

            module.eval()
            figures = {'train': trained / rows_seen, **course.judge()}
            epochs.append(figures)
            if figures['validation'] < best:
                best, best_epoch, best_weights = figures['validation'], len(epochs), _copied(module)

            # 4 save

            journal.save(course.name, {
                'key': key, 'weights': module.state_dict(), 'optimizer': optimizer.state_dict(),
                'schedule': schedule.state_dict(), 'chance': _chance(rng), 'epochs': epochs, 'best': best,
                'best_epoch': best_epoch, 'best_weights': best_weights})
            plot(len(epochs), figures)
            console.print(f'  {course.title} {len(epochs)}/{course.passes}  train {figures["train"]:.4f}  validation '
                          f'{figures["validation"]:.4f}  {time.monotonic() - began:.0f} s')
    if len(epochs) < course.passes:
        console.print(f'  no better for {course.patience} epochs: stopped')
    module.load_state_dict(best_weights)
    module.eval()
    return epochs, best_epoch


def _optimizer(course: Course) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warm-up and a cosine to 0; only matrices decay, and no factors, which are nothing at 1."""
    optimizer = torch.optim.AdamW([
        {'params': [weight for weight in weights if (weight.ndim >= 2) == matrix], 'lr': rate,
         'weight_decay': decay if matrix else 0.0}
        for rate, decay, weights in course.weights for matrix in (True, False)])
    warmup = max(1, round(course.steps * course.warmup_share))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, course.steps - warmup))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _chance(rng: np.random.Generator) -> dict[str, Any]:
    """Where all sources of chance stand."""
    return {'numpy': rng.bit_generator.state, 'python': random.getstate(), 'torch': torch.get_rng_state(),
            'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_chance(chance: dict[str, Any], rng: np.random.Generator) -> None:
    rng.bit_generator.state = chance['numpy']
    random.setstate(chance['python'])
    torch.set_rng_state(chance['torch'])
    if chance['cuda']:
        torch.cuda.set_rng_state_all(chance['cuda'])
