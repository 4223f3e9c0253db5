"""Events in, a calibrated model out: read from top to bottom.

    1 examples     what was known at a moment, and what came after (stream.learn.dataset)
    2 counters     the linear branch, to its optimum
    3 window       the backbone on all tasks; the best epoch by validation loss is kept
    4 calibration  the branches mixed, probabilities made honest (stream.learn.calibrate)

One thread and deterministic kernels throughout: on one machine the same options give the same weights.
"""
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from stream.core.features import padded
from stream.core.window import DAY_MS, WindowLimits
from stream.errors import UsageError
from stream.learn.backbones import BackboneOptions, EncoderOptions, make_backbone
from stream.learn.bounds import Count, NotNegative, Part, Positive, Share
from stream.learn.calibrate import SETTLED_ROWS_MIN, calibrate
from stream.learn.dataset import (
    HORIZON_DAYS,
    SPEND_DAYS,
    SPEND_SOON_DAYS,
    ExampleOptions,
    Examples,
    History,
    part_of,
    sample,
)
from stream.learn.model import ShopperModel, losses
from stream.learn.tuning import learning_rate, pretrained
from stream.scoring.artefact import ROWS_MAX

TEXT_ROWS_MAX = 16      # a text has several times as many tokens as a window has slots, and its reader is large
YEAR = ('year_sin', 'year_cos')
YEARS_MIN = 2
_LENGTH_NOISE = 8       # slots: neighbours in a batch are about as long as one another, and not always the same


@dataclass(frozen=True)
class FitOptions:
    """How to learn.

    examples_max      moments of training at most: fewer cut-offs are drawn of each user where there are many users
    validation_share  of the users, for the best epoch and the mixing of the branches
    tiers             tiers of spend: 0 is nothing, the others are equally many of those who spend
    refund            whether it learns the risk head: a refund or a cancelled order, for service and never for credit
    rows_per_epoch    moments drawn for each pass
    learning_rate     at its peak, after the first `warmup_share` of all steps; a cosine to 0 follows; pretrained
                      weights have one of their own
    clip_norm         longest gradient
    patience          epochs without a better validation loss before training stops
    counters_decay    the linear branch's ridge: so many rows' worth of evidence for a weight of 0
    task_weights      factors of the losses
    """

    seed: int = 7
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    examples_max: Count = 120_000
    validation_share: Part = 0.15
    tiers: int = 5
    refund: bool = True
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    epochs: Count = 8
    rows_per_epoch: Count = 6_000
    batch_rows: Count = 128
    learning_rate: NotNegative = 5e-4
    weight_decay: NotNegative = 0.05
    warmup_share: Share = 0.1
    clip_norm: Positive = 1.0
    patience: Count = 3
    counters_decay: NotNegative = 30.0
    task_weights: dict[str, NotNegative] = field(
        default_factory=lambda: {'purchase': 1.0, 'refund': 0.2, 'tier': 0.5, 'spend': 0.5})


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    tier_edges  float64 [tiers - 2]: the lower bounds of tiers 2 and up, in spend of 90 days
    epochs      of each pass the losses: train, validation, and validation of each task
    data        the examples that it saw, those of the validation users included
    """

    model: ShopperModel
    tier_edges: np.ndarray
    epochs: list[dict[str, float]]
    best_epoch: int
    data: Examples


def fit(history: History, users: Iterable[int], known_until_ms: int, options: FitOptions, limits: WindowLimits,
        console: Console) -> Fitted:
    """Train on these users with labels that are settled before `known_until_ms`.

    Errors   UsageError where the events hold nothing to learn from.
    Promise  on one machine the same options give the same weights.
    """
    with _reproducible(options.seed):
        return _fit(history, list(users), known_until_ms, options, limits, console)


def _fit(history: History, users: list[int], known_until_ms: int, options: FitOptions, limits: WindowLimits,
         console: Console) -> Fitted:
    began = time.monotonic()

    # 1 examples

    moments = options.examples.moments_per_user
    cutoffs = min(options.examples.cutoffs_per_user, max(2, round(options.examples_max / max(len(users), 1) - moments)))
    data = sample(history, users, history.start_ms, known_until_ms, ExampleOptions(cutoffs, moments), limits,
                  options.seed)
    held_users = [user for user in users
                  if part_of(history.user_ids[user], (options.validation_share,), options.seed) == 0]
    held_out = np.isin(data.user, held_users)
    if held_out.all() or not held_out.any():
        raise UsageError(f'{len(users)} users are too few to train on some and validate on others.',
                         do='use a recording of more users.')
    bought, spend = data.labels.bought, _spend(data)
    if not (bought > 0).any():
        raise UsageError('Nobody buys anything after any of the moments.', do='use a recording with purchases.')
    paying = spend[~held_out & (spend > 0)]
    tier_edges = (np.quantile(paying, np.linspace(0, 1, options.tiers)[1:-1]).astype(float) if len(paying)
                  else np.arange(1.0, options.tiers - 1))
    labels = (torch.from_numpy(np.column_stack([bought, data.labels.refunded])),        # [n, BINARY]
              torch.from_numpy(tier_of(spend, tier_edges)), torch.from_numpy(spend))
    settled = ', '.join(f'{days} d {share:.0%}' for days, share
                        in zip(HORIZON_DAYS, (~np.isnan(bought)).mean(0), strict=True))
    console.print(f'  {len(data):,} moments of {len(np.unique(data.user)):,} users; settled: {settled}')

    # 2 counters

    model = ShopperModel(make_backbone(options.backbone, options.encoder), options.tiers, options.refund)
    counters = torch.from_numpy(data.inputs.counters)
    # Of one year, its phase is but another name of the time since the recording began.
    ignored = YEAR if known_until_ms - history.start_ms < YEARS_MIN * 365 * DAY_MS else ()
    model.counters.fit_normal(counters[~held_out], ignored)
    _fit_counters(model, counters, labels, ~held_out, options)

    # 3 window

    with torch.no_grad():
        model.head.bias.copy_(model.counters.head.bias)     # the first step already tells the base rates
    train_rows, validation_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    epoch_rows = min(options.rows_per_epoch, len(train_rows))
    optimizer, schedule = _optimizer(model, options, options.epochs * math.ceil(epoch_rows / options.batch_rows))
    moving = _moving(model)
    epochs, best, best_epoch, best_weights = [], math.inf, 0, model.state_dict()
    rng = np.random.default_rng(options.seed)
    for epoch in range(options.epochs):
        model.train()
        trained = 0.0
        drawn = _chunks(data, rng.choice(train_rows, epoch_rows, replace=False), options.batch_rows, rng)
        for rows in track([drawn[place] for place in rng.permutation(len(drawn))], f'epoch {epoch + 1}',
                          console=console, transient=True, disable=not console.is_terminal):
            parts = losses(_window_logits(model, data, rows), *(label[rows] for label in labels))
            loss = _total(parts, options)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moving, options.clip_norm, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            trained += loss.item() * len(rows) / epoch_rows
        model.eval()
        parts = losses(window_logits(model, data, validation_rows), *(label[validation_rows] for label in labels))
        validation = float(_total(parts, options))
        epochs.append({'train': trained, 'validation': validation,
                       **{task: float(part) for task, part in parts.items()}})
        console.print(f'  epoch {epoch + 1}/{options.epochs}  train {trained:.4f}  validation {validation:.4f}  '
                      f'{time.monotonic() - began:.0f} s')
        if validation < best:
            best, best_epoch = validation, epoch + 1
            best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        elif epoch + 1 - best_epoch >= options.patience:
            console.print(f'  no better for {options.patience} epochs: stopped')
            break
    model.load_state_dict(best_weights)
    model.eval()

    # 4 calibration

    with torch.no_grad():
        by_window, by_counters = window_logits(model, data, np.arange(len(data))), model.counters(counters)
    calibrate(model, by_window, by_counters, data, labels, held_out)
    return Fitted(model, tier_edges, epochs, best_epoch, data)


def _spend(data: Examples) -> np.ndarray:
    """The spend to learn from. Where a recording is too short to settle it, that of fewer days stands for it, as if it
    went on like that."""
    spend = data.labels.spend
    if np.isfinite(spend).sum() >= SETTLED_ROWS_MIN:
        return spend
    return data.labels.spend_soon * np.float32(SPEND_DAYS / SPEND_SOON_DAYS)


def tier_of(spend: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Tier of each spend, int64: 0 for nothing, else 1 + the number of edges at or below it; -1 where it is NaN."""
    tiers = np.where(spend > 0, 1 + np.searchsorted(edges, spend, side='right'), 0)
    return np.where(np.isnan(spend), -1, tiers).astype(np.int64)


def window_logits(model: ShopperModel, data: Examples, rows: np.ndarray) -> Tensor:
    """What the window's branch says of these rows of the examples, [rows, k], without gradients."""
    order = np.argsort(np.diff(data.inputs.starts)[rows], kind='stable')
    size = rows_max(model)
    with torch.no_grad():
        parts = [_window_logits(model, data, rows[order[at:at + size]]) for at in range(0, len(rows), size)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def rows_max(model: ShopperModel) -> int:
    """How many rows it scores at once."""
    return TEXT_ROWS_MAX if any(True for _ in pretrained(model.backbone)) else ROWS_MAX


def _window_logits(model: ShopperModel, data: Examples, rows: np.ndarray) -> Tensor:
    batch = padded(data.inputs, rows, max(1, int(np.diff(data.inputs.starts)[rows].max())))
    return model.window_logits(torch.from_numpy(batch.categories), torch.from_numpy(batch.numbers))


def _total(parts: dict[str, Tensor], options: FitOptions) -> Tensor:
    return torch.stack([options.task_weights[task] * part for task, part in parts.items()
                        if options.refund or task != 'refund']).sum()


def _fit_counters(model: ShopperModel, counters: Tensor, labels: tuple[Tensor, Tensor, Tensor], chosen: np.ndarray,
                  options: FitOptions) -> None:
    """To the optimum of all tasks at once: a linear branch has one."""
    rows = torch.from_numpy(chosen)
    branch = model.counters
    x, mine = branch.normal(counters[rows]), tuple(label[rows] for label in labels)
    solver = torch.optim.LBFGS(branch.head.parameters(), max_iter=200, history_size=20, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        solver.zero_grad()
        ridge = options.counters_decay / 2 / len(x) * branch.head.weight.square().sum()
        loss = torch.stack(list(losses(branch.head(x), *mine).values())).sum() + ridge
        loss.backward()
        return loss

    solver.step(closure)


def _chunks(data: Examples, rows: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    lengths = np.diff(data.inputs.starts)[rows]
    ordered = rows[np.argsort(lengths + rng.random(len(rows)) * _LENGTH_NOISE, kind='stable')]
    return [ordered[at:at + size] for at in range(0, len(rows), size)]


def _moving(model: ShopperModel) -> list[torch.nn.Parameter]:
    """What the window's branch trains."""
    return [weight for weight in (*model.backbone.parameters(), *model.head.parameters()) if weight.requires_grad]


def _optimizer(model: ShopperModel, options: FitOptions, steps: int,
               ) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warm-up and a cosine to 0; only matrices decay, and no factors, which are nothing at 1."""
    tuned = set(pretrained(model.backbone))
    moving = _moving(model)
    rated = [(options.learning_rate, options.weight_decay, [weight for weight in moving if weight not in tuned])]
    if theirs := [weight for weight in moving if weight in tuned]:
        tuning = options.backbone.tuning
        rated.append((options.backbone.learning_rate or learning_rate(tuning),
                      0.0 if tuning == 'ia3' else options.weight_decay, theirs))
    optimizer = torch.optim.AdamW([
        {'params': [weight for weight in weights if (weight.ndim >= 2) == matrix], 'lr': rate,
         'weight_decay': decay if matrix else 0.0}
        for rate, decay, weights in rated for matrix in (True, False)])
    warmup = max(1, round(steps * options.warmup_share))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seeds set, one thread, deterministic kernels; threads and kernels are as before afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
