"""A checkpoint becomes a folder of the model repository that Triton and the embedded scorer serve.

    <repository>/<name>/config.pbtxt            Triton's configuration, ONNX Runtime backend
    <repository>/<name>/tiers.txt               labels of tier_probabilities, one a line
    <repository>/<name>/warmup/<length>.<input> a real window of each length, which Triton runs before it says ready
    <repository>/<name>/README.md               the model card, from the checkpoint's numbers
    <repository>/<name>/<version>/model.onnx    one graph, weights inside
    <repository>/<name>/<version>/manifest.json what `stream.scoring.artefact` verifies, and the graph's signature

Beside it, in <name>_next, lies the ranking of what is bought next (stream.learn.ranking.export).

The exported graph is run on the checkpoint's real windows and compared with torch before anything is written. An int8
graph (stream.learn.quantize) may differ by more. Of both, a row's scores must not depend on the rows beside it. The
worker asks for the first five outputs; `purchase` (a purchase within each of the manifest's `horizon_days`),
`typical_spend` and `refund`, where it has that head, are for `stream predict` and for whoever else asks Triton.

A name holds one version: its configuration, which says the SHA-256 of the graph that clients may trust, its labels,
warm-up and card could be those of one alone. Another version goes to another name, or takes its place.
"""
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import torch
from torch.nn.functional import pad

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS
from stream.core.layout import WindowLimits
from stream.errors import ModelError, UsageError
from stream.learn.card import NAME, card
from stream.learn.checkpoint import Checkpoint, load
from stream.learn.dataset import HORIZON_DAYS, REFUND_DAYS, SPEND_DAYS
from stream.learn.fit import rows_max
from stream.learn.model import HORIZONS, INPUT_NAMES, ShopperModel
from stream.learn.quantize import quantize
from stream.learn.ranking.export import export_ranking
from stream.learn.ranking.served import ranking_dir
from stream.learn.text.tuning import merged
from stream.scoring.artefact import LAYOUT, MANIFEST, WEIGHTS, Manifest, Precision, sha256
from stream.scoring.repository import (
    CONFIG_FILE,
    LABELS_FILE,
    RANKING_MANIFEST,
    WARMUP_FOLDER,
    Served,
    Tensor,
    triton_config,
    warmup_file,
)

OPSET = 17
# How far a graph may be from torch: in any score, and in spend, which is relative for amounts above 1.
TOLERANCES = {'fp32': (1e-5, 1e-5), 'int8': (0.02, 0.1)}
NEIGHBOURS_TOLERANCE = 1e-5     # of a row alone from the same row among others

INPUTS = {'categories': Tensor('int32', (-1, 3)), 'numbers': Tensor('float32', (-1, SLOT_NUMBERS)),
          'counters': Tensor('float32', (COUNTERS,)), 'row_id': Tensor('int64', (1,))}


def outputs(model: ShopperModel) -> dict[str, Tensor]:
    """The graph's outputs in their order, a row each."""
    one = Tensor('float32', (1,))
    told = {'purchase_intent': one, 'tier_probabilities': Tensor('float32', (model.tiers,)), 'expected_spend': one,
            'churn': one, 'row_id_out': Tensor('int64', (1,)), 'purchase': Tensor('float32', (HORIZONS,)),
            'typical_spend': one}
    return told | {'refund': one} if model.refund else told


def export(checkpoint: Path, repository: Path, name: str = NAME, version: int = 1,
           precision: Precision = 'fp32') -> Path:
    """Export a checkpoint into a model repository and return the version's folder.

    Errors   ModelError where the checkpoint cannot be read, or the graph does not give torch's scores, or another row's
             in other company; UsageError where the name or the version does not suit Triton, or the name is that of
             another version, or of another precision.
    Promise  the same checkpoint gives the same bytes with the same releases of torch and onnx.
    """
    if version < 1 or not name.replace('_', '').replace('-', '').isalnum():
        raise UsageError(f'{name!r} version {version} is no name for Triton.',
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
    """Errors: UsageError where what is there already would lose its configuration and card, or would be another model
    under the same version."""
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


def parity(kept: Checkpoint, graph: Path, precision: Precision = 'fp32') -> float:
    """The largest difference between the graph and torch on the checkpoint's windows, padded to each length in turn,
    whole batches and single rows; relative for amounts above 1.

    Errors   ModelError if it is above what TOLERANCES allows.
    """
    session, names, worst = _session(graph), list(outputs(kept.model)), 0.0
    for length in LENGTHS:
        fitting = [padded(batch, length) for own, batch in kept.windows.items() if own <= length]
        for batch in (*fitting, *({name: part[:1] for name, part in batch.items()} for batch in fitting)):
            got = session.run(names, {name: part.numpy() for name, part in batch.items()})
            with torch.no_grad():
                wanted = kept.model(*(batch[name] for name in INPUT_NAMES))
            for output, (mine, theirs) in zip(names, zip(got, wanted, strict=True), strict=True):
                difference = _difference(output, mine, theirs.numpy())
                allowed = TOLERANCES[precision]['spend' in output]
                if not difference <= allowed:
                    raise ModelError(
                        f'The exported graph and torch differ by {difference:.1e} in {output} at length {length}, '
                        f'at most {allowed:.0e} is allowed.',
                        do='use the releases that pyproject.toml names.' if precision == 'fp32' else
                        'export it in fp32: this model does not bear 8 bits.')
                worst = max(worst, difference)
    return worst


def check_neighbours(kept: Checkpoint, graph: Path) -> None:
    """Compare the checkpoint's windows, each alone, with the same ones in a full batch.

    Errors   ModelError if they differ by more than NEIGHBOURS_TOLERANCE: the scores would depend on the batching.
    """
    session, names = _session(graph), list(outputs(kept.model))
    for batch in kept.windows.values():
        parts = {name: part.numpy() for name, part in batch.items()}
        rows = np.arange(rows_max(kept.model)) % len(parts['row_id'])
        among = session.run(names, {name: part[rows] for name, part in parts.items()})
        for row in range(min(len(rows), len(parts['row_id']))):
            alone = session.run(names, {name: part[row:row + 1] for name, part in parts.items()})
            for output, mine, theirs in zip(names, alone, among, strict=True):
                difference = _difference(output, mine[0], theirs[row])
                if not difference <= NEIGHBOURS_TOLERANCE:
                    raise ModelError(f'A row alone and among others differ by {difference:.1e} in {output}.',
                                     do='export it in fp32.')


def _difference(output: str, mine: np.ndarray, theirs: np.ndarray) -> float:
    """The largest one, relative for numbers above 1. Typical spend is compared where both tell one: at a chance of one
    half the last digit decides whether they do."""
    apart = np.abs(mine - theirs) / np.maximum(1.0, np.abs(theirs))
    return float((apart if output != 'typical_spend' else np.where((mine > 0) == (theirs > 0), apart, 0.0)).max())


def _session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3      # errors; they come as exceptions too
    return onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])


def _write_warmup(windows: dict[int, dict[str, torch.Tensor]], folder: Path) -> None:
    """One real window of each length; where there was none as long, a shorter one padded, or a longer one cut."""
    folder.mkdir(exist_ok=True)
    for length in LENGTHS:
        own = max((some for some in windows if some <= length), default=min(windows))
        batch = windows[own] if own > length else padded(windows[own], length)
        for name, tensor in INPUTS.items():
            row = batch[name][0][:length] if tensor.row_shape[0] == -1 else batch[name][0]
            (folder / warmup_file(name, length)).write_bytes(row.contiguous().numpy().tobytes())


def padded(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The same windows with padding up to `length` slots."""
    missing = length - batch['categories'].shape[1]
    return batch | {name: pad(batch[name], (0, 0, 0, missing)) for name in ('categories', 'numbers')}


def write_graph(model: ShopperModel, windows: dict[int, dict[str, torch.Tensor]], path: Path) -> None:
    """Write the model as ONNX, for any number of rows and slots. `windows`: some real ones, to trace it with."""
    model, example = merged(model), windows[max(windows)]
    with warnings.catch_warnings():
        # Torch deprecates this exporter, and parts that it uses itself; the one that replaces it needs a package more.
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        # Of the places by which masks and tables are looked up none is negative.
        warnings.filterwarnings('ignore', 'Exporting aten::index operator of advanced indexing', UserWarning)
        # Shapes read as Python numbers become constants; parity at every length shows that none of them matters.
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)
        torch.onnx.export(
            model, tuple(example[name] for name in INPUT_NAMES), path, dynamo=False, opset_version=OPSET,
            input_names=list(INPUT_NAMES), output_names=list(outputs(model)),
            dynamic_axes={name: {0: 'rows', 1: 'slots'} if tensor.row_shape[0] == -1 else {0: 'rows'}
                          for name, tensor in (INPUTS | outputs(model)).items()})


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
