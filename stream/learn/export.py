"""Export a checkpoint into the model repository that Triton and the embedded scorer serve.

    <repository>/<name>/config.pbtxt            Triton's configuration, ONNX Runtime backend
    <repository>/<name>/tiers.txt               labels of tier_probabilities, one per line
    <repository>/<name>/warmup/<length>.<input> a real window of each length, which Triton runs before it reports ready
    <repository>/<name>/README.md               the model card, from the checkpoint's numbers
    <repository>/<name>/<version>/model.onnx    one graph, weights inside
    <repository>/<name>/<version>/manifest.json what `stream.scoring.artefact` verifies, and the graph's signature

The ranking of what is bought next is beside it, in <name>_next (stream.learn.ranking.export).

Before anything is written, the graph is compared with torch on the checkpoint's real windows (stream.learn.graph). The
worker asks for the first five outputs. `purchase` (within each of the manifest's `horizon_days`), `typical_spend` and
`refund`, if the model has that head, are for `stream predict` and other clients of Triton.

A name holds one version, because its configuration (with the SHA-256 that clients may trust), labels, warm-up and card
belong to one graph. Another version needs another name, or replaces the first.
"""
import json
import shutil
import tempfile
from pathlib import Path

import msgspec
import torch

from stream.core.features import LENGTHS
from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn.card import NAME, card
from stream.learn.checkpoint import Checkpoint, load
from stream.learn.dataset import HORIZON_DAYS, REFUND_DAYS, SPEND_DAYS
from stream.learn.fit import rows_max
from stream.learn.graph import (
    INPUTS,
    OPSET,
    check_neighbours,
    outputs,
    padded,
    parity,
    quantize,
    write_graph,
)
from stream.learn.ranking.export import export_ranking
from stream.learn.ranking.next_items import ranking_dir
from stream.scoring.artefact import LAYOUT, MANIFEST, WEIGHTS, Manifest, Precision, sha256
from stream.scoring.repository import (
    CONFIG_FILE,
    LABELS_FILE,
    RANKING_MANIFEST,
    WARMUP_FOLDER,
    Served,
    triton_config,
    warmup_file,
)


def export(checkpoint: Path, repository: Path, name: str = NAME, version: int = 1,
           precision: Precision = 'fp32') -> Path:
    """Export a checkpoint into a model repository and return the version's folder.

    Errors   ModelError where the checkpoint cannot be read, or the graph does not give torch's scores, or another row's
             in other company; UsageError where the name or the version does not suit Triton, or the name is that of
             another version, or of another precision.
    Promise  the same checkpoint gives the same bytes with the same releases of torch and onnx.
    """
    if version < 1 or not name.replace('_', '').replace('-', '').isalnum():
        raise UsageError(f'{name!r} version {version} is not a name for Triton.',
                         do='use letters, digits, - and _, and a version of 1 or more.')
    _refuse_another(repository / name, version, precision)
    kept = load(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / WEIGHTS
        write_graph(kept.model, kept.windows, graph)
        difference = parity(kept, graph)
        if precision == 'int8':
            quantize(graph, {length: {name: part.numpy() for name, part in batch.items()}
                             for length, batch in kept.training_windows.items()}, graph, rows_max(kept.model))
            difference = parity(kept, graph, precision)
        check_neighbours(kept, graph)
        content = graph.read_bytes()
    model_dir = repository / name
    version_dir = model_dir / str(version)
    version_dir.mkdir(parents=True, exist_ok=True)
    (version_dir / WEIGHTS).write_bytes(content)
    served = Served(name, str(version), {WEIGHTS: sha256(version_dir / WEIGHTS)}, INPUTS, outputs(kept.model),
                    rows_max(kept.model))
    (model_dir / CONFIG_FILE).write_text(triton_config(served))
    (model_dir / LABELS_FILE).write_text('\n'.join(kept.config['tiers']['names']) + '\n')
    _write_warmup(kept.windows, model_dir / WARMUP_FOLDER)
    manifest = _manifest(kept, model_dir, name, version, precision)
    (version_dir / MANIFEST).write_text(json.dumps(manifest, indent=1) + '\n')
    (model_dir / 'README.md').write_text(card(kept, name, version, difference, content, precision))
    if kept.recommender is not None:
        export_ranking(kept.recommender, version_dir)
    else:       # of an earlier model
        shutil.rmtree(ranking_dir(version_dir), ignore_errors=True)
    return version_dir


def _refuse_another(model_dir: Path, version: int, precision: Precision) -> None:
    """Errors: UsageError if the export would overwrite the configuration and card of another model or version."""
    version_dir = model_dir / str(version)
    if (version_dir / RANKING_MANIFEST).is_file():
        raise UsageError(f'{version_dir} is the ranking of another model.',
                         do='give this one a name of its own (--name).')
    if (ranking_dir(version_dir) / MANIFEST).is_file():
        raise UsageError(f'{ranking_dir(version_dir)}, where the ranking would lie, is a model of scores.',
                         do='give this one a name of its own (--name).')
    for manifest in sorted(model_dir.glob(f'*/{MANIFEST}')):
        if manifest.parent.name != str(version):
            raise UsageError(
                f'{model_dir} holds version {manifest.parent.name}: its configuration, labels, warm-up and card would '
                f'be those of version {version}.',
                do='give this one a name of its own (--name), or remove the other one.')
        if json.loads(manifest.read_bytes()).get('precision', 'fp32') != precision:
            raise UsageError(f'{manifest.parent} is another precision than {precision}.',
                             do='give this one a name of its own (--name).')


def _write_warmup(windows: dict[int, dict[str, torch.Tensor]], folder: Path) -> None:
    """Write one real window of each length: a shorter one padded, or a longer one cut, where none has that length."""
    folder.mkdir(exist_ok=True)
    for length in LENGTHS:
        own = max((some for some in windows if some <= length), default=min(windows))
        batch = windows[own] if own > length else padded(windows[own], length)
        for name, tensor in INPUTS.items():
            row = batch[name][0][:length] if tensor.row_shape[0] == -1 else batch[name][0]
            (folder / warmup_file(name, length)).write_bytes(row.contiguous().numpy().tobytes())


def _manifest(kept: Checkpoint, model_dir: Path, name: str, version: int, precision: Precision) -> dict:
    config = kept.config
    warmups = sorted(f'{WARMUP_FOLDER}/{path.name}' for path in (model_dir / WARMUP_FOLDER).iterdir())
    manifest = Manifest(
        name=name, version=str(version), files={WEIGHTS: sha256(model_dir / str(version) / WEIGHTS)}, layout=LAYOUT,
        tier_names=tuple(config['tiers']['names']), tier_edges=(0.0, *config['tiers']['edges']),
        trained_on=config['source'], currency=config['currency'],
        window=msgspec.convert(config['window'], WindowLimits),
        command=config['command'], seed=config['seed'], horizon_days=HORIZON_DAYS, priced=config['priced'],
        rows_max=rows_max(kept.model), precision=precision,
        known_until_ms=config['data']['known_until_ms' if config['refit'] else 'cut_ms'])
    return msgspec.to_builtins(manifest) | {
        'repository_files': {file: sha256(model_dir / file) for file in (CONFIG_FILE, LABELS_FILE, *warmups)},
        'inputs': msgspec.to_builtins(INPUTS), 'outputs': msgspec.to_builtins(outputs(kept.model)),
        'spend_days': SPEND_DAYS, 'refund_days': REFUND_DAYS, 'opset': OPSET, 'licence': 'Apache-2.0'}
