"""Compressed files: .gz is gzip, .zst is Zstandard. The base install can read and write both.

Both readers notice if a file was cut short. Files of several members, which parallel compressors write, are read whole.
"""
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SUFFIXES = ('.gz', '.zst')
# Errors while reading content that is cut short or damaged. All other errors come from the file system.
DAMAGE_ERRORS = (EOFError, zlib.error, zstd.ZstdError)
_GZIP_LEVEL = 6     # as the gzip command; Python's default, 9, takes several times as long and saves a few per cent
_BUFFER_BYTES = 1 << 20


def is_compressed(path: Path) -> bool:
    """Whether the name ends like that of a compressed file."""
    return path.suffix.lower() in SUFFIXES


def open_to_read(path: Path) -> io.BufferedIOBase | BinaryIO:
    """Open `path` and decompress it as its name says.

    Errors   OSError if it cannot be opened or read; one of DAMAGE_ERRORS while it is read.
    """
    match path.suffix.lower():
        case '.gz':
            return gzip.open(path, 'rb')
        case '.zst':
            return zstd.open(path, 'rb')
    return open(path, 'rb', buffering=_BUFFER_BYTES)


@contextmanager
def compressed(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """A stream into `file`, compressed as the name of `path` says. The stream is complete when the context ends.

    Errors   OSError from `file`.
    """
    match path.suffix.lower():
        case '.gz':
            stream = gzip.GzipFile(fileobj=file, mode='wb', compresslevel=_GZIP_LEVEL, mtime=0, filename='')
        case '.zst':
            stream = zstd.open(file, 'wb')
        case _:
            yield file
            return
    # Records are short lines. One call of a compressor costs as much as compressing many of them.
    with stream, io.BufferedWriter(cast(io.RawIOBase, stream), _BUFFER_BYTES) as lines:
        yield lines
