"""A checkpoint becomes a folder of the model repository that Triton and the embedded scorer serve.

    <repository>/<name>/config.pbtxt            Triton's configuration, ONNX Runtime backend
    <repository>/<name>/tiers.txt               labels of tier_probabilities, one a line
    <repository>/<name>/README.md               the model card, from the checkpoint's numbers
    <repository>/<name>/<version>/model.onnx    one graph, weights inside
    <repository>/<name>/<version>/manifest.json what `stream.scoring.artefact` verifies, and the graph's signature

The exported graph is run on the checkpoint's real windows and compared with torch before anything is written.
"""
import json
import tempfile
import warnings
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn.functional import pad

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS
from stream.core.scores import OUTPUT_NAMES
from stream.core.window import WindowLimits
from stream.errors import ModelError, UsageError
from stream.learn.card import card
from stream.learn.dataset import CHURN_DAYS, INTENT_DAYS, SPEND_DAYS, TIERS
from stream.learn.model import INPUT_NAMES, ShopperModel
from stream.learn.train import Checkpoint, load
from stream.scoring.artefact import LAYOUT, MANIFEST, WEIGHTS, Manifest, sha256

OPSET = 17
ROWS_MAX = 256
TOLERANCE = 1e-5        # absolute and relative
LABELS_FILE = 'tiers.txt'

# name -> (numpy type, shape of one row; -1 is the number of slots)
INPUTS = {'categories': ('int32', (-1, 3)), 'numbers': ('float32', (-1, SLOT_NUMBERS)),
          'counters': ('float32', (COUNTERS,)), 'row_id': ('int64', (1,))}
OUTPUTS = {'purchase_intent': ('float32', (1,)), 'tier_probabilities': ('float32', (TIERS,)),
           'expected_spend': ('float32', (1,)), 'churn': ('float32', (1,)), 'row_id_out': ('int64', (1,))}
_TRITON_TYPES = {'int32': 'TYPE_INT32', 'int64': 'TYPE_INT64', 'float32': 'TYPE_FP32'}


def export(checkpoint: Path, repository: Path, name: str = 'shopper', version: int = 1) -> Path:
    """Export a checkpoint into a model repository and return the version's folder.

    Errors   ModelError where the checkpoint cannot be read, or the graph does not give torch's scores; UsageError where
             the name or the version does not suit Triton.
    Promise  the same checkpoint gives the same bytes with the same releases of torch and onnx.
    """
    if version < 1 or not name.replace('_', '').replace('-', '').isalnum():
        raise UsageError(f'{name!r} version {version} is no name for Triton.',
                         do='use letters, digits, - and _, and a version of 1 or more.')
    kept = load(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / WEIGHTS
        _write_graph(kept.model, kept.windows, graph)
        difference = parity(kept, graph)
        content = graph.read_bytes()
    model_dir = repository / name
    version_dir = model_dir / str(version)
    version_dir.mkdir(parents=True, exist_ok=True)
    (version_dir / WEIGHTS).write_bytes(content)
    (model_dir / 'config.pbtxt').write_text(_triton_config(name, version))
    (model_dir / LABELS_FILE).write_text('\n'.join(kept.config['tiers']['names']) + '\n')
    (version_dir / MANIFEST).write_text(json.dumps(_manifest(kept, model_dir, name, version), indent=1) + '\n')
    (model_dir / 'README.md').write_text(card(kept, name, version, difference, content))
    return version_dir


def parity(kept: Checkpoint, graph: Path) -> float:
    """The largest difference between the graph and torch on the checkpoint's windows, padded to each length in turn,
    whole batches and single rows; relative for amounts above 1.

    Errors   ModelError if it is above TOLERANCE.
    """
    session = onnxruntime.InferenceSession(graph, providers=['CPUExecutionProvider'])
    worst = 0.0
    for length in LENGTHS:
        fitting = [padded(batch, length) for own, batch in kept.windows.items() if own <= length]
        for batch in (*fitting, *({name: part[:1] for name, part in batch.items()} for batch in fitting)):
            got = session.run(OUTPUT_NAMES, {name: part.numpy() for name, part in batch.items()})
            with torch.no_grad():
                wanted = kept.model(*(batch[name] for name in INPUT_NAMES))
            for output, (mine, theirs) in zip(OUTPUT_NAMES, zip(got, wanted, strict=True), strict=True):
                theirs = theirs.numpy()
                difference = float((np.abs(mine - theirs) / np.maximum(1.0, np.abs(theirs))).max())
                if not difference <= TOLERANCE:
                    raise ModelError(
                        f'The exported graph and torch differ by {difference:.1e} in {output} at length {length}, '
                        f'at most {TOLERANCE:.0e} is allowed.', do='use the releases that pyproject.toml names.')
                worst = max(worst, difference)
    return worst


def padded(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """The same windows with padding up to `length` slots."""
    missing = length - batch['categories'].shape[1]
    return batch | {name: pad(batch[name], (0, 0, 0, missing)) for name in ('categories', 'numbers')}


def _write_graph(model: ShopperModel, windows: dict[int, dict[str, Tensor]], path: Path) -> None:
    example = windows[max(windows)]
    with warnings.catch_warnings():
        # Torch deprecates this exporter, and parts that it uses itself; the one that replaces it needs a package more.
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        # Shapes read as Python numbers become constants; parity at every length shows that none of them matters.
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)
        torch.onnx.export(
            model, tuple(example[name] for name in INPUT_NAMES), path, dynamo=False, opset_version=OPSET,
            input_names=list(INPUT_NAMES), output_names=list(OUTPUT_NAMES),
            dynamic_axes={name: {0: 'rows', 1: 'slots'} if shape[0] == -1 else {0: 'rows'}
                          for name, (_, shape) in (INPUTS | OUTPUTS).items()})


def _manifest(kept: Checkpoint, model_dir: Path, name: str, version: int) -> dict:
    config = kept.config
    manifest = Manifest(
        name=name, version=str(version), files={WEIGHTS: sha256(model_dir / str(version) / WEIGHTS)}, layout=LAYOUT,
        tier_names=tuple(config['tiers']['names']), tier_edges=(0.0, *config['tiers']['edges']),
        trained_on=config['source'], currency=config['currency'],
        window=msgspec.convert(config['window'], WindowLimits),
        command=config['command'], seed=config['seed'])
    return msgspec.to_builtins(manifest) | {
        'repository_files': {file: sha256(model_dir / file) for file in ('config.pbtxt', LABELS_FILE)},
        'inputs': {key: {'type': kind, 'row_shape': shape} for key, (kind, shape) in INPUTS.items()},
        'outputs': {key: {'type': kind, 'row_shape': shape} for key, (kind, shape) in OUTPUTS.items()},
        'horizon_days': {'purchase_intent': INTENT_DAYS, 'churn': CHURN_DAYS, 'expected_spend': SPEND_DAYS,
                         'tier_probabilities': SPEND_DAYS},
        'opset': OPSET, 'licence': 'Apache-2.0'}


def _triton_config(name: str, version: int) -> str:
    def tensor(key: str, kind: str, shape: tuple[int, ...]) -> str:
        label = f'\n    label_filename: "{LABELS_FILE}"' if key == 'tier_probabilities' else ''
        return (f'  {{\n    name: "{key}"\n    data_type: {_TRITON_TYPES[kind]}\n'
                f'    dims: [ {", ".join(map(str, shape))} ]{label}\n  }}')

    inputs = ',\n'.join(tensor(key, *what) for key, what in INPUTS.items())
    outputs = ',\n'.join(tensor(key, *what) for key, what in OUTPUTS.items())
    return f'''name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {ROWS_MAX}
input [
{inputs}
]
output [
{outputs}
]
version_policy {{ specific {{ versions: [ {version} ] }} }}
dynamic_batching {{
  max_queue_delay_microseconds: 1000
  default_queue_policy {{ max_queue_size: 1024 }}
}}
'''
