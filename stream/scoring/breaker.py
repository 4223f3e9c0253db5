"""Two bounds on what a server is asked: whether at all (`Breaker`), and how much at once (`Slots`).

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
from typing import Literal

BreakerState = Literal['closed', 'open', 'half_open']


class Breaker:
    """Keeps callers from a server that does not answer. Pure: it waits for nothing and asks nobody.

    Starts open with no pause: a server that was never asked has to prove itself as one that comes back has.

    clock          seconds, never going back; handed in
    failures_max   so many failures in a row open it
    pause_ms_*     how long it stays open: the first time, and at most
    """

    def __init__(self, clock: Callable[[], float], failures_max: int = 5, pause_ms_first: int = 250,
                 pause_ms_max: int = 4_000) -> None:
        self.state: BreakerState = 'open'
        self.opened = 0         # times that it went from closed to open
        self._clock = clock
        self._failures_max = failures_max
        self._pause_ms_first = pause_ms_first
        self._pause_ms_max = pause_ms_max
        self._pause_ms = pause_ms_first
        self._failures = 0
        self._due_s = clock()

    def may_probe(self) -> bool:
        """True for the one caller that shall try the server, and then says what came of it: `probed`."""
        if self.state != 'open' or self._clock() < self._due_s:
            return False
        self.state = 'half_open'
        return True

    def probed(self, well: bool | None) -> None:
        """What came of the probe; None: nothing, it was cut off, and the next caller may try at once."""
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
        """Milliseconds until asking may be of use; at least 1."""
        left_ms = (self._due_s - self._clock()) * 1000 if self.state == 'open' else self._pause_ms_first
        return max(1, round(left_ms))

    # Requests of before it opened may end later: what they say is old, and only the probe counts then.
    def answered(self) -> None:
        """A request was answered."""
        if self.state == 'closed':
            self._failures = 0

    def failed(self) -> None:
        """A request was not."""
        if self.state == 'closed':
            self._failures += 1
            if self._failures >= self._failures_max:
                self.opened += 1
                self._open()

    def _open(self) -> None:
        self.state = 'open'
        self._due_s = self._clock() + self._pause_ms / 1000
        self._pause_ms = min(2 * self._pause_ms, self._pause_ms_max)


class Slots:
    """An `async with` that lets at most `limit` callers in, first come, first served; `limit` follows the server.

    It starts at `most`, halves when the server says that it has too much to do, and grows by 1 after `limit` answers.
    Belongs to one event loop.
    """

    def __init__(self, most: int) -> None:
        self.limit = most
        self.in_use = 0
        self._most = most
        self._answers = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self.in_use < self.limit and not self._waiting:
            self.in_use += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():    # the turn came in the same moment: pass it on
                self._leave()
            raise

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        self._leave()

    def shrink(self, limit_then: int) -> None:
        """Halve, unless that has been done since the request was sent under `limit_then`: one overload, one halving."""
        if limit_then == self.limit:
            self.limit = max(1, self.limit // 2)
            self._answers = 0

    def grow(self) -> None:
        """An answer came."""
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
