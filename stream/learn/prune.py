"""Head pruning: attention heads that the loss hardly feels are cut out, so that the weights are really fewer.

    importance   of each head: the mean over batches of |d loss / d gate|, where the gate, 1, is a factor of what the
                 head says; what follows if it were closed, to the first order
    kept         over all layers the share of the heads with the highest importance, at least one of each layer
    cut          their rows of the query's, key's and value's weights and their columns of the output's

Of the backbones it can be done to `events` and `bert`, where those are trained in whole: what peft adds has no heads.

Source: Michel, Levy, Neubig (2019), "Are Sixteen Heads Really Better than One?", arXiv 1905.10650.
"""
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention

from stream.errors import UsageError


def attentions(model: nn.Module) -> dict[str, BertAttention]:
    """The layers whose heads can be cut, by name, in their order. Errors: UsageError where there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BertAttention)
             and type(module.self.value) is nn.Linear}
    if not found:
        raise UsageError('There are no attention heads that can be cut out of this backbone.',
                         do='use the backbone events, or bert trained in whole.')
    return found


def importance(model: nn.Module, losses: Iterable[Tensor]) -> list[Tensor]:
    """How much each head matters: of each layer [heads].

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
            for sum_, gradient in zip(total, torch.autograd.grad(loss, gates), strict=True):
                sum_ += gradient.abs()
        return total
    finally:
        for hook in hooks:
            hook.remove()


def kept_heads(scores: list[Tensor], share: float) -> list[list[int]]:
    """Which heads stay, of each layer."""
    wanted = max(len(scores), round(share * sum(map(len, scores))))
    best = {(layer, int(heads.argmax())) for layer, heads in enumerate(scores)}
    ranked = sorted(((float(score), layer, head) for layer, heads in enumerate(scores)
                     for head, score in enumerate(heads)), reverse=True)
    for _, layer, head in ranked:
        if len(best) < wanted:
            best.add((layer, head))
    return [sorted(head for at, head in best if at == layer) for layer in range(len(scores))]


def cut(model: nn.Module, kept: list[list[int]]) -> None:
    """Keep these heads of each layer and no others."""
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
    """Give a new model as many heads as the model had whose weights these are; which ones does not matter."""
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
