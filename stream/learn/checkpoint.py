"""A trained model in a folder: weights and windows as safetensors, options and figures as JSON.

    model.safetensors     weights and buffers, with token tables and the table of items: neither the pretrained model's
                          folder nor the catalogue is needed any more
    windows.safetensors   a few real windows of each length, as '<length>.<input name>', to check the exported graph
    training_windows.safetensors   the same for training windows, to find the ranges for int8
    config.json           options, data, tier edges, feature layout, and a description of the backbone
    metrics.json          figures of the test (stream.learn.judging.evaluate)
    ranking.safetensors   the ranking of what is bought next, if there is one

LoRA and IA3 are merged into the weights that they change. A prefix is stored as it is.
"""
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS, Batch, batches, padded
from stream.errors import ModelError
from stream.learn.backbones import Description, describe, remake
from stream.learn.compress import cut_as
from stream.learn.dataset import Examples
from stream.learn.model import INPUT_NAMES, ShopperModel
from stream.learn.ranking.ranker import Recommender
from stream.learn.text.tuning import merged
from stream.scoring.artefact import LAYOUT, FeatureLayout

WEIGHTS_FILE, CONFIG_FILE, METRICS_FILE, WINDOWS_FILE, TRAINING_WINDOWS_FILE = (
    'model.safetensors', 'config.json', 'metrics.json', 'windows.safetensors', 'training_windows.safetensors')
RANKING_FILE = 'ranking.safetensors'
_KEPT_WINDOWS = 32
_KEPT_TRAINING_WINDOWS = 128


@dataclass(frozen=True)
class Checkpoint:
    """The content of a folder. `windows`, `training_windows`: a batch of real windows of each length, by input name."""

    model: ShopperModel
    config: dict
    metrics: dict
    windows: dict[int, dict[str, Tensor]]
    training_windows: dict[int, dict[str, Tensor]]
    recommender: Recommender | None = None


def save(kept: Checkpoint, out: Path) -> None:
    """Write the folder. Promise: the same checkpoint gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    model = merged(kept.model)
    safetensors.torch.save_file(_weights(model), out / WEIGHTS_FILE)
    for file, windows in ((WINDOWS_FILE, kept.windows), (TRAINING_WINDOWS_FILE, kept.training_windows)):
        safetensors.torch.save_file({f'{length}.{name}': tensor for length, batch in windows.items()
                                     for name, tensor in batch.items()}, out / file)
    (out / RANKING_FILE).unlink(missing_ok=True)        # of an earlier checkpoint in this folder
    if kept.recommender is not None:
        safetensors.torch.save_file(kept.recommender.state_dict(), out / RANKING_FILE)
    backbone = msgspec.to_builtins(describe(model.backbone), str_keys=True)
    for name, content in ((CONFIG_FILE, kept.config | {'backbone': backbone}), (METRICS_FILE, kept.metrics)):
        (out / name).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b'\n')   # NaN: null


def load(checkpoint: Path) -> Checkpoint:
    """Read a checkpoint directory.

    Errors   ModelError where it is not one, is damaged, or was trained on another feature layout.
    """
    for name in (CONFIG_FILE, METRICS_FILE, WEIGHTS_FILE, WINDOWS_FILE, TRAINING_WINDOWS_FILE):
        if not (checkpoint / name).is_file():
            raise ModelError(f'{checkpoint} is not a checkpoint: {name} is missing.',
                             do='give the directory that `stream train --out` wrote.')
    try:
        config = json.loads((checkpoint / CONFIG_FILE).read_bytes())
        metrics = json.loads((checkpoint / METRICS_FILE).read_bytes())
        weights = safetensors.torch.load_file(checkpoint / WEIGHTS_FILE)
        windows, training_windows = (_windows(safetensors.torch.load_file(checkpoint / file))
                                     for file in (WINDOWS_FILE, TRAINING_WINDOWS_FILE))
        ranking = checkpoint / RANKING_FILE
        recommender = Recommender.of(safetensors.torch.load_file(ranking)) if ranking.is_file() else None
        layout = msgspec.convert(config['layout'], FeatureLayout)
        tiers, refund = len(config['tiers']['names']), bool(config['learning']['refund'])
        description = msgspec.convert(config['backbone'], Description, strict=False)
    except KeyError as error:
        raise _damaged(checkpoint, f'{CONFIG_FILE} lacks {error}') from error
    except (ValueError, TypeError, safetensors.SafetensorError) as error:       # msgspec's are ValueErrors
        raise _damaged(checkpoint, error) from error
    if layout != LAYOUT:
        raise ModelError(f'The checkpoint {checkpoint} was trained on another feature layout.',
                         do='train again with this version.')
    try:
        model = ShopperModel(remake(description), tiers, refund)
    except Exception as error:      # transformers' errors about a wrong configuration have no common base
        raise _damaged(checkpoint, error) from error
    if odd := weights.keys() ^ _weights(model).keys():
        raise _damaged(checkpoint, f'weights that are missing or belong to nothing: {", ".join(sorted(odd)[:3])}')
    try:
        cut_as(model, weights)
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise _damaged(checkpoint, error) from error
    return Checkpoint(model.eval(), config, metrics, windows, training_windows, recommender)


def some_windows(examples: Examples) -> dict[int, dict[str, Tensor]]:
    """A few real windows of each length that occurs."""
    return _first_of_each_length(batches(examples.inputs, _KEPT_WINDOWS))


def some_training_windows(examples: Examples, seed: int) -> dict[int, dict[str, Tensor]]:
    """Training windows of each length that occurs, drawn from the snapshots of all users."""
    drawn = np.random.default_rng(seed).permutation(len(examples))
    length = np.asarray(LENGTHS)[np.searchsorted(LENGTHS, np.diff(examples.inputs.starts)[drawn])]
    rows = [(int(bucket), drawn[length == bucket][:_KEPT_TRAINING_WINDOWS]) for bucket in LENGTHS]
    return _first_of_each_length(padded(examples.inputs, some, bucket) for bucket, some in rows if len(some))


def _first_of_each_length(found: Iterable[Batch]) -> dict[int, dict[str, Tensor]]:
    kept: dict[int, dict[str, Tensor]] = {}
    for batch in found:
        kept.setdefault(batch.categories.shape[1], {
            name: torch.from_numpy(getattr(batch, name)[:batch.windows]) for name in INPUT_NAMES})
    return kept


def _weights(model: ShopperModel) -> dict[str, Tensor]:
    """Weights and buffers by name, each once: some pretrained models name their embeddings twice."""
    found: dict[str, Tensor] = {}
    places = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() == 0 or tensor.data_ptr() not in places:
            found[name] = tensor
            places.add(tensor.data_ptr())
    return found


def _windows(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Batches by length. Errors: ValueError where the shapes are wrong."""
    windows: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        length, name = key.split('.')
        windows.setdefault(int(length), {})[name] = tensor
    for length, batch in windows.items():
        rows = len(next(iter(batch.values())))
        shapes = dict(zip(INPUT_NAMES, ([rows, length, 3], [rows, length, SLOT_NUMBERS], [rows, COUNTERS], [rows, 1]),
                          strict=True))
        if {name: list(part.shape) for name, part in batch.items()} != shapes:
            raise ValueError(f'windows of {length} slots have other shapes')
    if not windows:
        raise ValueError('there are no windows')
    return windows


def _damaged(checkpoint: Path, why: object) -> ModelError:
    told = str(why).strip().splitlines()[0].rstrip('.:')
    return ModelError(f'The checkpoint {checkpoint} is damaged: {told}.', do='train again.')
