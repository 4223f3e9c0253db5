"""Events in, a calibrated model out. Read from top to bottom.

    1 examples     snapshots of what was known, and what came after (stream.learn.dataset)
    2 counters     the linear branch, to its optimum
    3 start        the backbone from another checkpoint, or pretrained, if asked for (stream.learn.pretrain)
    4 window       the backbone on all tasks, alone or distilled from larger models (stream.learn.compress); the best
                   epoch by validation loss is kept (stream.learn.epochs)
    5 heads        the least important attention heads are removed, if asked for (stream.learn.compress)
    6 calibration  the branches mixed, outputs calibrated into probabilities (stream.learn.calibrate)
    7 ranking      what is bought next (stream.learn.ranking.ranker); it does not change the weights above

One thread and deterministic kernels throughout: on one machine the same options give the same weights.
"""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from stream.core.features import padded
from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import UsageError
from stream.learn.backbones import BackboneOptions, EncoderOptions, EventsBackbone, check_backbone, make_backbone
from stream.learn.calibrate import SETTLED_ROWS_MIN, calibrate
from stream.learn.clean import clean
from stream.learn.clean import in_words as cleaning_in_words
from stream.learn.compress import (
    DistilOptions,
    attentions,
    cut,
    expected_losses,
    importance,
    kept_heads,
    mean_logits,
    teacher_options,
)
from stream.learn.dataset import (
    HORIZON_DAYS,
    SPEND_DAYS,
    ExampleOptions,
    Examples,
    History,
    part_of,
    sample,
    tier_of,
)
from stream.learn.epochs import Rated, Run, device, mixed_precision, reproducible, run_epochs, shuffled
from stream.learn.model import ShopperModel, losses, mu_and_sigma
from stream.learn.options import Count, FieldPath, NotNegative, Part, PartOrAll, Positive, Share, names_of
from stream.learn.pretrain import PretrainOptions, pretrain, reads_text, start_from
from stream.learn.ranking.ranker import RankerOptions, Recommender, fit_recommender
from stream.learn.text.tuning import learning_rate, pretrained
from stream.learn.training_log import NO_LOG, TrainingLog
from stream.scoring.artefact import ROWS_MAX

TEXT_ROWS_MAX = 16      # a text has several times as many tokens as a window has slots, and its reader is large
YEAR = ('year_sin', 'year_cos')
YEARS_MIN = 2
_SOON = HORIZON_DAYS.index(30)


@dataclass(frozen=True)
class FitOptions:
    """How to train.

    clean             steps of `stream.learn.clean`
    examples_max      most training snapshots: with many users, fewer cut-offs are drawn per user
    validation_share  share of the users held out to choose the best epoch and the mix of the branches
    tiers             tiers of spend: 0 is no spend, the others hold equally many of those who spend
    refund            whether to train the refund head: refunds and cancelled orders, for service and never for credit
    rows_per_epoch    snapshots drawn for each epoch
    learning_rate     its peak, after the first `warmup_share` of all steps; a cosine to 0 follows. Pretrained weights
                      have their own
    clip_norm         longest gradient
    patience          epochs without a better validation loss before training stops
    counters_decay    ridge of the linear branch, in rows of evidence for a weight of 0
    ranker            how to learn what is bought next
    task_weights      weights of the tasks' losses
    start_from        folder of a checkpoint whose `events` backbone is the start
    pretrain          what the `events` backbone learns first, without labels
    distil            the teachers of the window branch
    heads_kept        share of the attention heads that are kept
    """

    seed: int = 7
    clean: tuple[str, ...] = ()
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    examples_max: Count = 120_000
    validation_share: Part = 0.15
    tiers: int = 5
    refund: bool = True
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    epochs: Count = 12
    rows_per_epoch: Count = 6_000
    batch_rows: Count = 128
    learning_rate: NotNegative = 1e-3
    weight_decay: NotNegative = 0.05
    warmup_share: Share = 0.1
    clip_norm: Positive = 1.0
    patience: Count = 5
    counters_decay: NotNegative = 30.0
    ranker: RankerOptions = field(default_factory=RankerOptions)
    task_weights: dict[str, NotNegative] = field(
        default_factory=lambda: {'purchase': 1.0, 'refund': 0.2, 'tier': 0.5, 'spend': 0.5})
    start_from: str | None = None
    pretrain: PretrainOptions | None = None
    distil: DistilOptions = field(default_factory=DistilOptions)
    heads_kept: PartOrAll = 1.0


# Flags of their own set these.
_FLAGS = {('seed',), ('clean',), ('tiers',), ('refund',), ('start_from',), ('pretrain', 'objectives'),
          ('backbone', 'name'), ('backbone', 'source'), ('backbone', 'tuning'), ('backbone', 'catalogue')}
_QUALIFIED = ('task_weights', 'ranker', 'pretrain')     # their fields' names alone say too little


def option_names() -> dict[str, FieldPath]:
    """The options that `--fit` can set: the place of each in FitOptions by its name."""
    return names_of(FitOptions(pretrain=PretrainOptions({})), _FLAGS, _QUALIFIED)


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    tier_edges   float64 [tiers - 2]: the lower bounds of tiers 2 and up, in spend of 90 days
    epochs       losses of each epoch: train, validation, and validation of each task
    data         the examples, including those of the validation users
    pretraining  losses of each epoch of pretraining
    users        the users it was trained on, as indices into the history
    removed      what each cleaning step removed, ready for JSON (stream.learn.clean)
    validation   loss on the validation users, both branches together
    recommender  None if the purchases name no items or categories, or it was not asked for
    """

    model: ShopperModel
    tier_edges: np.ndarray
    epochs: list[dict[str, float]]
    best_epoch: int
    data: Examples
    pretraining: list[dict[str, float]]
    users: list[int]
    removed: list[dict]
    validation: float
    recommender: Recommender | None


def fit(history: History, users: Iterable[int], known_until_ms: int, options: FitOptions, limits: WindowLimits,
        console: Console, log: TrainingLog = NO_LOG,
        after_epoch: Callable[[int, float], None] | None = None, ranked: bool = True) -> Fitted:
    """Train on these users with labels that are settled before `known_until_ms`.

    log          where to keep states and curves
    after_epoch  gets the number of each epoch and its validation loss; what it raises ends the training
    ranked       whether to train the ranking too, which takes some seconds more
    Errors   UsageError where the events hold nothing to learn from.
    Promise  on one machine the same options give the same weights, interrupted and resumed (log) or not.
    """
    with reproducible(options.seed):
        return _fit(history, list(users), known_until_ms, options, limits, console, log, after_epoch, ranked)


def check_fit(options: FitOptions) -> None:
    """Check the options before data is read. Errors: UsageError or ModelError where they cannot work."""
    check_backbone(options.backbone, options.encoder)
    if options.start_from is None and options.pretrain is None:
        return
    if options.backbone.name != 'events':
        raise reads_text()
    if options.start_from is not None:
        start_from(EventsBackbone(options.encoder), Path(options.start_from))


def _fit(history: History, users: list[int], known_until_ms: int, options: FitOptions, limits: WindowLimits,
         console: Console, log: TrainingLog, after_epoch: Callable[[int, float], None] | None,
         ranked: bool) -> Fitted:
    # 1 examples

    cleaned = clean(history, users, options.clean, known_until_ms)
    users = cleaned.users
    for step in cleaned.removed:
        console.print(f'  {cleaning_in_words(step)}')
    moments = options.examples.moments_per_user
    cutoffs = min(options.examples.cutoffs_per_user, max(2, round(options.examples_max / max(len(users), 1) - moments)))
    data = sample(history, users, history.start_ms, known_until_ms, ExampleOptions(cutoffs, moments), limits,
                  options.seed, cleaned.history)
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

    students, teachers = sorted(set(users) - set(held_users)), []
    for place in range(options.distil.teachers):
        console.print(f'  teacher {place + 1} of {options.distil.teachers}')
        larger = teacher_options(options, place)
        teachers.append(fit(history, students, known_until_ms, larger, limits, console, ranked=False).model)

    # 2 counters

    model = ShopperModel(make_backbone(options.backbone, options.encoder), options.tiers, options.refund)
    counters = torch.from_numpy(data.inputs.counters)
    # Within one year, the phase of the year only says how long ago the recording began.
    ignored = YEAR if known_until_ms - history.start_ms < YEARS_MIN * 365 * DAY_MS else ()
    model.counters.fit_normal(counters[torch.from_numpy(~held_out)], ignored)
    _fit_counters(model, counters, labels, ~held_out, options)
    if options.heads_kept < 1:
        attentions(model.backbone)      # fail now, not after the training
        if options.backbone.tuning == 'prefix':
            raise UsageError('The prefix has keys and values for each head, so no head can be removed.',
                             do='keep all heads, or choose another tuning.')

    # 3 start

    where = device()
    model.to(where)
    log = log.of(options, data.inputs.categories, data.inputs.numbers, bought, spend, held_out)
    if options.start_from is not None:
        start_from(model.backbone, Path(options.start_from))
    pretraining = ([] if options.pretrain is None
                   else pretrain(model.backbone, data, held_out, options.pretrain, options.seed, log, console))

    # 4 window

    taught = mean_logits([window_logits(teacher.to(where), data, np.arange(len(data))) for teacher in teachers]
                         ) if teachers else None
    teachers.clear()        # frees a GPU's memory

    with torch.no_grad():
        model.head.bias.copy_(model.counters.head.bias)     # so that training starts at the base rates
    train_rows, validation_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    epoch_rows = min(options.rows_per_epoch, len(train_rows))

    def loss(rows: np.ndarray) -> Tensor:
        mine = tuple(label[rows].to(where) for label in labels)
        with mixed_precision(where):
            logits = _window_logits(model, data, rows).float()
        own = _total(losses(logits, *mine), options)
        if taught is None:
            return own
        share = options.distil.weight
        return (1 - share) * own + share * _total(expected_losses(logits, taught[rows].to(where), *mine), options)

    epoch_numbers = count(1)

    def validation_losses() -> dict[str, float]:
        parts = losses(window_logits(model, data, validation_rows), *(label[validation_rows] for label in labels))
        return {'validation': float(_total(parts, options)), **{task: float(part) for task, part in parts.items()}}

    def validate() -> dict[str, float]:
        found = validation_losses()
        if after_epoch is not None:
            after_epoch(next(epoch_numbers), found['validation'])
        return found

    epochs, best_epoch = run_epochs(Run(
        name='window', title='epoch', module=model, weights=_rated(model, options),
        batches=shuffled(data.inputs, train_rows, epoch_rows, options.batch_rows), loss=loss, validate=validate,
        epochs=options.epochs, steps=options.epochs * math.ceil(epoch_rows / options.batch_rows),
        warmup_share=options.warmup_share, clip_norm=options.clip_norm, patience=options.patience, seed=options.seed,
    ), log, console)

    # 5 heads

    if options.heads_kept < 1:
        draw = shuffled(data.inputs, train_rows, epoch_rows, options.batch_rows)
        kept = kept_heads(importance(model.backbone, (
            _total(losses(_window_logits(model, data, rows), *(label[rows].to(where) for label in labels)), options)
            for rows in draw(np.random.default_rng(options.seed)))), options.heads_kept)
        cut(model.backbone, kept)
        console.print(f'  heads of each layer that stay: {kept}; validation {validation_losses()["validation"]:.4f}')

    # 6 calibration

    by_window = window_logits(model, data, np.arange(len(data)))
    with torch.no_grad():
        by_counters = model.cpu().counters(counters)
    calibrate(model, by_window, by_counters, data, labels, held_out)
    mixed = model.mixed(by_window, by_counters)[validation_rows]
    validation = float(_total(losses(mixed, *(label[validation_rows] for label in labels)), options))

    # 7 ranking

    recommender = fit_recommender(history, cleaned.history, users, data, known_until_ms, options.ranker,
                                  options.seed) if ranked else None
    return Fitted(model, tier_edges, epochs, best_epoch, data, pretraining, users, cleaned.removed, validation,
                  recommender)


def _spend(data: Examples) -> np.ndarray:
    """The spend to learn from. If the recording is too short for it, use the spend of fewer days, extrapolated."""
    spend = data.labels.spend
    if np.isfinite(spend).sum() >= SETTLED_ROWS_MIN:
        return spend
    return data.labels.spent[:, _SOON] * np.float32(SPEND_DAYS / HORIZON_DAYS[_SOON])


def window_logits(model: ShopperModel, data: Examples, rows: np.ndarray) -> Tensor:
    """Logits of the window branch for these rows of the examples, [rows, k], without gradients."""
    order = np.argsort(np.diff(data.inputs.starts)[rows], kind='stable')
    size = rows_max(model) if model.mix.device.type == 'cpu' else ROWS_MAX
    with torch.no_grad():
        parts = [_window_logits(model, data, rows[order[at:at + size]]).cpu() for at in range(0, len(rows), size)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def rows_max(model: ShopperModel) -> int:
    """Rows that the model scores at once."""
    return TEXT_ROWS_MAX if any(True for _ in pretrained(model.backbone)) else ROWS_MAX


def _window_logits(model: ShopperModel, data: Examples, rows: np.ndarray) -> Tensor:
    """On the model's device, with gradients if they are enabled."""
    batch = padded(data.inputs, rows, max(1, int(np.diff(data.inputs.starts)[rows].max())))
    where = model.mix.device
    return model.window_logits(torch.from_numpy(batch.categories).to(where), torch.from_numpy(batch.numbers).to(where))


def _total(parts: dict[str, Tensor], options: FitOptions) -> Tensor:
    return torch.stack([options.task_weights[task] * part for task, part in parts.items()
                        if options.refund or task != 'refund']).sum()


def _fit_counters(model: ShopperModel, counters: Tensor, labels: tuple[Tensor, Tensor, Tensor], chosen: np.ndarray,
                  options: FitOptions) -> None:
    """Fit the linear branch on all tasks at once, to its optimum.

    It starts from the mean and deviation of log spend: from far away the deviation would reach its bound, where its
    gradient is 0.
    """
    rows = torch.from_numpy(chosen)
    branch = model.counters
    x, mine = branch.normal(counters[rows]), tuple(label[rows] for label in labels)
    spent = mine[2][mine[2] > 0].log()
    if len(spent):
        with torch.no_grad():
            branch.head.bias[-2:] = mu_and_sigma(spent)
    solver = torch.optim.LBFGS(branch.head.parameters(), max_iter=200, history_size=20, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        solver.zero_grad()
        ridge = options.counters_decay / 2 / len(x) * branch.head.weight.square().sum()
        loss = torch.stack(list(losses(branch.head(x), *mine).values())).sum() + ridge
        loss.backward()
        return loss

    solver.step(closure)


def _rated(model: ShopperModel, options: FitOptions) -> list[Rated]:
    """The weights of the window branch to train. Pretrained weights have their own learning rate."""
    tuned = set(pretrained(model.backbone))
    moving = [weight for weight in (*model.backbone.parameters(), *model.head.parameters()) if weight.requires_grad]
    rated: list[Rated] = [
        (options.learning_rate, options.weight_decay, [weight for weight in moving if weight not in tuned])]
    if theirs := [weight for weight in moving if weight in tuned]:
        tuning = options.backbone.tuning
        rated.append((options.backbone.learning_rate or learning_rate(tuning),
                      0.0 if tuning == 'ia3' else options.weight_decay, theirs))
    return rated
