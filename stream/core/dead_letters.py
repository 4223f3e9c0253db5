"""A dead letter: a record that is no event, kept as it came, with where it was read and why it was refused.

The worker writes it to a topic, under a key that names the place, so that a redelivered record overwrites its letter.
A replay writes it to a file, one JSON object a line.
"""
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from stream.core.events import Refusal

Header = tuple[str, bytes | None]


class DeadLetter(msgspec.Struct, frozen=True, gc=False):
    """One refused record.

    topic, partition, offset   where it was read; an empty topic: it was no record of a topic
    file, row                  where a replay read it; an empty file: it was not read from a file by rows
    """

    refusal: Refusal
    value: bytes | None
    topic: str = ''
    partition: int = 0
    offset: int = 0
    key: bytes | None = None
    timestamp_ms: int = -1
    headers: Sequence[Header] = ()
    file: str = ''
    row: int = 0

    def as_record(self) -> tuple[bytes, bytes | None, list[Header]]:
        """Key, value and headers of its record in the dead-letter topic. The record's own headers come first."""
        headers = [*self.headers, ('stream_topic', self.topic.encode()),
                   ('stream_partition', b'%d' % self.partition), ('stream_offset', b'%d' % self.offset),
                   ('stream_timestamp_ms', b'%d' % self.timestamp_ms),
                   ('stream_reason', str(self.refusal.reason).encode()),
                   ('stream_detail', self.refusal.detail.encode('utf-8', 'backslashreplace'))]
        if self.key is not None:
            headers.append(('stream_key', self.key))
        return f'{self.topic}-{self.partition}-{self.offset}'.encode(), self.value, headers

    def as_line(self) -> bytes:
        """One line of JSON, with the line end."""
        line: dict[str, Any] = {'file': _escaped(self.file), 'row': self.row} if self.file else {}
        if self.topic:
            line |= {'topic': self.topic, 'partition': self.partition, 'offset': self.offset}
        line |= {'reason': self.refusal.reason, 'detail': _escaped(self.refusal.detail)}
        return orjson.dumps(line | _readable(self.value)) + b'\n'


def _readable(value: bytes | None) -> dict[str, str | None]:
    """The value as text, or in base64 where it is not UTF-8."""
    try:
        return {'value': None if value is None else value.decode()}
    except UnicodeDecodeError:
        return {'value_base64': b64encode(value or b'').decode()}


def _escaped(text: str) -> str:
    """Text that JSON can hold: names and quoted bytes may carry what was no UTF-8."""
    return text.encode('utf-8', 'backslashreplace').decode()
