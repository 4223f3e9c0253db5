"""Pretraining of the backbone `events`: on windows without labels, or from another shop's checkpoint.

    masked       some slots are masked. Their content is predicted from the slot's own state, which saw earlier slots,
                 and from the query's state, which saw all others
    next         the state after a slot predicts the next slot, which it has not seen: attention is causal
    contrastive  two crops of a window should be more alike than crops of two users' windows

The prediction of a slot has five parts: type, item, category, amount and gap. Each part's loss is relative to a blind
guess. The prediction heads are discarded afterwards; the fit (stream.learn.fit) starts from the backbone.

`start_from` loads the backbone of another checkpoint instead, or before.

Sources: Devlin et al. (2018), BERT, arXiv 1810.04805, for the masks. Kang, McAuley (2018), SASRec, arXiv 1808.09781,
for the next event. Van den Oord et al. (2018), arXiv 1807.03748, for the contrast (InfoNCE); Xie et al. (2020),
CL4SRec, arXiv 2010.14395, for crops of shoppers' windows.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from stream.core.features import CATEGORY_BUCKETS, ITEM_BUCKETS, SLOT_NUMBER_NAMES, TYPE_VOCABULARY, padded
from stream.errors import ModelError, UsageError
from stream.learn.backbones import EventsBackbone
from stream.learn.checkpoint import load
from stream.learn.dataset import Examples
from stream.learn.epochs import Run, chunks, mixed_precision, run_epochs, shuffled
from stream.learn.options import Count, NotNegative, Part, PartOrAll, Positive, Share
from stream.learn.training_log import TrainingLog

OBJECTIVES = ('masked', 'next', 'contrastive')
AMOUNT_STEP, AMOUNT_BUCKETS = 0.5, 25       # of log(1 + amount): each 1.6 times the one before, up to 160,000
GAP_STEP, GAP_BUCKETS = 0.25, 25            # of log(1 + days): up to 400 days
_AMOUNT, _GAP = SLOT_NUMBER_NAMES.index('amount'), SLOT_NUMBER_NAMES.index('gap_days')
_SIZES = (TYPE_VOCABULARY, ITEM_BUCKETS, CATEGORY_BUCKETS, AMOUNT_BUCKETS, GAP_BUCKETS)
_UNKNOWN = -1       # what is not told of a slot: an absent item or category, the gap before the first one
_NEVER = -1e9


@dataclass(frozen=True)
class PretrainOptions:
    """How to pretrain.

    objectives       weight of each objective; one without a weight is not used
    masked_share     share of a window's slots that are masked
    crop_share_min   least share of a window's slots in a crop
    temperature      temperature of the contrastive loss
    slots_max        most slots predicted per batch and objective: predicting items is slow
    validation_rows  snapshots of held-out users for the validation loss
    others           as in `stream.learn.fit.FitOptions`
    """

    objectives: dict[str, NotNegative]
    masked_share: Part = 0.2
    crop_share_min: PartOrAll = 0.5
    temperature: Positive = 0.1
    slots_max: Count = 1024
    validation_rows: Count = 2_000
    epochs: Count = 10
    rows_per_epoch: Count = 6_000
    batch_rows: Count = 128
    learning_rate: NotNegative = 1e-3
    weight_decay: NotNegative = 0.05
    warmup_share: Share = 0.1
    clip_norm: Positive = 1.0
    patience: Count = 3

    @staticmethod
    def of(names: str) -> 'PretrainOptions':
        """Options from objectives such as 'masked,next', with equal weights. Errors: UsageError for an unknown one."""
        objectives = dict.fromkeys(names.split(','), 1.0)
        if unknown := set(objectives) - set(OBJECTIVES):
            raise UsageError(f'There is no pretraining called {", ".join(sorted(unknown))!r}.',
                             do=f'choose from {", ".join(OBJECTIVES)}, separated by commas.')
        return PretrainOptions(objectives)


def pretrain(backbone: nn.Module, data: Examples, held_out: np.ndarray, options: PretrainOptions, seed: int,
             log: TrainingLog, console: Console) -> list[dict[str, float]]:
    """Pretrain the backbone on the windows of `data`; its labels do not matter. Returns the losses of each epoch.

    held_out  bool [n]: rows for validation only
    Errors    UsageError where the backbone reads text: those come pretrained.
    """
    heads = PretrainHeads(events_backbone(backbone), options).to(next(backbone.parameters()).device)
    train_rows, validation_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    epoch_rows = min(options.rows_per_epoch, len(train_rows))
    validation_rows = np.random.default_rng(seed).permutation(validation_rows)[:options.validation_rows]
    validation_batches = chunks(data.inputs, validation_rows, options.batch_rows, np.random.default_rng(seed))

    def total(parts: dict[str, Tensor]) -> Tensor:
        return torch.stack([options.objectives[name] * part for name, part in parts.items()]).sum()

    def validated() -> dict[str, float]:
        sums = dict.fromkeys(('validation', *options.objectives), 0.0)
        with torch.no_grad(), torch.random.fork_rng():      # the same masks and crops after each epoch
            torch.manual_seed(seed)
            for rows in validation_batches:
                parts = heads.losses(data, rows)
                for name, part in {'validation': total(parts), **parts}.items():
                    sums[name] += float(part) * len(rows) / len(validation_rows)
        return sums

    epochs, _ = run_epochs(Run(
        name='pretraining', title='pretraining', module=heads,
        weights=[(options.learning_rate, options.weight_decay, list(heads.parameters()))],
        batches=shuffled(data.inputs, train_rows, epoch_rows, options.batch_rows),
        loss=lambda rows: total(heads.losses(data, rows)), validate=validated,
        epochs=options.epochs, steps=options.epochs * math.ceil(epoch_rows / options.batch_rows),
        warmup_share=options.warmup_share, clip_norm=options.clip_norm, patience=options.patience, seed=seed,
    ), log, console)
    return epochs


def events_backbone(backbone: nn.Module) -> EventsBackbone:
    """The `events` backbone, with a catalogue or without. Errors: UsageError where there is none."""
    for module in backbone.modules():
        if isinstance(module, EventsBackbone):
            return module
    raise reads_text()


def reads_text() -> UsageError:
    """The error for a text backbone, which cannot be pretrained here."""
    return UsageError('A backbone that reads text comes pretrained; only the backbone events can be pretrained here.',
                      do='leave pretraining out, or use the backbone events.')


def start_from(backbone: nn.Module, checkpoint: Path) -> None:
    """Copy the weights of another checkpoint's `events` backbone.

    Errors   UsageError where this backbone reads text; ModelError where the other one does, or has other sizes.
    """
    ours = events_backbone(backbone)
    theirs = [module for module in load(checkpoint).model.backbone.modules() if isinstance(module, EventsBackbone)]
    if not theirs:
        raise ModelError(f'The model in {checkpoint} reads text, not events.', do='start from one that reads events.')
    if theirs[0].options.sizes != ours.options.sizes:
        raise ModelError(f'The model in {checkpoint} has other sizes: {theirs[0].options.sizes}, not '
                         f'{ours.options.sizes}.', do='start from one of the same sizes.')
    given = theirs[0].state_dict()
    if any(given[name].shape != weight.shape for name, weight in ours.state_dict().items()):
        raise ModelError(f'The model in {checkpoint} has had attention heads cut out.',
                         do='start from one that has all of them.')
    ours.load_state_dict(given)


class PretrainHeads(nn.Module):
    """The backbone with the heads of the pretraining objectives."""

    def __init__(self, backbone: EventsBackbone, options: PretrainOptions) -> None:
        super().__init__()
        h = backbone.width
        self.backbone = backbone
        self.options = options
        if 'masked' in options.objectives:
            self.masked_head = SlotPrediction(2 * h, h)
        if 'next' in options.objectives:
            self.next_head = SlotPrediction(h, h)
        if 'contrastive' in options.objectives:
            self.project = nn.Sequential(nn.Linear(h, h), nn.GELU(), nn.Linear(h, h))

    def losses(self, data: Examples, rows: np.ndarray) -> dict[str, Tensor]:
        """The mean loss of each objective over a batch; in single precision for validation."""
        batch = padded(data.inputs, rows, max(1, int(np.diff(data.inputs.starts)[rows].max())))
        where = self.backbone.query.device
        categories, numbers = torch.from_numpy(batch.categories).to(where), torch.from_numpy(batch.numbers).to(where)
        objectives = {'masked': self._masked, 'next': self._next}
        with mixed_precision(where) if self.training else nullcontext():
            found = {name: objectives[name](categories, numbers) for name in self.options.objectives
                     if name in objectives}
            if 'contrastive' in self.options.objectives:
                user = torch.from_numpy(data.user[rows]).to(where)
                found['contrastive'] = self._contrastive(categories, numbers, user)
        return found

    def _masked(self, categories: Tensor, numbers: Tensor) -> Tensor:
        hidden = (torch.rand(categories.shape[:2]).to(numbers.device) < self.options.masked_share) & _filled(categories)
        states = self.backbone.states(categories, numbers, hidden)          # [b, l + 1, h]
        row, slot = self._some(hidden)
        return self.masked_head(torch.cat([states[row, slot], states[row, -1]], -1),
                                slot_targets(categories, numbers)[row, slot])

    def _next(self, categories: Tensor, numbers: Tensor) -> Tensor:
        states = self.backbone.states(categories, numbers)                  # [b, l + 1, h]
        row, slot = self._some(_filled(categories)[:, 1:])                  # the slot before the one that is told
        return self.next_head(states[row, slot], slot_targets(categories, numbers)[row, slot + 1])

    def _contrastive(self, categories: Tensor, numbers: Tensor, user: Tensor) -> Tensor:
        one, other = (normalize(self.project(self.backbone(*cropped(
            categories, numbers, self.options.crop_share_min))).float(), dim=-1) for _ in range(2))     # [b, h]
        # Two snapshots of one user are neither alike nor unlike: leave them out.
        others = (user[:, None] != user) | torch.eye(len(user), dtype=torch.bool, device=user.device)
        likeness = torch.where(others, one @ other.T / self.options.temperature, _NEVER)                # [b, b]
        own = torch.arange(len(user), device=user.device)
        return (cross_entropy(likeness, own) + cross_entropy(likeness.T, own)) / 2

    def _some(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Row and slot of those in `asked`, bool [b, l]; a random `slots_max` of them if there are more."""
        found = asked.nonzero()
        if len(found) > self.options.slots_max:
            found = found[torch.randperm(len(found))[:self.options.slots_max].to(found.device)]
        return found[:, 0], found[:, 1]


class SlotPrediction(nn.Module):
    """Predicts a slot from a state."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.LayerNorm(width))
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in _SIZES)

    def forward(self, states: Tensor, told: Tensor) -> Tensor:
        """The loss relative to a blind guess, over the known parts of n slots, from [n, inputs] and int [n, 5]."""
        hidden = self.transform(states)
        return torch.stack([
            cross_entropy(head(hidden).float(), truth, ignore_index=_UNKNOWN, reduction='sum')
            / (truth != _UNKNOWN).sum().clamp(min=1) / math.log(size)
            for head, truth, size in zip(self.heads, told.unbind(-1), _SIZES, strict=True)]).mean()


def slot_targets(categories: Tensor, numbers: Tensor) -> Tensor:
    """What to predict of each slot, int [b, l, 5]: type, item, category, buckets of amount and gap."""
    kind, item, category = categories.long().unbind(-1)
    amount = (numbers[:, :, _AMOUNT] / AMOUNT_STEP).long().clamp(0, AMOUNT_BUCKETS - 1)
    gap = (numbers[:, :, _GAP] / GAP_STEP).long().clamp(0, GAP_BUCKETS - 1)
    gap[:, 0] = _UNKNOWN
    return torch.stack([kind, torch.where(item > 0, item, _UNKNOWN), torch.where(category > 0, category, _UNKNOWN),
                        amount, gap], -1)


def cropped(categories: Tensor, numbers: Tensor, share_min: float) -> tuple[Tensor, Tensor]:
    """A random run of each window's slots, at least that share of them, moved to the front."""
    rows, length = categories.shape[:2]
    count = _filled(categories).sum(1)                                      # [b]
    share, place = torch.rand(2, rows).to(count.device)
    kept = (count * (share_min + (1 - share_min) * share)).ceil().long()
    first = (place * (count - kept + 1)).long()
    slots = torch.arange(length, device=count.device)                       # [l]
    taken = (first[:, None] + slots).clamp(max=length - 1)[:, :, None]      # [b, l, 1]
    inside = (slots < kept[:, None])[:, :, None]

    def kept_of(values: Tensor) -> Tensor:
        return torch.where(inside, values.gather(1, taken.expand(-1, -1, values.shape[2])), 0)

    return kept_of(categories), kept_of(numbers)


def _filled(categories: Tensor) -> Tensor:
    return categories[:, :, 0] > 0
