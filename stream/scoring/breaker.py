"""Two bounds on requests to a server: whether to ask at all (`Breaker`), how many at once (`ConcurrencyLimit`).

                     failures_max failures in a row
          closed ───────────────────────────────────► open ◄─┐
             ▲                                         │     │ failed: twice the pause, up to pause_ms_max
             │ probed well             pause is over   ▼     │
             └────────────────────────────────────  half_open┘

Source: M. Nygard, Release It! (circuit breaker); RFC 5681 (additive increase, multiplicative decrease).
"""
import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

BreakerState = Literal['closed', 'open', 'half_open']


class Breaker:
    """Keeps callers away from a server that does not answer. It does no I/O and never waits.

    Starts open with no pause, so that a new server must prove itself, as must one that comes back.

    clock          monotonic seconds
    failures_max   failures in a row that open it
    pause_ms_*     how long it stays open: the first time, and at most
    """

    def __init__(self, clock: Callable[[], float], failures_max: int = 5, pause_ms_first: int = 250,
                 pause_ms_max: int = 4_000) -> None:
        self.state: BreakerState = 'open'
        self.opened = 0         # how often it went from closed to open
        self._clock = clock
        self._failures_max = failures_max
        self._pause_ms_first = pause_ms_first
        self._pause_ms_max = pause_ms_max
        self._pause_ms = pause_ms_first
        self._failures = 0
        self._due_s = clock()

    def may_probe(self) -> bool:
        """True for the one caller that tries the server next. That caller must then call `probed`."""
        if self.state != 'open' or self._clock() < self._due_s:
            return False
        self.state = 'half_open'
        return True

    def probed(self, well: bool | None) -> None:
        """Report the result of the probe. None: it was cancelled, and the next caller may try at once."""
        if well:
            self.state = 'closed'
            self._failures = 0
            self._pause_ms = self._pause_ms_first
        elif well is None:
            self.state = 'open'
            self._due_s = self._clock()
        else:
            self._open()

    def retry_after_ms(self) -> int:
        """Milliseconds until asking again may help, at least 1."""
        left_ms = (self._due_s - self._clock()) * 1000 if self.state == 'open' else self._pause_ms_first
        return max(1, round(left_ms))

    # A request that was sent before the breaker opened may end after it. Its result is old: only the probe counts then.
    def answered(self) -> None:
        """A request was answered."""
        if self.state == 'closed':
            self._failures = 0

    def failed(self) -> None:
        """A request failed."""
        if self.state == 'closed':
            self._failures += 1
            if self._failures >= self._failures_max:
                self.opened += 1
                self._open()

    def _open(self) -> None:
        self.state = 'open'
        self._due_s = self._clock() + self._pause_ms / 1000
        self._pause_ms = min(2 * self._pause_ms, self._pause_ms_max)


class ConcurrencyLimit:
    """An `async with` that admits at most `limit` callers at once, first come, first served.

    The limit starts at `most`. It halves when the server reports overload, and grows by 1 after `limit` answers.
    Belongs to one event loop.
    """

    def __init__(self, most: int) -> None:
        self.limit = most
        self.in_use = 0
        self._most = most
        self._answers = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> Self:
        if self.in_use < self.limit and not self._waiting:
            self.in_use += 1
            return self
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():    # the turn came at the same moment: pass it on
                self._leave()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        self._leave()

    def shrink(self, limit_then: int) -> None:
        """Halve the limit after an overload. Only once per overload: not if it changed since the request was sent.

        limit_then   the limit at which the request was sent
        """
        if limit_then == self.limit:
            self.limit = max(1, self.limit // 2)
            self._answers = 0

    def grow(self) -> None:
        """Count an answer."""
        self._answers += 1
        if self.limit < self._most and self._answers >= self.limit:
            self._answers = 0
            self.limit += 1
            self._let_in()

    def _leave(self) -> None:
        self.in_use -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.in_use < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():         # else its caller was cancelled
                self.in_use += 1
                turn.set_result(None)
