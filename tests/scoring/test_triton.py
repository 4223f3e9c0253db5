"""The Triton scorer and a stub that lies, stalls and dies on command: no bad score comes through, no wait is long."""
import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from stream.core.features import COUNTERS, SLOT_NUMBERS, Batch
from stream.core.scores import Outputs, collect
from stream.errors import ModelError, ResponseRefused, ScorerUnavailable
from stream.scoring.artefact import load_artefact
from stream.scoring.breaker import Breaker
from stream.scoring.triton import REFUSALS_MAX, RETRIED, TritonScorer
from stream.scoring.triton_wire import request_bytes
from tests.scoring import stub_triton as lies
from tests.scoring.stub_triton import Fault, StubTriton, put, status

SHIPPED = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'
SHA256 = load_artefact(SHIPPED).info.sha256
Code = grpc.StatusCode


def answer(batch: Batch) -> Outputs:
    """Scores that tell their row: taken from its counters."""
    tiers = np.eye(5, dtype=np.float32)[batch.row_id[:, 0] % 5]
    return Outputs(batch.counters[:, :1], tiers, 100 * batch.counters[:, 1:2], batch.counters[:, 2:3], batch.row_id)


def made_up_batch(rows: int = 4, length: int = 8, first_id: int = 0) -> Batch:
    rng = np.random.default_rng(first_id)
    return Batch(np.ones((rows, length, 3), np.int32), rng.random((rows, length, SLOT_NUMBERS), np.float32),
                 rng.random((rows, COUNTERS), np.float32), np.arange(first_id, first_id + rows)[:, None])


def made_up_batches(count: int, rows: int = 4) -> list[Batch]:
    return [made_up_batch(rows, (8, 16, 32, 64)[index % 4], rows * index) for index in range(count)]


def assert_answered(batches: list[Batch], outputs: list[Outputs]) -> None:
    """Each row has the scores that are its own."""
    assert len(outputs) == len(batches)
    for batch, got in zip(batches, outputs, strict=True):
        wanted = answer(batch)
        for name in Outputs.__dataclass_fields__:
            assert np.array_equal(getattr(got, name), getattr(wanted, name)), name


@pytest.fixture
def stub() -> Iterator[StubTriton]:
    made = StubTriton(answer)
    yield made
    made.stop()


@asynccontextmanager
async def scorer_of(stub: StubTriton, timeout_ms: int = 20_000, in_flight_max: int = 4, failures_max: int = 5,
                    address: str = '') -> AsyncIterator[TritonScorer]:
    breaker = Breaker(time.monotonic, failures_max, pause_ms_first=50, pause_ms_max=200)
    made = TritonScorer(address or stub.address, SHIPPED, timeout_ms=timeout_ms, in_flight_max=in_flight_max,
                        breaker=breaker)
    try:
        yield made
    finally:
        await made.close()


async def until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f'not within {seconds} s: {what}'
        await asyncio.sleep(0.005)


async def held_until_answered(scorer: TritonScorer, batches: list[Batch], seconds: float = 15) -> list[Outputs]:
    """What the engine does: hold, and ask again when told to."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await scorer.score(batches)
        except ScorerUnavailable as error:
            assert time.monotonic() < deadline, error
            await asyncio.sleep(error.retry_after_ms / 1000)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())     # type: ignore[arg-type]


def test_many_batches_are_answered_in_their_order_and_bounded_in_flight(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub, in_flight_max=3) as scorer:
            await scorer.open()
            stub.gate.clear()
            batches = made_up_batches(25)
            task = asyncio.create_task(scorer.score(batches))
            await until(lambda: stub.at_once == 3, 'three requests at once')
            assert scorer.statistics.in_flight == 3
            stub.gate.set()
            assert_answered(batches, await task)
            assert stub.at_once_most == 3
            statistics = scorer.statistics
            assert (statistics.requests, statistics.windows, statistics.in_flight) == (25, 100, 0)
    run(test)


STRUCTURAL_LIES = [lies.wrong_shape, lies.transposed, lies.cut_bytes, lies.wrong_type, lies.same_size_type,
                   lies.wrong_name, lies.missing_output, lies.repeated_output, lies.no_contents, lies.short_batch,
                   lies.permuted, lies.other_rows, lies.other_version, lies.other_model]


@pytest.mark.parametrize('lie', STRUCTURAL_LIES, ids=lambda lie: lie.__name__)
def test_a_lie_is_refused_and_the_question_asked_again(stub: StubTriton, lie: Fault):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            stub.faults.append(lie)
            batches = made_up_batches(3)
            assert_answered(batches, await scorer.score(batches))
            assert (scorer.statistics.refused, scorer.statistics.retries, stub.asked) == (1, 1, 4)
    run(test)


@pytest.mark.parametrize('lie', STRUCTURAL_LIES, ids=lambda lie: lie.__name__)
def test_a_lie_among_answers_of_a_known_layout_is_refused(stub: StubTriton, lie: Fault):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            batches = made_up_batches(3)
            for _ in range(2):
                assert_answered(batches, await scorer.score(batches))
            stub.faults.append(lie)
            assert_answered(batches, await scorer.score(batches))
            assert (scorer.statistics.refused, stub.asked) == (1, 10)
    run(test)


@pytest.mark.parametrize(('rows', 'length'), [(1, 8), (4, 16), (256, 64)])
def test_a_request_is_what_the_protocol_says(rows: int, length: int):
    batch = made_up_batch(rows, length)
    batch.numbers = batch.numbers[::-1]         # no contiguous array
    request = lies.Request.FromString(request_bytes('shopper', '1', batch))
    assert (request.model_name, request.model_version) == ('shopper', '1')
    assert [output.name for output in request.outputs] == list(Outputs.__dataclass_fields__)
    for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
        kind, _ = lies.INPUTS[tensor.name]
        assert tensor.datatype == kind
        sent = np.frombuffer(content, lies.DTYPES[kind]).reshape(tensor.shape)
        assert np.array_equal(sent, getattr(batch, tensor.name))
    assert [tensor.name for tensor in request.inputs] == list(lies.INPUTS)


@pytest.mark.parametrize('lie', STRUCTURAL_LIES, ids=lambda lie: lie.__name__)
def test_a_server_that_lies_steadily_is_an_error(stub: StubTriton, lie: Fault):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            stub.always = lie
            with pytest.raises(ResponseRefused, match='Do: check that it serves shopper version 1'):
                await scorer.score([made_up_batch()])
            assert stub.asked == REFUSALS_MAX
            stub.always = None
            assert_answered([made_up_batch()], await scorer.score([made_up_batch()]))
    run(test)


@pytest.mark.parametrize('name', ['purchase_intent', 'churn', 'expected_spend', 'tier_probabilities'])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf'), -0.01, 1.5])
def test_bad_numbers_cost_their_row_alone(stub: StubTriton, name: str, value: float):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            stub.always = put(name, value, row=1)
            batch = made_up_batch()
            scores = collect([batch], await scorer.score([batch]), len(batch))
            bad = not (name == 'expected_spend' and value == 1.5)       # that is an amount
            assert scores.usable.tolist() == [True, not bad, True, True]
            if bad:
                assert scores.churn[1] == scores.intent[1] == scores.spend[1] == 0
    run(test)


@pytest.mark.parametrize('code', sorted(RETRIED))
def test_a_passing_failure_is_asked_again(stub: StubTriton, code: str):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            stub.faults.extend([status(Code[code])] * 3)
            batches = made_up_batches(2)
            assert_answered(batches, await scorer.score(batches))
            assert scorer.statistics.failures == {code: 3}
            assert scorer.statistics.retries == 3
            assert stub.asked == 5
            assert scorer.statistics.breaker == 'closed'
    run(test)


@pytest.mark.parametrize('code', sorted({code.name for code in Code} - RETRIED - {'OK'}))
def test_a_lasting_failure_is_not_asked_again(stub: StubTriton, code: str):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            stub.always = status(Code[code])
            with pytest.raises(ModelError, match=f'cannot run .*{code}') as caught:
                await scorer.score([made_up_batch()])
            assert type(caught.value) is ModelError
            assert stub.asked == 1
    run(test)


def test_a_server_with_too_much_to_do_is_asked_less_and_is_not_counted_as_gone(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub, in_flight_max=8) as scorer:
            await scorer.open()
            stub.faults.extend([status(Code.RESOURCE_EXHAUSTED)] * 12)
            limits = []
            batches = made_up_batches(40)
            task = asyncio.create_task(scorer.score(batches))
            while not task.done():
                limits.append(scorer.statistics.in_flight_limit)
                await asyncio.sleep(0.002)
            assert_answered(batches, await task)
            assert min(limits) < 4
            assert scorer.statistics.in_flight_limit > min(limits)      # it comes back with the answers
            assert scorer.statistics.breaker_opened == 0
    run(test)


def test_a_call_that_hangs_leaves_time_to_ask_again(stub: StubTriton):
    freed = threading.Event()

    def hang(response: lies.Response, context: grpc.ServicerContext) -> None:
        freed.wait(20)

    async def test() -> None:
        async with scorer_of(stub, timeout_ms=4_000) as scorer:
            stub.faults.append(hang)
            batches = made_up_batches(2)
            assert_answered(batches, await scorer.score(batches))
            assert scorer.statistics.failures == {'DEADLINE_EXCEEDED': 1}
    try:
        run(test)
    finally:
        freed.set()


def test_a_server_that_does_not_answer_costs_no_more_than_the_deadline(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub, timeout_ms=1_000, failures_max=1_000) as scorer:
            await scorer.open()
            stub.gate.clear()
            started_s = time.monotonic()
            with pytest.raises(ScorerUnavailable, match='DEADLINE_EXCEEDED'):
                await scorer.score(made_up_batches(12))
            assert 0.4 < time.monotonic() - started_s < 3
            stub.gate.set()
            assert_answered(made_up_batches(2), await held_until_answered(scorer, made_up_batches(2)))
    run(test)


def test_waiting_for_the_batches_of_other_steps_costs_no_step_its_time(stub: StubTriton):
    def slow(response: lies.Response, context: grpc.ServicerContext) -> None:
        time.sleep(0.3)

    async def test() -> None:
        async with scorer_of(stub, timeout_ms=2_000, in_flight_max=1) as scorer:
            stub.always = slow
            steps = [made_up_batches(1, rows=index) for index in range(1, 10)]
            for batches, outputs in zip(steps, await asyncio.gather(*map(scorer.score, steps)), strict=True):
                assert_answered(batches, outputs)
            assert scorer.statistics.retries == 0
    run(test)


def test_an_absent_server_is_not_hammered_and_callers_are_told_at_once(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            await scorer.open()
            stub.always = status(Code.UNAVAILABLE)
            with pytest.raises(ScorerUnavailable, match='UNAVAILABLE') as caught:
                await scorer.score(made_up_batches(4))
            assert 0 < caught.value.retry_after_ms <= 50
            assert scorer.statistics.breaker == 'open'
            assert stub.asked <= 5 + 3      # what opened it, and what was in flight beside it
            stub.ready = False
            asked, probed, started_s = stub.asked, stub.probes, time.monotonic()
            refused = 0
            while time.monotonic() - started_s < 1:
                with pytest.raises(ScorerUnavailable) as caught:
                    await scorer.score(made_up_batches(4))
                assert 1 <= caught.value.retry_after_ms <= 200
                refused += 1
                await asyncio.sleep(0.001)
            assert stub.asked == asked                      # nothing but probes
            assert 3 <= stub.probes - probed <= 10          # after 50, 100, 200, 200 ... ms
            assert refused > 10 * (stub.probes - probed)
            assert scorer.statistics.breaker_opened == 1
            stub.ready, stub.always = True, None
            assert_answered(made_up_batches(4), await held_until_answered(scorer, made_up_batches(4)))
            assert scorer.statistics.breaker == 'closed'
    run(test)


def test_a_flapping_server_costs_retries_and_no_row(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub, in_flight_max=1) as scorer:
            stub.faults.extend([status(Code.UNAVAILABLE), lambda response, context: None] * 30)
            batches = made_up_batches(30)
            assert_answered(batches, await scorer.score(batches))
            assert scorer.statistics.failures == {'UNAVAILABLE': 30}
    run(test)


def test_a_server_that_dies_in_mid_call_and_comes_back_answers_again(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            await scorer.open()
            stub.gate.clear()
            task = asyncio.create_task(scorer.score(made_up_batches(6)))
            await until(lambda: stub.at_once == 4, 'four requests at once')
            stub.stop()
            with pytest.raises(ScorerUnavailable):
                await task
            with pytest.raises(ScorerUnavailable):
                await scorer.score(made_up_batches(1))
            stub.start()
            assert_answered(made_up_batches(6), await held_until_answered(scorer, made_up_batches(6)))
    run(test)


def test_a_server_absent_at_the_start_may_come_later(stub: StubTriton):
    async def test() -> None:
        stub.stop()
        async with scorer_of(stub) as scorer:
            with pytest.raises(ScorerUnavailable, match=r'does not answer: UNAVAILABLE.*Do: start it'):
                await scorer.open()
            stub.start()
            assert_answered(made_up_batches(2), await held_until_answered(scorer, made_up_batches(2)))
    run(test)


@asynccontextmanager
async def proxy_to(stub: StubTriton) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """An address in front of the stub, and what makes the connections of now fall silent without closing."""
    pumps: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection('127.0.0.1', stub.port)
        writers.extend((writer, there_writer))
        pumps.update((asyncio.create_task(pump(reader, there_writer)), asyncio.create_task(pump(there_reader, writer))))

    def silence() -> None:
        for task in pumps:
            task.cancel()

    server = await asyncio.start_server(connected, '127.0.0.1', 0)
    try:
        yield f'127.0.0.1:{server.sockets[0].getsockname()[1]}', silence
    finally:
        server.close()
        silence()
        await asyncio.gather(*pumps, return_exceptions=True)
        for writer in writers:
            writer.close()


def test_a_connection_that_falls_silent_is_left_for_a_new_one(stub: StubTriton):
    async def test() -> None:
        async with proxy_to(stub) as (address, silence), \
                scorer_of(stub, timeout_ms=1_000, failures_max=3, address=address) as scorer:
            batches = made_up_batches(3)
            assert_answered(batches, await scorer.score(batches))
            silence()
            client = scorer._connection.client        # type: ignore[union-attr]
            old = weakref.ref(client)
            hanging = asyncio.create_task(client.is_server_live(60))     # keeps the connection busy
            del client
            with pytest.raises(ScorerUnavailable, match='DEADLINE_EXCEEDED'):
                await scorer.score(batches)
            assert_answered(batches, await held_until_answered(scorer, batches))
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
            del hanging
            await until(lambda: gc.collect() >= 0 and old() is None, 'the old client and its connection are gone')
    run(test)


def test_a_version_that_is_not_served_is_no_error_for_ever(stub: StubTriton):
    async def test() -> None:
        stub.version = '2'
        async with scorer_of(stub) as scorer:
            with pytest.raises(ScorerUnavailable, match=r'no model shopper version 1 ready.*Do: put the model folder'):
                await scorer.open()
            assert stub.asked == 0
            stub.version = '1'
            assert_answered(made_up_batches(1), await held_until_answered(scorer, made_up_batches(1)))
            stub.version = '2'      # taken away in the middle
            with pytest.raises(ScorerUnavailable, match='shopper'):
                await scorer.score(made_up_batches(1))
    run(test)


def _tiers_of_another_model(stub: StubTriton) -> None:
    stub.outputs['tier_probabilities'] = ('FP32', [-1, 6])


def _types_of_another_model(stub: StubTriton) -> None:
    stub.inputs['categories'] = ('INT64', [-1, -1, 3])


def _an_output_is_missing(stub: StubTriton) -> None:
    del stub.outputs['row_id_out']


def _an_input_too_many(stub: StubTriton) -> None:
    stub.inputs['extra'] = ('FP32', [-1, 1])


def _small_batches(stub: StubTriton) -> None:
    stub.max_batch_size = 255


def _other_weights(stub: StubTriton) -> None:
    stub.parameters['sha256'] = 'ab' * 32


@pytest.mark.parametrize(('change', 'problem'), [
    (_tiers_of_another_model, 'has the outputs .*6'), (_types_of_another_model, 'has the inputs .*INT64'),
    (_an_output_is_missing, 'has the outputs'), (_an_input_too_many, 'has the inputs .*extra'),
    (_small_batches, 'takes batches of 255 rows. These have up to 256.*Do: set batch_rows_max to 255'),
    (_other_weights, f'has the SHA-256 (ab){{32}}, the folder has {SHA256}')])
def test_a_server_that_serves_something_else_is_never_asked_for_scores(
        stub: StubTriton, change: Callable[[StubTriton], None], problem: str):
    async def test() -> None:
        change(stub)
        async with scorer_of(stub) as scorer:
            for _ in range(2):
                with pytest.raises(ModelError, match=problem) as caught:
                    await scorer.score([made_up_batch()])
                assert type(caught.value) is ModelError
            assert stub.asked == 0
    run(test)


@pytest.mark.parametrize('named', [True, False])
def test_it_says_what_the_server_says_of_its_weights(stub: StubTriton, named: bool):
    async def test() -> None:
        if named:
            stub.parameters['sha256'] = SHA256
        async with scorer_of(stub) as scorer:
            await scorer.open()
            assert scorer.served_sha256 == (SHA256 if named else '')
    run(test)


def test_a_server_that_comes_back_with_other_weights_is_refused(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            stub.parameters['sha256'] = SHA256
            assert_answered(made_up_batches(1), await scorer.score(made_up_batches(1)))
            stub.always = status(Code.UNAVAILABLE)
            with pytest.raises(ScorerUnavailable):
                await scorer.score(made_up_batches(1))
            stub.always = None
            _other_weights(stub)
            with pytest.raises(ModelError, match='SHA-256'):
                await held_until_answered(scorer, made_up_batches(1))
    run(test)


def test_cancelling_a_step_cancels_its_calls_and_leaves_the_others_alone(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub, in_flight_max=4) as scorer:
            await scorer.open()
            stub.gate.clear()
            cancelled = asyncio.create_task(scorer.score(made_up_batches(8)))
            await until(lambda: stub.at_once == 4, 'four requests at once')
            other = asyncio.create_task(scorer.score(made_up_batches(5)))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await until(lambda: stub.asked == 8 and stub.at_once == 4, "the server's four given to the other step")
            stub.gate.set()
            assert_answered(made_up_batches(5), await other)
            await until(lambda: stub.cancelled == 4, 'four requests were cancelled')
            assert scorer.statistics.in_flight == 0
            assert scorer.statistics.breaker == 'closed'
            assert_answered(made_up_batches(8), await scorer.score(made_up_batches(8)))
    run(test)


def test_a_cancelled_probe_leaves_the_next_to_others(stub: StubTriton):
    async def test() -> None:
        async with proxy_to(stub) as (address, silence), scorer_of(stub, address=address) as scorer:
            opening = asyncio.create_task(scorer.open())
            while not opening.done():
                silence()
                if scorer.statistics.breaker == 'half_open':
                    opening.cancel()
                await asyncio.sleep(0)
            assert opening.cancelled()
            assert_answered(made_up_batches(2), await scorer.score(made_up_batches(2)))
    run(test)


def test_a_misshapen_batch_is_an_error_that_says_so(stub: StubTriton):
    async def test() -> None:
        batch = made_up_batch()
        batch.counters = batch.counters[:, :-1]
        async with scorer_of(stub) as scorer:
            with pytest.raises(ModelError, match=r'cannot run a batch of \(4, 8, 3\): INVALID_ARGUMENT'):
                await scorer.score([batch])
            assert stub.asked == 1
    run(test)


def test_steps_wait_together_for_the_first_proof(stub: StubTriton):
    async def test() -> None:
        async with scorer_of(stub) as scorer:
            answers = await asyncio.gather(*(scorer.score(made_up_batches(2)) for _ in range(10)))
            for outputs in answers:
                assert_answered(made_up_batches(2), outputs)
            assert stub.probes == 1
    run(test)


def test_a_slow_server_that_answers_everything_gets_a_step_done():
    """Each batch has its own deadline: those that wait for a slot are not late."""
    def slow(batch):
        time.sleep(.3)      # the server's own time
        return answer(batch)

    stub = StubTriton(slow)

    async def run() -> int:
        async with scorer_of(stub, timeout_ms=1000, in_flight_max=1) as scorer:
            return len(await scorer.score(made_up_batches(6)))
    try:
        assert asyncio.run(run()) == 6
    finally:
        stub.stop()
