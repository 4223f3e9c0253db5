"""The Triton scorer and a real server that is killed, paused, overrun and started again while it scores."""
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from deploy.local.parts import Triton
from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS, TYPE_VOCABULARY, Batch
from stream.core.scores import Outputs, collect
from stream.errors import ScorerUnavailable
from stream.scoring.artefact import load_artefact
from stream.scoring.embedded import EmbeddedScorer
from stream.scoring.triton import TritonScorer

SHIPPED = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'
BACK_WITHIN_S = 15


def made_up_step(seed: int) -> list[Batch]:
    """Batches of one step: some rows of each length, each row with an id of its own."""
    rng = np.random.default_rng(seed)
    step, first_id = [], 0
    for length in LENGTHS:
        rows = int(rng.integers(1, 12))
        categories = rng.integers(1, TYPE_VOCABULARY, (rows, length, 3)).astype(np.int32)
        step.append(Batch(categories, rng.random((rows, length, SLOT_NUMBERS), np.float32),
                          rng.random((rows, COUNTERS), np.float32), np.arange(first_id, first_id + rows)[:, None]))
        first_id += rows
    return step


class Checked:
    """Scores step after step as the engine does, and compares every row with the embedded copy's."""

    def __init__(self, scorer: TritonScorer) -> None:
        self.scorer = scorer
        self.steps = 0
        self.holds = 0
        self.problem = ''
        self._embedded = EmbeddedScorer(SHIPPED)

    async def step(self) -> None:
        step = made_up_step(self.steps)
        outputs = await self._held_until_answered(step)
        assert_same(step, outputs, self._embedded.score_now(step))
        self.steps += 1

    async def go_on(self) -> None:
        while True:
            await self.step()

    async def reach(self, steps: int, seconds: float) -> float:
        """Wait until so many steps are done; returns how long that took."""
        started_s = time.monotonic()
        while self.steps < steps:
            assert time.monotonic() - started_s < seconds, \
                f'{self.steps} of {steps} steps within {seconds} s: {self.problem} {self.scorer.statistics}'
            await asyncio.sleep(0.01)
        return time.monotonic() - started_s

    async def _held_until_answered(self, step: list[Batch]) -> list[Outputs]:
        while True:
            try:
                return await self.scorer.score(step)
            except ScorerUnavailable as error:
                self.holds += 1
                self.problem = error.problem
                await asyncio.sleep(error.retry_after_ms / 1000)


async def all_hold(lanes: list[Checked]) -> None:
    deadline = time.monotonic() + 30
    while not all(lane.holds > 1 for lane in lanes):
        assert time.monotonic() < deadline, [lane.holds for lane in lanes]
        await asyncio.sleep(0.01)


def assert_same(step: list[Batch], outputs: list[Outputs], wanted: list[Outputs]) -> None:
    rows = sum(map(len, step))
    got, expected = collect(step, outputs, rows), collect(step, wanted, rows)
    assert got.usable.all()
    for name in ('intent', 'churn', 'power', 'tiers', 'spend'):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-3, atol=2e-4)


@asynccontextmanager
async def scoring(scorer: TritonScorer, lanes: int = 3) -> AsyncIterator[list[Checked]]:
    """Several lanes score at once, until the end of the block; an error of one is an error of the test."""
    checked = [Checked(scorer) for _ in range(lanes)]
    tasks = [asyncio.create_task(lane.go_on()) for lane in checked]
    try:
        yield checked
        for task in tasks:
            assert not task.done(), task.exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await scorer.close()


@pytest.fixture(scope='module')
def own_triton(tmp_path_factory: pytest.TempPathFactory):
    """One that may be killed."""
    with Triton(tmp_path_factory.mktemp('own') / 'triton') as part:
        yield part


def test_it_knows_the_weights_of_the_server(triton: Triton):
    async def test() -> None:
        scorer = TritonScorer(triton.address, SHIPPED)
        await scorer.open()
        assert scorer.served_sha256 == load_artefact(SHIPPED).info.sha256
        await scorer.close()
    asyncio.run(test())


@pytest.mark.parametrize('how', ['kill', 'stop'])
def test_a_server_that_goes_and_comes_back_loses_and_swaps_no_row(own_triton: Triton, how: str):
    async def test() -> None:
        async with scoring(TritonScorer(own_triton.start().address, SHIPPED)) as lanes:
            for lane in lanes:
                await lane.reach(5, 60)
            await asyncio.to_thread(getattr(own_triton, how))
            await all_hold(lanes)
            held_at = [lane.steps for lane in lanes]
            await asyncio.to_thread(own_triton.start)
            for lane, steps in zip(lanes, held_at, strict=True):
                assert await lane.reach(steps + 5, 60) < BACK_WITHIN_S
            assert lanes[0].scorer.statistics.breaker_opened >= 1
            assert lanes[0].scorer.statistics.breaker == 'closed'
    asyncio.run(test())


def test_a_server_that_stands_still_and_goes_on_loses_and_swaps_no_row(own_triton: Triton):
    restarts = 0

    async def supervised() -> None:
        # The Python backend of this release may abort the server when it goes on ("lock_exception" in its log).
        nonlocal restarts
        while True:
            if not own_triton.running:
                restarts += 1
                await asyncio.to_thread(own_triton.start)
            await asyncio.sleep(0.1)

    async def test() -> None:
        scorer = TritonScorer(own_triton.start().address, SHIPPED, timeout_ms=2_000)
        async with scoring(scorer) as lanes:
            for lane in lanes:
                await lane.reach(5, 60)
            own_triton.pause()
            try:
                await all_hold(lanes)
            finally:
                own_triton.resume()
            held_at = [lane.steps for lane in lanes]
            supervisor = asyncio.create_task(supervised())
            try:
                for lane, steps in zip(lanes, held_at, strict=True):
                    assert await lane.reach(steps + 5, 60) < BACK_WITHIN_S or restarts
            finally:
                supervisor.cancel()
    asyncio.run(test())


def test_a_queue_that_is_full_is_asked_less_and_answers_everything(tmp_path: Path):
    async def test() -> None:
        with Triton(tmp_path / 'triton', queue_requests_max=1) as small:
            scorer = TritonScorer(small.address, SHIPPED, timeout_ms=30_000, in_flight_max=16)
            async with scoring(scorer, lanes=6) as lanes:
                for lane in lanes:
                    await lane.reach(10, 90)
                assert scorer.statistics.failures.keys() == {'RESOURCE_EXHAUSTED'}
                assert scorer.statistics.breaker_opened == 0
                assert sum(lane.holds for lane in lanes) == 0
    asyncio.run(test())
