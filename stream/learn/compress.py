"""Smaller models: distillation, and pruning of attention heads.

Distillation. A model learns from larger ones, beside the true labels:

    teachers   fitted first, larger and each with its own seed, on the student's training users. Neither they nor the
               student see the validation users
    target     the mean of the teachers' logits of the window branch, [n, k]
    loss       (1 - weight) * loss on the true labels + weight * loss that the teachers expect

A teacher's probability is a soft label: where it says 30 %, the student's loss is that of 3 buyers in 10. A label that
is not settled teaches nothing either way.

Pruning. The attention heads with the least effect on the loss are removed, so that there are fewer weights:

    importance   of each head: the mean over batches of |d loss / d gate|, where the gate, 1, multiplies the head's
                 output. This is the first-order effect of removing it
    kept         the share of the heads with the highest importance over all layers, at least one in each layer
    cut          the heads' rows of the query, key and value weights, and their columns of the output weights

Pruning works for the backbones `events` and `bert` when all their weights are trained: peft's adapters have no heads.

Sources: Hinton, Vinyals, Dean (2015), "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Michel, Levy,
Neubig (2019), "Are Sixteen Heads Really Better than One?", arXiv 1905.10650.
"""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers.models.bert.modeling_bert import BertAttention

from stream.errors import UsageError
from stream.learn.model import HORIZONS, Logits
from stream.learn.options import CountOrNone, Positive, Share

_SEEDS_APART = 100


@dataclass(frozen=True)
class DistilOptions:
    """The teachers.

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
    """The combined outputs of the teachers, [n, k], from [n, k] of each."""
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


# ---- pruning ---------------------------------------------------------------------------------------------------------

def attentions(model: nn.Module) -> dict[str, BertAttention]:
    """The layers whose heads can be cut, by name, in their order. Errors: UsageError where there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BertAttention)
             and type(module.self.value) is nn.Linear}
    if not found:
        raise UsageError('There are no attention heads that can be cut out of this backbone.',
                         do='use the backbone events, or bert trained in whole.')
    return found


def importance(model: nn.Module, losses: Iterable[Tensor]) -> list[Tensor]:
    """The importance of each head, [heads] for each layer.

    losses   of some training batches, each computed when it is asked for
    """
    layers = list(attentions(model).values())
    gates = [torch.ones(layer.self.num_attention_heads, device=layer.self.value.weight.device, requires_grad=True)
             for layer in layers]
    hooks = [layer.output.dense.register_forward_pre_hook(_gated(gate)) for layer, gate in zip(layers, gates,
                                                                                               strict=True)]
    try:
        total = [torch.zeros_like(gate) for gate in gates]
        for loss in losses:
            for summed, gradient in zip(total, torch.autograd.grad(loss, gates), strict=True):
                summed += gradient.abs()
        return total
    finally:
        for hook in hooks:
            hook.remove()


def kept_heads(scores: list[Tensor], share: float) -> list[list[int]]:
    """The heads to keep in each layer."""
    most = max(len(scores), round(share * sum(map(len, scores))))
    best = {(layer, int(heads.argmax())) for layer, heads in enumerate(scores)}
    ranked = sorted(((float(score), layer, head) for layer, heads in enumerate(scores)
                     for head, score in enumerate(heads)), reverse=True)
    for _, layer, head in ranked:
        if len(best) < most:
            best.add((layer, head))
    return [sorted(head for at, head in best if at == layer) for layer in range(len(scores))]


def cut(model: nn.Module, kept: list[list[int]]) -> None:
    """Remove all other heads of each layer."""
    for layer, heads in zip(attentions(model).values(), kept, strict=True):
        inner = layer.self
        units = torch.cat([torch.arange(inner.attention_head_size) + head * inner.attention_head_size
                           for head in heads])
        for name in ('query', 'key', 'value'):
            whole = getattr(inner, name)
            setattr(inner, name, _linear(whole.weight[units], whole.bias[units]))
        layer.output.dense = _linear(layer.output.dense.weight[:, units], layer.output.dense.bias)
        inner.num_attention_heads, inner.all_head_size = len(heads), len(units)


def cut_as(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Remove heads from a new model until these weights fit. It does not matter which heads go."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BertAttention)}
    counts = {name: len(weights[f'{name}.self.query.weight']) // layer.self.attention_head_size
              for name, layer in found.items() if f'{name}.self.query.weight' in weights}
    if any(count < found[name].self.num_attention_heads for name, count in counts.items()):
        cut(model, [list(range(count)) for count in counts.values()])


def _gated(gate: Tensor):
    def hook(_dense: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        mixed, = inputs                                                             # [b, tokens, heads * units]
        return ((mixed.unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(-2),)

    return hook


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight = nn.Parameter(weight.detach().clone())
    made.bias = nn.Parameter(bias.detach().clone())
    return made
