import json
from pathlib import Path

import msgspec
import pytest

from stream.core.layout import WindowLimits
from stream.errors import ModelError
from stream.scoring.artefact import LAYOUT, MANIFEST, Manifest, load_artefact, sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / '1'
    made.mkdir()
    (made / 'model.onnx').write_bytes(b'weights')
    manifest = {
        'name': 'm', 'version': '1', 'files': {'model.onnx': sha256(made / 'model.onnx')},
        'layout': msgspec.to_builtins(LAYOUT), 'horizon_days': [1, 7, 30, 90, 273], 'priced': True,
        'tier_names': ['low', 'high'], 'tier_edges': [1.0], 'command': 'stream train', 'seed': 7,
        'trained_on': 'nothing', 'currency': 'EUR', 'window': msgspec.to_builtins(WindowLimits())}
    (made / MANIFEST).write_text(json.dumps(manifest))
    return made


def change(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_intact_folder_is_loaded(folder: Path):
    artefact = load_artefact(folder)
    assert (artefact.info.name, artefact.info.version) == ('m', '1')
    assert artefact.info.sha256 == sha256(folder / 'model.onnx')
    assert isinstance(artefact.manifest, Manifest)


def flip_a_byte(folder: Path) -> None:
    (folder / 'model.onnx').write_bytes(b'weightz')


def add_a_pickle(folder: Path) -> None:
    (folder / 'extra.pkl').write_bytes(b'\x80\x04.')


def link_out(folder: Path) -> None:
    outside = folder.parent / 'outside.onnx'
    (folder / 'model.onnx').rename(outside)
    (folder / 'model.onnx').symlink_to(outside)


@pytest.mark.parametrize(('spoil', 'message'), [
    (flip_a_byte, 'SHA-256'),
    (add_a_pickle, 'extra.pkl'),
    (link_out, 'regular file'),
    (lambda folder: (folder / 'model.onnx').unlink(), 'its manifest lists'),
    (lambda folder: (folder / MANIFEST).unlink(), 'no model'),
    (lambda folder: (folder / MANIFEST).write_text('{'), 'cannot be read'),
    (lambda folder: change(folder, tier_names=5), 'cannot be read'),
    (lambda folder: change(folder, layout={**msgspec.to_builtins(LAYOUT), 'item_buckets': 8}), 'feature layout'),
    (lambda folder: change(folder, files={'../outside.onnx': '00'}), 'its manifest lists'),
])
def test_a_changed_folder_is_refused(folder: Path, spoil, message: str):
    spoil(folder)
    with pytest.raises(ModelError, match=message) as refused:
        load_artefact(folder)
    assert 'Do:' in str(refused.value)
