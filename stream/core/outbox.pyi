from collections.abc import Iterable, Sequence

from stream.core.messages import ModelInfo
from stream.core.user import User

SCORES_TYPE: str

def pack_messages(messages: Iterable[bytes]) -> bytes: ...
def pack_scores(
    model: ModelInfo, as_of_ms: int, timer_ms: int, spend: float, intent: int, power: int, churn: int,
    tiers: Sequence[int], events: Sequence[str],
) -> bytes: ...
def unpack_outbox(user: User) -> list[bytes]: ...
