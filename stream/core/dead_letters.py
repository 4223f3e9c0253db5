"""Dead letters: records that are not valid events, kept unchanged, with the place they came from and the reason.

The worker writes dead letters to a topic. Each key names the record's topic, partition and offset, so a record that is
delivered again overwrites its own letter. A replay writes dead letters to a file, one JSON object per line.
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

    topic, partition, offset   where the record was read; the topic is empty if the record came from no topic
    file, row                  where a replay read the record; the file is empty if no replay read it
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
        """Key, value and headers for the dead-letter topic. The refused record's own headers come first."""
        headers = [*self.headers, ('stream_topic', self.topic.encode()),
                   ('stream_partition', b'%d' % self.partition), ('stream_offset', b'%d' % self.offset),
                   ('stream_timestamp_ms', b'%d' % self.timestamp_ms),
                   ('stream_reason', str(self.refusal.reason).encode()),
                   ('stream_detail', self.refusal.detail.encode('utf-8', 'backslashreplace'))]
        if self.key is not None:
            headers.append(('stream_key', self.key))
        return f'{self.topic}-{self.partition}-{self.offset}'.encode(), self.value, headers

    def as_line(self) -> bytes:
        """One line of JSON, including the line end."""
        line: dict[str, Any] = {'file': _escaped(self.file), 'row': self.row} if self.file else {}
        if self.topic:
            line |= {'topic': self.topic, 'partition': self.partition, 'offset': self.offset}
        line |= {'reason': self.refusal.reason, 'detail': _escaped(self.refusal.detail)}
        return orjson.dumps(line | _readable(self.value)) + b'\n'


def _readable(value: bytes | None) -> dict[str, str | None]:
    """The value as text, or in base64 if it is not UTF-8."""
    try:
        return {'value': None if value is None else value.decode()}
    except UnicodeDecodeError:
        return {'value_base64': b64encode(value or b'').decode()}


def _escaped(text: str) -> str:
    """Text that JSON can hold. File names and quoted bytes may contain surrogates, which stand for invalid UTF-8."""
    return text.encode('utf-8', 'backslashreplace').decode()
