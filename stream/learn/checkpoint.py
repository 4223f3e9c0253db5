"""A trained model in a folder: weights and windows as safetensors, options and figures as JSON.

    model.safetensors     weights and buffers
    windows.safetensors   a few real windows of each length, as '<length>.<input name>': what the exported graph is
                          checked on
    config.json           options, data, tier edges, feature layout
    metrics.json          what the test said (stream.learn.evaluate)
"""
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from stream.core.features import batches
from stream.errors import ModelError
from stream.learn.backbones import EncoderOptions, EventsBackbone
from stream.learn.dataset import Examples
from stream.learn.model import INPUT_NAMES, ShopperModel
from stream.scoring.artefact import LAYOUT, FeatureLayout

WEIGHTS_FILE, CONFIG_FILE, METRICS_FILE, WINDOWS_FILE = (
    'model.safetensors', 'config.json', 'metrics.json', 'windows.safetensors')
_KEPT_WINDOWS = 32


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. `windows`: for each length a batch of real windows, by input name."""

    model: ShopperModel
    config: dict
    metrics: dict
    windows: dict[int, dict[str, Tensor]]


def save(kept: Checkpoint, out: Path) -> None:
    """Write the folder. Promise: the same checkpoint gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(kept.model.state_dict(), out / WEIGHTS_FILE)
    safetensors.torch.save_file({f'{length}.{name}': tensor for length, batch in kept.windows.items()
                                 for name, tensor in batch.items()}, out / WINDOWS_FILE)
    for name, content in ((CONFIG_FILE, kept.config), (METRICS_FILE, kept.metrics)):
        (out / name).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b'\n')   # NaN: null


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
    model = ShopperModel(EventsBackbone(EncoderOptions(**config['encoder'])), len(config['tiers']['names']))
    model.load_state_dict(weights)
    model.eval()
    windows: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        length, name = key.split('.')
        windows.setdefault(int(length), {})[name] = tensor
    return Checkpoint(model, config, metrics, windows)


def some_windows(examples: Examples) -> dict[int, dict[str, Tensor]]:
    """A few real windows of each length that occurs."""
    kept: dict[int, dict[str, Tensor]] = {}
    for batch in batches(examples.inputs, _KEPT_WINDOWS):
        kept.setdefault(batch.categories.shape[1], {
            name: torch.from_numpy(getattr(batch, name)) for name in INPUT_NAMES})
    return kept
