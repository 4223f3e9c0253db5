"""Triton's own parser reads the configuration of every variant, and each serves the files that were exported."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS
from stream.core.scores import OUTPUT_NAMES
from stream.errors import ModelError, UsageError
from stream.scoring.artefact import ROWS_MAX, load_artefact
from stream.scoring.repository import ENGINE_CACHE, VARIANTS, write_repository

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / 'triton_models' / 'shopper' / '1'
PYTHON_MODEL = ROOT / 'deploy' / 'local' / 'model.py'
INPUT_ROWS = {'categories': [-1, 3], 'numbers': [-1, SLOT_NUMBERS], 'counters': [COUNTERS], 'row_id': [1]}

TYPES = {model_config_pb2.TYPE_INT32: '<i4', model_config_pb2.TYPE_INT64: '<i8', model_config_pb2.TYPE_FP32: '<f4'}


def rendered(variant: str, into: Path, **options) -> Path:
    return write_repository(SHIPPED, into, variant, PYTHON_MODEL if variant == 'python' else None, **options)


def parsed(model_dir: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((model_dir / 'config.pbtxt').read_text(), model_config_pb2.ModelConfig())


@pytest.mark.parametrize('variant', VARIANTS)
def test_triton_reads_it(variant: str, tmp_path: Path):
    model_dir = rendered(variant, tmp_path, queue_requests_max=7)
    config = parsed(model_dir)
    assert config.name == 'shopper' == model_dir.name
    assert (config.backend, config.platform) == (
        ('python', '') if variant == 'python' else ('', 'onnxruntime_onnx'))
    assert {entry.name: list(entry.dims) for entry in config.input} == INPUT_ROWS
    assert [entry.name for entry in config.output] == [*OUTPUT_NAMES, 'purchase', 'typical_spend', 'refund']
    assert list(config.version_policy.specific.versions) == [1]
    assert config.max_batch_size == ROWS_MAX
    assert config.HasField('dynamic_batching')
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert config.parameters['sha256'].string_value == load_artefact(SHIPPED).info.sha256
    labels = next(entry.label_filename for entry in config.output if entry.name == 'tier_probabilities')
    assert (model_dir / labels).read_text().split() == list(load_artefact(SHIPPED).manifest.tier_names)
    files = {'model.onnx', 'model.py'} if variant == 'python' else {'model.onnx'}
    assert {path.name for path in (model_dir / '1').iterdir()} == files
    assert (model_dir / '1' / 'model.onnx').read_bytes() == (SHIPPED / 'model.onnx').read_bytes()


def test_the_queue_has_a_bound_only_where_one_is_asked_for(tmp_path: Path):
    config = parsed(rendered('onnxruntime', tmp_path))
    assert config.HasField('dynamic_batching') and not config.dynamic_batching.HasField('default_queue_policy')


def test_without_a_bound_the_python_backend_has_no_batcher(tmp_path: Path):
    """Its model runs each request alone, and the batcher's thread spins while requests wait."""
    assert not parsed(rendered('python', tmp_path)).HasField('dynamic_batching')


def test_the_committed_configuration_is_the_onnxruntime_one(tmp_path: Path):
    assert (rendered('onnxruntime', tmp_path) / 'config.pbtxt').read_text() == (
        SHIPPED.parent / 'config.pbtxt').read_text()


def test_tensorrt_gets_a_profile_for_every_length(tmp_path: Path):
    config = parsed(rendered('tensorrt', tmp_path))
    accelerator, = config.optimization.execution_accelerators.gpu_execution_accelerator
    parameters = dict(accelerator.parameters)
    assert accelerator.name == 'tensorrt'
    assert parameters['precision_mode'] == 'FP32'
    assert parameters['trt_engine_cache_path'] == ENGINE_CACHE
    assert parameters['trt_profile_min_shapes'] == (
        f'categories:1x8x3,numbers:1x8x{SLOT_NUMBERS},counters:1x{COUNTERS},row_id:1x1')
    assert parameters['trt_profile_max_shapes'] == (
        f'categories:256x64x3,numbers:256x64x{SLOT_NUMBERS},counters:256x{COUNTERS},row_id:256x1')


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_length_is_warmed_with_a_real_window(variant: str, tmp_path: Path):
    model_dir = rendered(variant, tmp_path)
    config = parsed(model_dir)
    assert [warmup.inputs['categories'].dims[0] for warmup in config.model_warmup] == list(LENGTHS)
    for length, warmup in zip(LENGTHS, config.model_warmup, strict=True):
        assert warmup.batch_size == ROWS_MAX and set(warmup.inputs) == set(INPUT_ROWS)
        read = {}
        for name, entry in warmup.inputs.items():
            assert list(entry.dims) == [length if size < 0 else size for size in INPUT_ROWS[name]]
            content = (model_dir / 'warmup' / entry.input_data_file).read_bytes()
            read[name] = np.frombuffer(content, TYPES[entry.data_type]).reshape(entry.dims)
        filled = int((read['categories'][:, 0] > 0).sum())
        assert length / 2 < filled <= length and not read['numbers'][filled:].any() and read['counters'].any()


def test_an_int8_version_is_not_for_tensorrt(tmp_path: Path):
    exported = tmp_path / 'exported' / 'shopper'
    shutil.copytree(SHIPPED.parent, exported)
    manifest = json.loads((exported / '1' / 'manifest.json').read_bytes()) | {'precision': 'int8'}
    (exported / '1' / 'manifest.json').write_text(json.dumps(manifest))
    assert write_repository(exported / '1', tmp_path / 'cpu', 'onnxruntime').is_dir()
    with pytest.raises(ModelError, match='int8'):
        write_repository(exported / '1', tmp_path / 'gpu', 'tensorrt')


def test_rendering_again_replaces_what_was_there(tmp_path: Path):
    rendered('python', tmp_path)
    assert not (rendered('tensorrt', tmp_path) / '1' / 'model.py').exists()


def test_the_exported_version_is_never_written_over():
    before = sorted(SHIPPED.parent.rglob('*'))
    with pytest.raises(UsageError, match='another folder'):
        rendered('tensorrt', SHIPPED.parent.parent)
    assert sorted(SHIPPED.parent.rglob('*')) == before


def test_what_cannot_be_rendered(tmp_path: Path):
    with pytest.raises(UsageError, match='not a variant'):
        rendered('openvino', tmp_path)
    with pytest.raises(UsageError, match='not a variant'):
        write_repository(SHIPPED, tmp_path, 'python')
    changed = tmp_path / 'shopper' / '1'
    changed.mkdir(parents=True)
    (changed / 'model.onnx').write_bytes((SHIPPED / 'model.onnx').read_bytes())
    manifest = json.loads((SHIPPED / 'manifest.json').read_bytes())
    del manifest['outputs']
    (changed / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match='outputs'):
        write_repository(changed, tmp_path / 'out', 'onnxruntime')
    (changed / 'model.onnx').write_bytes(b'another graph')
    with pytest.raises(ModelError, match='SHA-256'):
        write_repository(changed, tmp_path / 'out', 'onnxruntime')
