"""The folder of a served model. It is loaded only if its files are those that its manifest lists.

    triton_models/<name>/config.pbtxt, labels and the model card
    triton_models/<name>/<version>/model.onnx
    triton_models/<name>/<version>/manifest.json    SHA-256 per file, tiers, feature layout
"""
import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from stream.core.features import (
    CATEGORY_BUCKETS,
    COUNTER_NAMES,
    ITEM_BUCKETS,
    LENGTHS,
    SLOT_NUMBER_NAMES,
    TYPE_VOCABULARY,
)
from stream.core.layout import WindowLimits
from stream.core.messages import ModelInfo
from stream.errors import ModelError

Precision = Literal['fp32', 'int8']

MANIFEST = 'manifest.json'
WEIGHTS = 'model.onnx'
ROWS_MAX = 256      # most rows of a request, and of a batch, unless the manifest sets fewer
SHA256_PARAMETER = 'sha256'     # of the weights; a parameter of the model's Triton configuration


class FeatureLayout(msgspec.Struct, frozen=True):
    """The tensors that a model was trained on. With another layout its scores would be silently wrong."""

    lengths: tuple[int, ...]
    type_vocabulary: int
    item_buckets: int
    category_buckets: int
    slot_numbers: tuple[str, ...]
    counters: tuple[str, ...]


LAYOUT = FeatureLayout(LENGTHS, TYPE_VOCABULARY, ITEM_BUCKETS, CATEGORY_BUCKETS, SLOT_NUMBER_NAMES, COUNTER_NAMES)


class Manifest(msgspec.Struct, frozen=True):
    """The description of a model, stored beside its weights.

    layout             of the tensors that it takes
    tier_edges         lower bounds of the tiers from 1 up: spend within 90 days
    trained_on         the training data, in words
    currency, window   of the training events; the events that it scores must have the same
    horizon_days       one for each column of the output `purchase`
    priced             whether it learned from prices. If not, tiers and expected spend count purchases
    rows_max           most rows of a batch; more would take gigabytes of memory
    precision          of the weights and of their operands
    known_until_ms     all training data is older than this; 0: not known
    """

    name: str
    version: str
    files: dict[str, str]
    layout: FeatureLayout
    tier_names: tuple[str, ...]
    tier_edges: tuple[float, ...]
    trained_on: str
    currency: str
    window: WindowLimits
    command: str
    seed: int
    horizon_days: tuple[int, ...]
    priced: bool
    rows_max: int = ROWS_MAX
    precision: Precision = 'fp32'
    known_until_ms: int = 0


class Artefact(msgspec.Struct, frozen=True):
    """A verified model folder."""

    weights: Path
    info: ModelInfo
    manifest: Manifest


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def load_artefact(version_dir: Path) -> Artefact:
    """Verify the folder of one model version.

    Errors   ModelError if a file is missing, changed, not listed or a link, or if the feature layout is another.
    """
    restore = 'restore the folder from the exported one, or export the model again.'
    path = version_dir / MANIFEST
    if not path.is_file():
        raise ModelError(f'There is no model at {version_dir}: {MANIFEST} is missing.',
                         'point --model at <repository>/<name>/<version>, e.g. triton_models/shopper/1.')
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise ModelError(f'{path} cannot be read: {error}.', restore) from error
    found = {entry.name for entry in version_dir.iterdir()} - {MANIFEST}
    if found != set(manifest.files) or WEIGHTS not in found:
        raise ModelError(f'{version_dir} holds {sorted(found)}, but its manifest lists {sorted(manifest.files)}.',
                         restore)
    for name, digest in manifest.files.items():
        file = version_dir / name
        if file.is_symlink() or not file.is_file():
            raise ModelError(f'{file} is not a regular file.', restore)
        if sha256(file) != digest:
            raise ModelError(f'{file} is not the file that its manifest lists: its SHA-256 differs.', restore)
    if manifest.layout != LAYOUT:
        raise ModelError(f'The model in {version_dir} was trained on another feature layout.',
                         'train it and export it again with this version of the code.')
    info = ModelInfo(manifest.name, manifest.version, manifest.files[WEIGHTS])
    return Artefact(version_dir / WEIGHTS, info, manifest)
