import asyncio

import pytest

from stream.scoring.breaker import Breaker, ConcurrencyLimit


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    """Closed, opens after 3 failures, pauses of 100, 200, 400, 400 ms."""
    made = Breaker(clock, failures_max=3, pause_ms_first=100, pause_ms_max=400)
    assert made.may_probe()
    made.probed(True)
    return made


def fail(breaker: Breaker, times: int = 3) -> None:
    for _ in range(times):
        breaker.failed()


def test_a_server_that_was_never_asked_has_to_prove_itself_at_once(clock: Clock):
    breaker = Breaker(clock)
    assert breaker.state == 'open'
    assert breaker.may_probe()
    assert breaker.state == 'half_open'


def test_failures_in_a_row_open_it(breaker: Breaker):
    fail(breaker, 2)
    assert (breaker.state, breaker.opened) == ('closed', 0)
    breaker.failed()
    assert (breaker.state, breaker.opened) == ('open', 1)


def test_an_answer_between_failures_keeps_it_closed(breaker: Breaker):
    for _ in range(5):
        fail(breaker, 2)
        breaker.answered()
    assert breaker.state == 'closed'


def test_one_caller_probes_after_the_pause(breaker: Breaker, clock: Clock):
    fail(breaker)
    assert not breaker.may_probe()
    assert breaker.retry_after_ms() == 100
    clock.now_s += 0.099
    assert not breaker.may_probe()
    clock.now_s += 0.001
    assert breaker.may_probe()
    assert not breaker.may_probe()


def test_a_probe_that_goes_well_closes_it_and_the_next_pause_is_short_again(breaker: Breaker, clock: Clock):
    fail(breaker)
    for well in (False, True):
        clock.now_s += 1
        assert breaker.may_probe()
        breaker.probed(well)
    assert breaker.state == 'closed'
    fail(breaker, 2)
    assert breaker.state == 'closed'
    fail(breaker, 1)
    assert breaker.retry_after_ms() == 100
    assert breaker.opened == 2


def test_pauses_double_up_to_the_longest(breaker: Breaker, clock: Clock):
    fail(breaker)
    pauses = []
    for _ in range(4):
        pauses.append(breaker.retry_after_ms())
        clock.now_s += 1
        assert breaker.may_probe()
        breaker.probed(False)
    assert pauses == [100, 200, 400, 400]
    assert breaker.opened == 1      # it was open all the time


@pytest.mark.parametrize('probing', [False, True])
def test_what_requests_of_before_say_later_changes_nothing(breaker: Breaker, clock: Clock, probing: bool):
    fail(breaker)
    clock.now_s += 0.1 if probing else 0.05
    assert breaker.may_probe() == probing
    state, wait_ms = breaker.state, breaker.retry_after_ms()
    for _ in range(9):
        breaker.answered()
        fail(breaker)
    assert (breaker.state, breaker.retry_after_ms()) == (state, wait_ms)
    assert breaker.opened == 1


def test_a_probe_that_was_cut_off_leaves_the_next_to_another(breaker: Breaker, clock: Clock):
    fail(breaker)
    clock.now_s += 1
    assert breaker.may_probe()
    breaker.probed(None)
    assert breaker.state == 'open'
    assert breaker.may_probe()
    breaker.probed(False)
    assert breaker.retry_after_ms() == 200      # as if the first had not been


def test_the_time_to_wait_is_never_nothing(breaker: Breaker, clock: Clock):
    fail(breaker)
    clock.now_s += 50
    assert breaker.retry_after_ms() == 1


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Crowd:
    """Callers that stay inside until they are told to go."""

    def __init__(self, concurrency: ConcurrencyLimit) -> None:
        self.concurrency = concurrency
        self.inside: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._go: dict[str, asyncio.Event] = {}

    async def come(self, *names: str) -> None:
        for name in names:
            self._go[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._visit(name))
        await settle()

    async def go(self, name: str) -> None:
        self._go[name].set()
        await settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self._tasks[name].cancel()
        await settle()

    async def _visit(self, name: str) -> None:
        async with self.concurrency:
            self.inside.append(name)
            try:
                await self._go[name].wait()
            finally:
                self.inside.remove(name)


def test_a_limit_admits_so_many_and_the_next_in_order():
    async def run() -> None:
        crowd = Crowd(ConcurrencyLimit(2))
        await crowd.come('a', 'b', 'c', 'd')
        assert crowd.inside == ['a', 'b']
        await crowd.go('b')
        assert crowd.inside == ['a', 'c']
        await crowd.come('e')
        await crowd.go('a')
        assert crowd.inside == ['c', 'd']
    asyncio.run(run())


def test_a_limit_halves_once_for_one_overload_and_grows_with_answers():
    async def run() -> None:
        concurrency = ConcurrencyLimit(8)
        for _ in range(8):      # eight requests under the limit of 8 are all turned away
            concurrency.shrink(8)
        assert concurrency.limit == 4
        concurrency.shrink(4)
        concurrency.shrink(2)
        concurrency.shrink(1)
        assert concurrency.limit == 1
        seen = []
        for _ in range(40):
            concurrency.grow()
            seen.append(concurrency.limit)
        assert seen[:4] == [2, 2, 3, 3]
        assert seen[-1] == 8
    asyncio.run(run())


def test_a_smaller_limit_holds_from_the_next_caller_on_and_a_larger_one_at_once():
    async def run() -> None:
        concurrency = ConcurrencyLimit(4)
        crowd = Crowd(concurrency)
        await crowd.come('a', 'b', 'c', 'd', 'e', 'f')
        concurrency.shrink(4)
        await crowd.go('a')
        await crowd.go('b')
        assert crowd.inside == ['c', 'd']
        await crowd.go('c')
        assert crowd.inside == ['d', 'e']
        concurrency.grow()
        concurrency.grow()
        await settle()
        assert (concurrency.limit, crowd.inside) == (3, ['d', 'e', 'f'])
    asyncio.run(run())


def test_cancelled_callers_leave_their_place_free():
    async def run() -> None:
        concurrency = ConcurrencyLimit(1)
        crowd = Crowd(concurrency)
        await crowd.come('a', 'b', 'c')
        await crowd.cancel('b')         # while it waits
        await crowd.go('a')
        assert crowd.inside == ['c']
        await crowd.come('d', 'e')
        crowd._go['c'].set()
        await asyncio.sleep(0)          # c leaves, d is given its turn, and is cancelled before it runs
        await crowd.cancel('d')
        assert crowd.inside == ['e']
        await crowd.cancel('e')         # inside
        assert concurrency.in_use == 0
        await crowd.come('f')
        assert crowd.inside == ['f']
    asyncio.run(run())
