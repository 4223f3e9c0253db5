from collections.abc import Iterable
from typing import Any

from stream.core.decide import Kind
from stream.core.messages import ModelInfo
from stream.core.parse import Event
from stream.core.scores import Scores
from stream.core.user import User

SOURCE_HASH: str

class Message:
    kind: Kind
    key: bytes
    as_of_ms: int
    value: bytes
    content: dict[str, Any] | None
    def __init__(self, kind: Kind, message_id: bytes, key: bytes, as_of_ms: int, value: bytes,
                 content: dict[str, Any] | None = None) -> None: ...
    @property
    def message_id(self) -> bytes: ...
    def __hash__(self) -> int: ...

def split_scores(messages: Iterable[Message]) -> tuple[list[Message], list[Message]]: ...
def pack_messages(messages: Iterable[Message]) -> bytes: ...
class ScoresPen:
    def __init__(self, model: ModelInfo, scores: Scores) -> None: ...
    def write(self, user: User, decisions: list[Message] | None, row: int, as_of_ms: int, timer_ms: int,
              events: list[Event] | None) -> list[Message]: ...

def unpack_outbox(user: User) -> list[Message]: ...
