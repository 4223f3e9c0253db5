"""Event JSON in, a checkpoint out: read from top to bottom.

    1 examples     what was known at a moment, and what came after (stream.learn.dataset)
    2 pretraining  hide slots of the training windows, guess their type and category; no label is looked at
    3 training     everything together, on the sum of the four tasks' losses; the best epoch by validation loss is kept
    4 calibration  the mean of a log-normal is all tail: scale it to the total that the validation users spent
    5 evaluation   on users and a time that training has not seen, beside baselines (stream.learn.evaluate)
    6 checkpoint   model.safetensors, config.json, metrics.json, windows.safetensors

One thread and deterministic kernels throughout: on one machine the same options give the same bytes.
"""
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy

from stream.core.events import EventRules
from stream.core.features import Batch, batches
from stream.core.scores import OUTPUT_NAMES
from stream.core.window import WindowLimits
from stream.errors import ModelError
from stream.learn import dataset
from stream.learn.dataset import Dataset, ExampleOptions, Examples
from stream.learn.evaluate import evaluate
from stream.learn.model import INPUT_NAMES, ModelOptions, ShopperModel, losses
from stream.replay.simulator import SimulatorOptions, simulate
from stream.scoring.artefact import LAYOUT, FeatureLayout

WEIGHTS_FILE, CONFIG_FILE, METRICS_FILE, WINDOWS_FILE = (
    'model.safetensors', 'config.json', 'metrics.json', 'windows.safetensors')
_SCORING_ROWS = 256
_KEPT_WINDOWS = 32      # of each length, for the check of the exported graph


@dataclass(frozen=True)
class TrainOptions:
    """What to learn from, and how.

    events          event JSON in the order in which the worker would read it; read once
    source          the data in words, for the model card
    command         what reproduces this training, for the model card
    limits          bounds of the window; serve with the same ones
    learning_rate   at its peak, after the first `warmup_share` of all steps; a cosine to 0 follows
    hidden_share    of the slots, in pretraining
    clip_norm       longest gradient
    patience        epochs without a better validation loss before training stops
    task_weights    factors of the losses; spend's is the least certain
    """

    events: Iterable[bytes]
    source: str
    command: str
    seed: int = 7
    rules: EventRules = field(default_factory=EventRules)
    limits: WindowLimits = field(default_factory=WindowLimits)
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    pretrain_epochs: int = 1
    epochs: int = 4
    batch_rows: int = 128
    learning_rate: float = 7e-4
    weight_decay: float = 0.05
    warmup_share: float = 0.1
    hidden_share: float = 0.15
    clip_norm: float = 1.0
    patience: int = 2
    task_weights: dict[str, float] = field(
        default_factory=lambda: {'intent': 1.0, 'churn': 1.0, 'tier': 0.5, 'spend': 0.5})


def simulated(shoppers: int, days: int, seed: int) -> TrainOptions:
    """Options for learning from a simulated shop; `stream train --simulate` is this."""
    shop = simulate(SimulatorOptions(shoppers=shoppers, days=days, seed=seed))
    return TrainOptions(
        shop.lines(), source=f'{shoppers:,} simulated shoppers over {days} days (seed {seed})',
        command=f'stream train --simulate {shoppers} --days {days} --seed {seed} --out DIR', seed=seed)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and its papers.

    config   options, data, tier edges, feature layout
    metrics  see stream.learn.evaluate
    windows  for each length a batch of real windows, by input name
    """

    model: ShopperModel
    config: dict
    metrics: dict
    windows: dict[int, dict[str, Tensor]]


def train(options: TrainOptions, out: Path, console: Console | None = None) -> dict:
    """Train a model, write its checkpoint into the directory `out`, and return its metrics.

    Errors   UsageError where the events hold nothing to learn from.
    Promise  on one machine the same options give the same bytes, except for the seconds in metrics.json.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    with _reproducible(options.seed):
        return _train(options, out, console)


def _train(options: TrainOptions, out: Path, console: Console) -> dict:
    began = time.monotonic()

    # 1 examples

    console.print(f'Examples from {options.source}')
    data = dataset.build(options.events, options.rules, options.limits, options.examples, options.seed)
    console.print(f'  {data.events:,} events of {data.users:,} users, {data.refused:,} records refused')
    for name, split in (('train', data.train), ('validation', data.validation), ('test', data.test)):
        console.print(f'  {name:10} {len(split):7,} moments of {len(np.unique(split.user)):6,} users: '
                      f'{split.labels.intent.mean():.1%} buy within 7 days, '
                      f'{split.labels.churn.mean():.1%} not within 30')
    model = ShopperModel(options.model)
    labels = data.train.labels
    model.fit_averages(*(torch.from_numpy(part) for part in (
        data.train.inputs.counters, labels.intent, labels.churn, labels.spend, labels.tier)))
    train_batches = list(batches(data.train.inputs, options.batch_rows))

    # 2 pretraining

    model.train()
    optimizer, schedule = _optimizer(model, options, options.pretrain_epochs * len(train_batches))
    pretrain_losses = []
    for epoch in range(options.pretrain_epochs):
        total = [0.0, 0.0]
        for batch in _shuffled(train_batches, f'pretraining {epoch + 1}', console):
            categories, numbers = torch.from_numpy(batch.categories), torch.from_numpy(batch.numbers)
            filled = categories[:, :, 0] > 0                                        # [b, l]
            hidden = filled & (torch.rand(filled.shape) < options.hidden_share)     # [b, l]
            if not hidden.any():
                continue
            kinds, category = model.slot_guesses(categories, numbers, hidden)       # [m, types], [m, buckets]
            truth = categories[hidden].long()                                       # [m, 3]
            parts = cross_entropy(kinds, truth[:, 0]), cross_entropy(category, truth[:, 2])
            _step(parts[0] + parts[1], model, optimizer, schedule, options.clip_norm)
            for index, part in enumerate(parts):
                total[index] += part.item() / len(train_batches)
        pretrain_losses.append({'type': total[0], 'category': total[1]})
        console.print(f'pretraining {epoch + 1}/{options.pretrain_epochs}  type {total[0]:.3f}  '
                      f'category {total[1]:.3f}  {time.monotonic() - began:.0f} s')

    # 3 training

    optimizer, schedule = _optimizer(model, options, options.epochs * len(train_batches))
    history, best, best_weights = [], math.inf, model.state_dict()
    for epoch in range(options.epochs):
        model.train()
        rows = trained = 0.0
        for batch in _shuffled(train_batches, f'epoch {epoch + 1}', console):
            parts = _losses(model, batch, data.train)
            loss = sum(options.task_weights[task] * part for task, part in parts.items())
            _step(loss, model, optimizer, schedule, options.clip_norm)
            trained += loss.item() * len(batch)
            rows += len(batch)
        parts = _validate(model, data.validation)
        validation = sum(options.task_weights[task] * part for task, part in parts.items())
        history.append({'train': trained / rows, 'validation': validation, **parts})
        console.print(f'epoch {epoch + 1}/{options.epochs}  train {trained / rows:.4f}  validation {validation:.4f}  ('
                      + '  '.join(f'{task} {part:.3f}' for task, part in parts.items())
                      + f')  {time.monotonic() - began:.0f} s')
        if validation < best:
            best, best_epoch = validation, epoch + 1
            best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        elif epoch + 1 - best_epoch >= options.patience:
            console.print(f'no better for {options.patience} epochs: stopped')
            break
    model.load_state_dict(best_weights)

    # 4 calibration

    predicted = float(score(model, data.validation)['expected_spend'].sum())
    spent = float(data.validation.labels.spend.sum())
    if spent > 0:
        model.log_spend_scale.fill_(math.log(spent / predicted))
    console.print(f'expected spend of the validation users: {predicted:,.0f}, spent: {spent:,.0f}')

    # 5 evaluation

    scores = score(model, data.test)
    metrics = {'pretraining': pretrain_losses, 'epochs': history, 'best_epoch': best_epoch,
               'test': evaluate(data, scores, options.seed),
               'seconds': round(time.monotonic() - began)}
    for task, contenders in metrics['test']['tasks'].items():
        for name, numbers in contenders.items():
            console.print(f'{task:16} {name:20} ' + '  '.join(
                f'{metric} {value:.3f} ({low:.3f} .. {high:.3f})' for metric, (value, low, high) in numbers.items()
                if not metric.startswith('less_')))

    # 6 checkpoint

    out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), out / WEIGHTS_FILE)
    safetensors.torch.save_file(_windows(data.test), out / WINDOWS_FILE)
    _write_json(out / CONFIG_FILE, _config(options, data))
    _write_json(out / METRICS_FILE, metrics)
    console.print(f'checkpoint in {out}, {metrics["seconds"]} s')
    return metrics


def score(model: ShopperModel, examples: Examples) -> dict[str, np.ndarray]:
    """The model's outputs for each example, by output name: [n, 1] or [n, TIERS]."""
    model.eval()
    answers = []
    with torch.no_grad():
        for batch in batches(examples.inputs, _SCORING_ROWS):
            answers.append(model(*(torch.from_numpy(getattr(batch, name)) for name in INPUT_NAMES)))
    columns = [torch.cat(column).numpy() for column in zip(*answers, strict=True)]
    order = np.argsort(columns[-1][:, 0])       # batches come by length; row_id brings the rows back
    return {name: column[order] for name, column in zip(OUTPUT_NAMES, columns, strict=True)}


def load(checkpoint: Path) -> Checkpoint:
    """Read a checkpoint directory.

    Errors   ModelError where it is not one, or where it was trained on another feature layout.
    """
    for name in (CONFIG_FILE, METRICS_FILE, WEIGHTS_FILE, WINDOWS_FILE):
        if not (checkpoint / name).is_file():
            raise ModelError(f'{checkpoint} is not a checkpoint: {name} is missing.',
                             do='give the directory that `stream train --out` wrote.')
    try:
        config = json.loads((checkpoint / CONFIG_FILE).read_bytes())
        metrics = json.loads((checkpoint / METRICS_FILE).read_bytes())
        weights = safetensors.torch.load_file(checkpoint / WEIGHTS_FILE)
        flat = safetensors.torch.load_file(checkpoint / WINDOWS_FILE)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ModelError(f'The checkpoint {checkpoint} is damaged: {error}.', do='train again.') from error
    if msgspec.convert(config['layout'], FeatureLayout) != LAYOUT:
        raise ModelError(f'The checkpoint {checkpoint} was trained on another feature layout.',
                         do='train again with this version.')
    model = ShopperModel(ModelOptions(**config['model']))
    model.load_state_dict(weights)
    model.eval()
    windows: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        length, name = key.split('.')
        windows.setdefault(int(length), {})[name] = tensor
    return Checkpoint(model, config, metrics, windows)


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


def _shuffled(train_batches: list[Batch], title: str, console: Console) -> Iterator[Batch]:
    order = torch.randperm(len(train_batches)).tolist()
    for place in track(order, title, console=console, transient=True, disable=not console.is_terminal):
        yield train_batches[place]


def _optimizer(
    model: ShopperModel, options: TrainOptions, steps: int,
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warm-up and a cosine to 0; only matrices decay."""
    decay = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    keep = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': options.weight_decay},
                                   {'params': keep, 'weight_decay': 0.0}], lr=options.learning_rate)
    warmup = max(1, round(steps * options.warmup_share))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _step(loss: Tensor, model: ShopperModel, optimizer: torch.optim.Optimizer,
          schedule: torch.optim.lr_scheduler.LRScheduler, clip_norm: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm, error_if_nonfinite=True)
    optimizer.step()
    schedule.step()


def _losses(model: ShopperModel, batch: Batch, examples: Examples) -> dict[str, Tensor]:
    rows, labels = batch.row_id[:, 0], examples.labels
    out = model.logits(*(torch.from_numpy(part) for part in (batch.categories, batch.numbers, batch.counters)))
    return losses(out, *(torch.from_numpy(part[rows])
                         for part in (labels.intent, labels.churn, labels.spend, labels.tier)))


def _validate(model: ShopperModel, examples: Examples) -> dict[str, float]:
    model.eval()
    total: dict[str, float] = {}
    with torch.no_grad():
        for batch in batches(examples.inputs, _SCORING_ROWS):
            for task, part in _losses(model, batch, examples).items():
                total[task] = total.get(task, 0.0) + part.item() * len(batch) / len(examples)
    return total


def _windows(examples: Examples) -> dict[str, Tensor]:
    """A few real windows of each length that occurs, as '<length>.<input name>'."""
    kept: dict[str, Tensor] = {}
    for batch in batches(examples.inputs, _KEPT_WINDOWS):
        length = batch.categories.shape[1]
        if f'{length}.row_id' not in kept:
            kept |= {f'{length}.{name}': torch.from_numpy(getattr(batch, name)) for name in INPUT_NAMES}
    return kept


def _config(options: TrainOptions, data: Dataset) -> dict:
    learning = {name: getattr(options, name) for name in (
        'pretrain_epochs', 'epochs', 'batch_rows', 'learning_rate', 'weight_decay', 'warmup_share', 'hidden_share',
        'clip_norm', 'patience', 'task_weights')}
    splits = {'train': data.train, 'validation': data.validation, 'test': data.test}
    return {
        'source': options.source, 'command': options.command, 'seed': options.seed,
        'currency': options.rules.currency,
        'window': {'events_max': options.limits.events_max, 'span_ms': options.limits.span_ms,
                   'silence_ms': list(options.limits.silence_ms)},
        'model': asdict(options.model), 'examples': asdict(options.examples), 'learning': learning,
        'tiers': {'names': list(dataset.TIER_NAMES), 'edges': data.tier_edges.tolist()},
        'data': {
            'users': data.users, 'events': data.events, 'refused': data.refused, 'start_ms': data.start_ms,
            'cut_ms': data.cut_ms, 'labelled_until_ms': data.labelled_until_ms, 'end_ms': data.end_ms,
            **{f'{name}_{what}': count for name, split in splits.items()
               for what, count in (('moments', len(split)), ('users', len(np.unique(split.user))))}},
        'layout': msgspec.to_builtins(LAYOUT),
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b'\n')     # NaN becomes null
