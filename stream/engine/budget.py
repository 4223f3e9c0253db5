"""Limits how many events are in flight at once over all lanes of a worker."""
import asyncio
from collections import deque


class Budget:
    """A first-come, first-served limit on the total size of what is in flight.

    Anything may enter while nothing is in flight, even if it is larger than the limit.

    size_max   the limit
    """

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._in = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size: int) -> None:
        """Wait until there is room, then take it. A cancelled call takes no room."""
        if not self._waiting and self._fits(size):
            self._in += size
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(size)        # it had been let in just before it was cancelled
            raise

    def leave(self, size: int) -> None:
        """Give room back."""
        self._in -= size
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._in += size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return not self._in or self._in + size <= self._size_max
