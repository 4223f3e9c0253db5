"""How much may be under way at once, over all lanes of a worker."""
import asyncio
from collections import deque


class Budget:
    """Lets in what fits, in the order of asking; something is always let in, whatever its size.

    size_max   of all that is in
    """

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._in = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size: int) -> None:
        """Wait until there is room. Cancelled, it has not entered."""
        if not self._waiting and self._fits(size):
            self._in += size
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(size)        # it was let in, and does not want to any more
            raise

    def leave(self, size: int) -> None:
        """Make room for others."""
        self._in -= size
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._in += size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return not self._in or self._in + size <= self._size_max
