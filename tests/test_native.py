from pathlib import Path

import pytest

from stream import native


def test_the_compiled_modules_are_those_of_their_sources():
    assert native.stale_modules() == [], 'Do: make .venv/test'


def test_a_changed_source_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / 'stream' / 'core'
    copy.mkdir(parents=True)
    for source in (native.PACKAGE / 'core').glob('*.p[xy][xd]'):
        (copy / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(native, 'PACKAGE', tmp_path / 'stream')
    assert native.stale_modules() == []
    with (copy / 'parse.pyx').open('a') as changed:
        changed.write('# other')
    assert native.stale_modules() == ['stream.core.parse']
    with (copy / 'user.pxd').open('a') as changed:
        changed.write('# other')
    assert len(native.stale_modules()) == len(list(copy.glob('*.pyx')))      # any of them may use a declaration
