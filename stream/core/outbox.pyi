from collections.abc import Iterable

from stream.core.messages import ModelInfo
from stream.core.parse import Event
from stream.core.scores import Scores
from stream.core.user import User

SOURCE_HASH: str

def pack_messages(messages: Iterable[bytes]) -> bytes: ...
class ScoresPen:
    def __init__(self, model: ModelInfo, scores: Scores) -> None: ...
    def write(self, user: User, decisions: list[bytes] | None, row: int, as_of_ms: int, timer_ms: int,
              events: list[Event] | None) -> list[bytes]: ...

def unpack_outbox(user: User) -> list[bytes]: ...
