"""Model repositories for Triton, made from an exported model, in three variants.

    onnxruntime   ONNX Runtime backend on CPU or GPU; the repository as it is exported
    tensorrt      the same, with the graph compiled by TensorRT; for GPUs, and the first start takes minutes
    python        Python backend with the onnxruntime package; for a Triton without the ONNX Runtime backend

All three serve the same model.onnx. TensorRT cannot serve an int8 model, because it needs another form of it. The
configuration holds the SHA-256 of the weights as the parameter `sha256`. A client can ask for it before it trusts the
scores.

Triton batches requests that wait while the model is busy. No request waits in order to be batched. The Python backend
has no batcher, because its model runs each request alone: the batcher's thread would only spin while requests wait
(measured with Triton 2.51: up to 0.7 of a core).

The queue has no bound by default, for two reasons. Clients already bound their requests in flight
(`triton_in_flight_max`). And with a bound, Triton's batcher misses wake-ups, so that some requests wait 500 ms
(measured with 2.51 on a CPU: its DynamicBatchScheduler prefetches nothing while there is a queue policy).

Triton runs a full batch of each window length before the model is ready. The windows come from files of raw numbers in
the model's folder `warmup`, named <length>.<input>.
"""
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from stream.core.features import LENGTHS
from stream.errors import ModelError, UsageError
from stream.scoring.artefact import MANIFEST, ROWS_MAX, SHA256_PARAMETER, WEIGHTS, load_artefact, sha256

Variant = Literal['onnxruntime', 'tensorrt', 'python']
VARIANTS: tuple[str, ...] = get_args(Variant)
CONFIG_FILE = 'config.pbtxt'
LABELS_FILE = 'tiers.txt'
WARMUP_FOLDER = 'warmup'            # Triton requires this name
RANKING_MANIFEST = 'ranking.json'   # of a graph that ranks items; another name, so that no worker loads it
ENGINE_CACHE = '/var/cache/stream-tensorrt'     # on the machine with the GPU; keeps TensorRT's engines across restarts
_TRITON_TYPES = {'int32': 'TYPE_INT32', 'int64': 'TYPE_INT64', 'float32': 'TYPE_FP32'}


class Tensor(msgspec.Struct, frozen=True):
    """Type and shape of one row; -1 is the number of slots."""

    type: str
    row_shape: tuple[int, ...]


class Served(msgspec.Struct, frozen=True):
    """The part of a manifest that Triton's configuration needs."""

    name: str
    version: str
    files: dict[str, str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    rows_max: int = ROWS_MAX


def triton_config(served: Served, variant: str = 'onnxruntime', queue_requests_max: int = 0, warm: bool = True) -> str:
    """The text of config.pbtxt.

    queue_requests_max   with more requests waiting, Triton answers UNAVAILABLE at once; 0: no bound
    warm                 whether WARMUP_FOLDER has windows of each length, to be scored before the model is ready
    Source   ModelConfig in Triton's model_config.proto; accelerator parameters in its ONNX Runtime backend's README.
    """
    engine = 'backend: "python"' if variant == 'python' else 'platform: "onnxruntime_onnx"'
    inputs = ',\n'.join(_tensor(*item) for item in served.inputs.items())
    outputs = ',\n'.join(_tensor(*item) for item in served.outputs.items())
    queue = f'default_queue_policy {{ max_queue_size: {queue_requests_max} }} ' if queue_requests_max else ''
    # Only the batcher can bound a queue.
    batching = f'dynamic_batching {{ {queue}}}\n' if variant != 'python' or queue else ''
    return f'''name: "{served.name}"
{engine}
max_batch_size: {served.rows_max}
input [
{inputs}
]
output [
{outputs}
]
version_policy {{ specific {{ versions: [ {served.version} ] }} }}
{batching}parameters {{
  key: "{SHA256_PARAMETER}"
  value {{ string_value: "{served.files[WEIGHTS]}" }}
}}
''' + _OF_VARIANT[variant](served) + ''.join(_warmup(served, slots) for slots in LENGTHS if warm)


def write_repository(version_dir: Path, repository: Path, variant: str, python_model: Path | None = None,
                     queue_requests_max: int = 0) -> Path:
    """Verify a version and write it into `repository`, as the only version of its model. Returns the model's folder.

    version_dir    of the model of the scores, or of the ranking
    python_model   the Python backend's model.py; for the variant `python` only
    Errors         ModelError if the version does not match its manifest, the manifest names no tensors, or the variant
                   cannot serve it; UsageError if the variant is unknown, or `repository` holds the exported version.
    """
    if variant not in VARIANTS or (variant == 'python') != bool(python_model):
        raise UsageError(f'{variant!r} is not a variant of a model repository.', f'use one of {", ".join(VARIANTS)}.')
    if (version_dir / RANKING_MANIFEST).is_file():
        if variant == 'tensorrt':
            raise ModelError(f'The ranking in {version_dir} has no lengths to compile for.',
                             'use the variant onnxruntime: the graph is small.')
        served, beside = load_ranking(version_dir), ()
    else:
        artefact = load_artefact(version_dir)
        if variant == 'tensorrt' and artefact.manifest.precision != 'fp32':
            raise ModelError(f'TensorRT does not take the {artefact.manifest.precision} version in {version_dir}.',
                             'use the fp32 version, which is also faster on a GPU.')
        served, beside = _described(version_dir / MANIFEST), (LABELS_FILE, WARMUP_FOLDER)
    model_dir = repository / served.name
    if model_dir.resolve() == version_dir.parent.resolve():
        raise UsageError(f'{repository} holds the exported model itself.', 'name another folder for the variant.')
    target = model_dir / served.version
    shutil.rmtree(model_dir, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copyfile(version_dir / WEIGHTS, target / WEIGHTS)
    if python_model:
        shutil.copyfile(python_model, target / 'model.py')
    for name in beside:
        source = version_dir.parent / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, model_dir / name)
    (model_dir / CONFIG_FILE).write_text(triton_config(served, variant, queue_requests_max, warm=bool(beside)))
    return model_dir


def load_ranking(version_dir: Path) -> Served:
    """The manifest of a version that ranks items. Errors: ModelError if its graph is not the one listed."""
    served = _described(version_dir / RANKING_MANIFEST)
    graph = version_dir / WEIGHTS
    if not graph.is_file() or sha256(graph) != served.files.get(WEIGHTS):
        raise ModelError(f'{graph} is not the file that its manifest lists: its SHA-256 differs.',
                         'export the model again.')
    return served


def _described(manifest: Path) -> Served:
    try:
        return msgspec.json.decode(manifest.read_bytes(), type=Served)
    except msgspec.DecodeError as error:
        raise ModelError(f'{manifest} does not describe the tensors: {error}.', 'export the model again.') from error


def _tensor(name: str, tensor: Tensor) -> str:
    label = f'\n    label_filename: "{LABELS_FILE}"' if name == 'tier_probabilities' else ''
    return (f'  {{\n    name: "{name}"\n    data_type: {_TRITON_TYPES[tensor.type]}\n'
            f'    dims: [ {", ".join(map(str, tensor.row_shape))} ]{label}\n  }}')


def _python(_served: Served) -> str:
    return 'instance_group [ { count: 1 kind: KIND_CPU } ]\n'


def _tensorrt(served: Served) -> str:
    """One engine for all batch sizes and lengths. The warm-up builds it before the model is ready.

    FP32, because its scores are compared with those of the embedded copy.
    """
    def shapes(rows: int, slots: int) -> str:
        return ','.join(f'{name}:' + 'x'.join(map(str, (rows, *_shape(tensor, slots))))
                        for name, tensor in served.inputs.items())

    parameters: dict[str, Any] = {
        'precision_mode': 'FP32', 'max_workspace_size_bytes': 1 << 30,
        'trt_engine_cache_enable': 1, 'trt_engine_cache_path': ENGINE_CACHE,
        'trt_profile_min_shapes': shapes(1, LENGTHS[0]), 'trt_profile_opt_shapes': shapes(served.rows_max, LENGTHS[1]),
        'trt_profile_max_shapes': shapes(served.rows_max, LENGTHS[-1])}
    accelerator = '\n'.join(f'      parameters {{ key: "{key}" value: "{value}" }}'
                            for key, value in parameters.items())
    return f'''instance_group [ {{ count: 1 kind: KIND_GPU }} ]
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator {{
      name: "tensorrt"
{accelerator}
    }}
  }}
}}
'''


def _warmup(served: Served, slots: int) -> str:
    inputs = ''.join(
        f'  inputs {{\n    key: "{name}"\n    value {{\n      data_type: {_TRITON_TYPES[tensor.type]}\n'
        f'      dims: [ {", ".join(map(str, _shape(tensor, slots)))} ]\n'
        f'      input_data_file: "{warmup_file(name, slots)}"\n    }}\n  }}\n'
        for name, tensor in served.inputs.items())
    return f'model_warmup {{\n  name: "{slots} slots"\n  batch_size: {served.rows_max}\n{inputs}}}\n'


def warmup_file(name: str, slots: int) -> str:
    """Name of the file with one input of a window of `slots` slots: raw numbers, little-endian, in C order."""
    return f'{slots}.{name}'


def _shape(tensor: Tensor, slots: int) -> tuple[int, ...]:
    return tuple(slots if size < 0 else size for size in tensor.row_shape)


_OF_VARIANT = {'onnxruntime': lambda _served: '', 'tensorrt': _tensorrt, 'python': _python}
