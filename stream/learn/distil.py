"""Distillation: a model learns from larger ones what they have found in the same examples, beside the true labels.

    teachers   fitted first, larger and each with a seed of its own, on the student's training users alone: neither they
               nor the student have seen who validates
    taught     the mean of their logits, of the window's branch, [n, k]
    loss       (1 - weight) * that of the true labels + weight * that which the teachers' chances expect

What a teacher expects is a label with shares instead of one that came true: where it says 30 %, the student's loss is
that of 3 buyers in 10. A label that is not settled teaches nothing, by either way.

Sources: Hinton, Vinyals, Dean (2015), "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from stream.errors import UsageError
from stream.learn.bounds import CountOrNone, Positive, Share
from stream.learn.model import HORIZONS, Logits

_SEEDS_APART = 100


@dataclass(frozen=True)
class DistilOptions:
    """Who teaches.

    teachers  how many; they differ in their seeds; 0: the model learns by itself
    weight    share of the loss that is theirs; the true labels have the rest
    wider     how many times as many units they have as the student
    deeper    how many layers more
    """

    teachers: CountOrNone = 0
    weight: Share = 0.5
    wider: Positive = 1.5
    deeper: CountOrNone = 1


def teacher_options(student: Any, place: int) -> Any:
    """The `stream.learn.fit.FitOptions` of one of the student's teachers.

    Errors   UsageError where the student's backbone is pretrained: a larger one is another checkpoint.
    """
    if student.backbone.name != 'events':
        raise UsageError(f'A {student.backbone.name} has no larger one of its kind to be taught by.',
                         do='distil with the backbone events.')
    own, than = student.encoder, student.distil
    larger = replace(own, hidden=round(own.hidden * than.wider / own.heads) * own.heads,
                     layers=own.layers + than.deeper, intermediate=round(own.intermediate * than.wider))
    # Not the next seed: by that the test's users were chosen, and the same share of the others would be nobody.
    return replace(student, seed=student.seed + _SEEDS_APART + place, encoder=larger, distil=DistilOptions(),
                   heads_kept=1.0, start_from=None)


def mean_logits(taught: Sequence[Tensor]) -> Tensor:
    """What the teachers say together, [n, k], from [n, k] of each."""
    return torch.stack(list(taught)).mean(0)


def expected_losses(logits: Tensor, taught: Tensor, binary: Tensor, tier: Tensor, spend: Tensor) -> dict[str, Tensor]:
    """The loss of each task that the teachers expect, in nats: as `stream.learn.model.losses`, with the labels drawn
    from what they say. The labels tell which rows are settled. Least where the student says the same.

    logits, taught   [b, k]; binary float [b, BINARY], tier int [b], spend float [b]
    """
    mine, theirs, rows = Logits.of(logits), Logits.of(taught), len(logits)
    by_task = binary_cross_entropy_with_logits(mine.binary, theirs.binary.sigmoid(), reduction='none')
    by_task = torch.where(binary.isnan(), 0.0, by_task).sum(0) / rows
    by_tier = cross_entropy(mine.tier, theirs.tier.softmax(-1), reduction='none')
    chance = theirs.bought.sigmoid()
    any_spend = binary_cross_entropy_with_logits(mine.bought, chance, reduction='none')
    log_normal = mine.sigma.log() + (theirs.sigma**2 + (mine.mu - theirs.mu)**2) / (2 * mine.sigma**2)
    return {
        'purchase': by_task[:HORIZONS].sum(),
        'refund': by_task[HORIZONS],
        'tier': torch.where(tier < 0, 0.0, by_tier).sum() / rows,
        'spend': torch.where(spend.isnan(), 0.0, any_spend + chance * log_normal).sum() / rows,
    }
