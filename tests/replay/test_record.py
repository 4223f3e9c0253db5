"""Where a recording is written and where it begins; what it reads is in tests/integration/test_publish_record.py."""
import gzip
from pathlib import Path

import pytest
import zstandard

from stream.errors import UsageError
from stream.replay.compression import compressed
from stream.replay.record import check_target, parse_start


@pytest.mark.parametrize('name', ['r.jsonl', 'r.jsonl.gz', 'r.jsonl.zst'])
def test_the_name_says_how_it_is_written(tmp_path: Path, name: str):
    path = tmp_path / name
    check_target(path)
    with path.open('wb') as file, compressed(file, path) as stream:
        stream.write(b'one\n')
        stream.write(b'two\n')
    content = path.read_bytes()
    if name.endswith('.gz'):
        content = gzip.decompress(content)
    elif name.endswith('.zst'):
        content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    assert content == b'one\ntwo\n'
    with pytest.raises(UsageError, match='exists already'):
        check_target(path)


@pytest.mark.parametrize('name', ['r.json', 'r.zst', 'r.jsonl.zip', 'no/r.jsonl', 'r.jsonl.gz.txt'])
def test_other_names_are_refused(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match='cannot be written'):
        check_target(tmp_path / name)


def test_a_start_is_the_beginning_an_offset_or_a_time():
    assert parse_start('beginning') == ('offset', 0)
    assert parse_start('17') == ('offset', 17)
    assert parse_start('2023-11-14T22:13:20.5Z') == ('time', 1_700_000_000_500)
    for text in ('', '-1', 'end', '2023-11-14', '2023-11-14T22:13:20'):
        with pytest.raises(UsageError, match='not a place to begin'):
            parse_start(text)
