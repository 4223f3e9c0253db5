"""Compressed files, by the end of their name: .gz is gzip, .zst is Zstandard. Neither needs more than the base install.

Both readers notice when a file was cut short. Files of several members (as parallel compressors write) are read whole.
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
# What reading raises where the content is cut short or damaged; all but these are errors of the file system.
DAMAGED = (EOFError, zlib.error, zstd.ZstdError)
_GZIP_LEVEL = 6     # that of the gzip command; Python's default of 9 takes several times as long for a few per cent
_BUFFER_BYTES = 1 << 20


def is_compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in SUFFIXES


def open_to_read(path: Path) -> io.BufferedIOBase | BinaryIO:
    """The decompressed content of `path`; the content itself where the name names no compression.

    Errors   OSError where it cannot be opened or read, and one of DAMAGED while it is read.
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

    Errors   OSError as `file` raises it.
    """
    match path.suffix.lower():
        case '.gz':
            stream = gzip.GzipFile(fileobj=file, mode='wb', compresslevel=_GZIP_LEVEL, mtime=0, filename='')
        case '.zst':
            stream = zstd.open(file, 'wb')
        case _:
            yield file
            return
    # Records are short lines, and each call of a compressor costs as much as compressing many of them.
    with stream, io.BufferedWriter(cast(io.RawIOBase, stream), _BUFFER_BYTES) as lines:
        yield lines
