"""Which weights of a pretrained text backbone are trained beside the heads.

    full                        all of them
    frozen                      none: only the heads learn
    freeze:embeddings,layers=N  all but those of the named parts: the embeddings, the first N layers; either or both
    lora                        low-rank additions to the attention's projections
    ia3                         factors of keys, values and the feed-forward's units
    prefix                      keys and values that come before the text in every layer

The last three are those of Hugging Face `peft`. LoRA and IA3 are merged into the weights before the model is
exported (`merged`), so they cost nothing in serving. A prefix stays as it is.

Sources: Hu et al. (2021), LoRA, arXiv 2106.09685. Liu et al. (2022), IA3, arXiv 2205.05638. Li, Liang (2021), prefix
tuning, arXiv 2101.00190.
"""
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import nn

from stream.errors import UsageError
from stream.learn.text.readers import TextBackbone

PREFIX_BACKBONES = ('bert', 'gpt2')     # peft's prefix needs a cache, which DistilBERT and T5's encoder do not take
PREFIX_TOKENS = 8
LORA_RANK = 8
LORA_ALPHA = 16
LORA_DROPOUT = 0.05
Model = TypeVar('Model', bound=nn.Module)
_PART = re.compile(r'(embeddings)|layers=([1-9]\d*)')
# Weights that were pretrained move little; those that are new have further to go.
_LEARNING_RATES = {'full': 5e-5, 'freeze': 5e-5, 'lora': 5e-4, 'ia3': 5e-3, 'prefix': 5e-3}


@dataclass(frozen=True)
class _Parts:
    """The names of the modules of a pretrained model."""

    embeddings: tuple[str, ...]
    layers: str


_PARTS = {
    'bert': _Parts(('embeddings',), 'encoder.layer'),
    'distilbert': _Parts(('embeddings',), 'transformer.layer'),
    't5': _Parts(('shared', 'encoder.embed_tokens'), 'encoder.block'),
    'gpt2': _Parts(('wte', 'wpe'), 'h'),
}


def learning_rate(tuning: str) -> float:
    """The default peak learning rate of the pretrained weights."""
    return _LEARNING_RATES[tuning.partition(':')[0]]


def pretrained(backbone: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of its pretrained model and what replaces them: everything that `tune` decides about."""
    for module in backbone.modules():
        if isinstance(module, TextBackbone):
            yield from module.reader.parameters()


def tune(backbone: TextBackbone, tuning: str) -> None:
    """Make the weights of `tuning` trainable, and freeze the rest of the pretrained model.

    Errors   UsageError where there is no such tuning, or not for this backbone.
    """
    named = tuning.removeprefix('freeze:').split(',')
    parts = [part for part in map(_PART.fullmatch, named) if part]
    if tuning == 'frozen':
        backbone.reader.requires_grad_(False)
    elif tuning in ('lora', 'ia3'):
        _adapt(backbone, tuning)
    elif tuning == 'prefix':
        if backbone.name not in PREFIX_BACKBONES:
            raise UsageError(
                f'A prefix cannot be put before a {backbone.name}: it takes no keys and values from outside.',
                do=f'use lora or ia3, or one of {", ".join(PREFIX_BACKBONES)}.')
        put_prefix(backbone, PREFIX_TOKENS)
    elif tuning.startswith('freeze:') and len(parts) == len(named):
        for part in parts:
            _freeze(backbone, bool(part[1]), int(part[2] or 0))
    elif tuning != 'full':
        raise UsageError(f'{tuning!r} is not a way to tune a backbone.',
                         do='use full, frozen, freeze:embeddings, freeze:layers=N, lora, ia3 or prefix.')


def put_prefix(backbone: TextBackbone, tokens: int) -> None:
    """Put so many keys and values before the text. The text then has less room."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    backbone.reader = get_peft_model(backbone.reader, PrefixTuningConfig(
        task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=tokens))
    backbone.tokens_max -= tokens       # it takes the first positions


def prefix_tokens(backbone: TextBackbone) -> int:
    """How many keys and values there are before the text."""
    adapters = getattr(backbone.reader, 'peft_config', {}).values()
    return sum(getattr(adapter, 'num_virtual_tokens', 0) for adapter in adapters)


def merged(model: Model) -> Model:
    """A copy with LoRA and IA3 merged into the weights; the model itself if it has neither."""
    if not _mergeable(model):
        return model
    model = deepcopy(model)
    for backbone in _mergeable(model):
        backbone.reader = backbone.reader.merge_and_unload()
    return model


def _mergeable(model: nn.Module) -> list[TextBackbone]:
    return [module for module in model.modules()
            if isinstance(module, TextBackbone) and hasattr(module.reader, 'merge_and_unload')]


def _freeze(backbone: TextBackbone, embeddings: bool, layers: int) -> None:
    parts = _PARTS[backbone.name]
    there = cast(nn.ModuleList, backbone.reader.get_submodule(parts.layers))
    if layers > len(there):
        raise UsageError(f'This {backbone.name} has {len(there)} layers, not {layers}.', do='freeze fewer layers.')
    for name in parts.embeddings if embeddings else ():
        backbone.reader.get_submodule(name).requires_grad_(False)
    for layer in there[:layers]:
        layer.requires_grad_(False)


def _adapt(backbone: TextBackbone, tuning: str) -> None:
    # Here and not above: it takes seconds, which only its users should pay.
    from peft import IA3Config, LoraConfig, TaskType, get_peft_model

    task = TaskType.FEATURE_EXTRACTION
    weights_transposed = backbone.name == 'gpt2'
    distilbert = backbone.name == 'distilbert'      # the one whose modules peft does not know
    if tuning == 'lora':
        options = LoraConfig(task_type=task, fan_in_fan_out=weights_transposed,
                             target_modules=['q_lin', 'v_lin'] if distilbert else None,
                             r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT)
    else:
        options = IA3Config(task_type=task, fan_in_fan_out=weights_transposed,
                            target_modules=['k_lin', 'v_lin', 'ffn.lin2'] if distilbert else None,
                            feedforward_modules=['ffn.lin2'] if distilbert else None)
    backbone.reader = get_peft_model(backbone.reader, options)
