"""The production scorer: Triton Inference Server over gRPC. The model and its version are fixed.

One batch is one request. All batches of a step are sent together, as many as `ConcurrencyLimit` admits. Each batch

1. waits for its turn, behind the batches of earlier steps;
2. is not sent while the circuit breaker is not closed: the step then fails at once with `ScorerUnavailable`;
3. is sent with a deadline of its own, which ends within the deadline of the step;
4. refuses an answer unless its model, version, names, types, shapes and row ids are those of the request;
5. is sent again after a random pause if that may help. It keeps its turn, and stops when the step's deadline is over.

A server must prove itself before its first batch, and again after it was away: it is live, the model is ready, the
tensors are the same and, if its configuration names them, so are the weights. The proof uses a new connection, because
an old one may hang for minutes.
"""
import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import grpc
import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from stream.core.features import Batch
from stream.core.scores import OUTPUT_NAMES, Outputs
from stream.errors import ModelError, ResponseRefused, ScorerUnavailable
from stream.scoring.artefact import SHA256_PARAMETER, load_artefact
from stream.scoring.breaker import Breaker, BreakerState, ConcurrencyLimit
from stream.scoring.triton_wire import INPUTS, TYPES, AnswerLayout, Tensors, TritonClient, messages, request_bytes

PROBE_TIMEOUT_MS = 2_000
PAUSE_S_FIRST, PAUSE_S_MAX = 0.05, 1.0
REFUSALS_MAX = 3                # refused answers to one batch, after which the step fails
ATTEMPT_S_MIN = 0.25            # least time of one call, while the step has it left

EXHAUSTED = 'RESOURCE_EXHAUSTED'
QUEUE_FULL = 'Exceeds maximum queue size'       # the detail of UNAVAILABLE when Triton's dynamic batcher is full
# Statuses after which the same request may succeed. NOT_FOUND: the model is being loaded again. INTERNAL, UNKNOWN,
# CANCELLED, ABORTED: what a call sees when the server, or its model, dies during the call.
RETRIED = frozenset({'UNAVAILABLE', 'DEADLINE_EXCEEDED', EXHAUSTED, 'NOT_FOUND', 'INTERNAL', 'UNKNOWN', 'CANCELLED',
                     'ABORTED'})


class RequestStatistics(msgspec.Struct):
    """What became of the requests to Triton since the scorer was made. May be read at any time.

    windows    that were answered
    refused    answers that did not fit their request
    failures   of requests, by gRPC status, e.g. {'UNAVAILABLE': 3}
    in_flight  requests without an answer yet
    """

    requests: int = 0
    windows: int = 0
    retries: int = 0
    refused: int = 0
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    in_flight: int = 0
    in_flight_limit: int = 0
    breaker: BreakerState = 'open'
    breaker_opened: int = 0


class TritonScorer:
    """Scores with a served model. A local copy of its folder, with the same name and version, says what is expected.

    address        host:port of Triton's gRPC service
    version_dir    the local copy; it is verified, and gives the model's SHA-256
    timeout_ms     of one batch, with all retries. It begins when the batch gets its turn: waiting for batches of other
                   steps says nothing about the server, and each of them has a deadline of its own
    in_flight_max  requests at once, over all steps
    served_sha256  of the weights, as the server's configuration says; '' before the first proof, or if it does not say

    Belongs to one event loop at a time. On another loop it opens a new connection.
    """

    def __init__(self, address: str, version_dir: Path, rows_max: int = 256, timeout_ms: int = 10_000,
                 in_flight_max: int = 4, clock: Callable[[], float] = time.monotonic,
                 breaker: Breaker | None = None) -> None:
        artefact = load_artefact(version_dir)
        self.model = artefact.info
        self.manifest = artefact.manifest
        self.trained_on = artefact.manifest.trained_on
        self.tier_names = artefact.manifest.tier_names
        self.rows_max = min(rows_max, artefact.manifest.rows_max)
        self.address = address
        self.served_sha256 = ''
        self._statistics = RequestStatistics()
        self._breaker = breaker or Breaker(clock)
        self._clock = clock
        self._timeout_s = timeout_ms / 1000
        self._in_flight_max = in_flight_max
        self._why_away = (f'Triton at {address} has not answered yet.', '')
        self._connection: _Connection | None = None
        self._layouts: dict[int, AnswerLayout | None] = {}      # by the number of rows
        tiers = len(self.tier_names)
        self._outputs: Tensors = {
            name: ('INT64', (-1, 1)) if name == 'row_id_out' else
                  ('FP32', (-1, tiers if name == 'tier_probabilities' else 1))
            for name in OUTPUT_NAMES}

    @property
    def statistics(self) -> RequestStatistics:
        """The counts, and the current state of breaker and limit."""
        self._statistics.breaker = self._breaker.state
        self._statistics.breaker_opened = self._breaker.opened
        self._statistics.in_flight_limit = (
            self._connection.concurrency.limit if self._connection else self._in_flight_max)
        return self._statistics

    async def open(self) -> None:
        """Verify the server now instead of at the first batch.

        Errors   ScorerUnavailable if it does not answer, or the model is not ready; ModelError if it serves something
                 else.
        """
        await self._prove(self._connection_of_this_loop())

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        """Outputs of each batch, read-only. All or nothing.

        Errors   ScorerUnavailable: hold the events, and ask again after its `retry_after_ms`. ResponseRefused: the
                 answers are not the model's. ModelError: the server does not take the request, or serves something
                 else.
        Cancelling this call cancels its requests and no others.
        """
        if not batches:
            return []
        connection = self._connection_of_this_loop()
        await self._prove(connection)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(connection, batch)) for batch in batches]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None        # the first one cancelled the others
        return [task.result() for task in tasks]

    async def close(self) -> None:
        """Close the connection. Nothing may be scoring."""
        connection, self._connection = self._connection, None
        if connection and connection.client and connection.loop is asyncio.get_running_loop():
            await connection.client.close()

    def _connection_of_this_loop(self) -> '_Connection':
        loop = asyncio.get_running_loop()
        if self._connection is None or self._connection.loop is not loop:
            self._connection = _Connection(loop, ConcurrencyLimit(self._in_flight_max))
        return self._connection

    async def _prove(self, connection: '_Connection') -> None:
        """Verify the server if it must prove itself. One caller asks; the others wait for the result."""
        if connection.client and self._breaker.state == 'closed':
            return
        async with connection.proving:
            if self._breaker.state == 'closed':
                connection.client = connection.client or self._client()     # that of another loop was closed with it
                return
            if not self._breaker.may_probe():
                raise self._unavailable()
            well = None
            try:
                # The old client closes when its last call is done. Closing it here would cancel that call.
                connection.client = self._client()
                await self._verify(connection.client)
                well = True
            except ScorerUnavailable as error:
                well = False
                self._why_away = (error.problem, error.do)
            except grpc.aio.AioRpcError as error:
                well = False
                self._is_away(error.code().name, error)
            finally:
                self._breaker.probed(well)
            if not well:
                raise self._unavailable()

    def _client(self) -> TritonClient:
        return TritonClient(self.address, self.model.name, self.model.version)

    async def _verify(self, client: TritonClient) -> None:
        """The proof of the module's docstring. It does not ask `server ready`, which waits for all other models too."""
        name, version = self.model.name, self.model.version
        deadline = _Deadline(self._clock, min(self._timeout_s, PROBE_TIMEOUT_MS / 1000))
        if not await client.is_server_live(deadline.left_s()):
            raise ScorerUnavailable(f'Triton at {self.address} is not live.', 'see its log.', 0)
        if not await client.is_model_ready(deadline.left_s()):
            raise ScorerUnavailable(
                f'Triton at {self.address} has no model {name} version {version} ready.',
                'put the model folder into its repository and load it, or set `model` to the one that it serves.', 0)
        metadata = await client.model_metadata(deadline.left_s())
        for what, expected, tensors in (('inputs', INPUTS, metadata.inputs),
                                        ('outputs', self._outputs, metadata.outputs)):
            served = {tensor.name: (tensor.datatype, tuple(tensor.shape)) for tensor in tensors}
            if what == 'outputs':       # a model may have more outputs than are asked for
                served = {name: tensor for name, tensor in served.items() if name in expected}
            if served != expected:
                raise self._other_model(f'has the {what} {served}, expected {expected}')
        config = await client.model_config(deadline.left_s())
        if config.max_batch_size < self.rows_max:
            raise ModelError(
                f'Triton at {self.address} takes batches of {config.max_batch_size} rows. These have up to '
                f'{self.rows_max}.', f'set batch_rows_max to {config.max_batch_size}, or raise max_batch_size in the '
                "model's config.pbtxt.")
        if SHA256_PARAMETER in config.parameters:
            self.served_sha256 = config.parameters[SHA256_PARAMETER].string_value
            if self.served_sha256 != self.model.sha256:
                raise self._other_model(f'has the SHA-256 {self.served_sha256}, the folder has {self.model.sha256}')

    async def _answer(self, connection: '_Connection', batch: Batch) -> Outputs:
        """Outputs of one batch. It keeps its turn between attempts, so that retries add no load."""
        async with connection.concurrency as concurrency:
            deadline = _Deadline(self._clock, self._timeout_s)
            request = request_bytes(self.model.name, self.model.version, batch)
            refused = 0
            for attempt in itertools.count():
                if self._breaker.state != 'closed':
                    raise self._unavailable()
                limit = concurrency.limit
                try:
                    outputs = await self._ask(connection, request, batch, deadline)
                except ResponseRefused as error:
                    refused += 1
                    self._statistics.refused += 1
                    if refused == REFUSALS_MAX:
                        raise
                    self._why_away = (error.problem, error.do)
                except grpc.aio.AioRpcError as error:
                    self._note_failure(error, batch, concurrency, limit)
                else:
                    self._breaker.answered()
                    concurrency.grow()
                    return outputs
                pause_s = random.uniform(0, min(PAUSE_S_MAX, PAUSE_S_FIRST * 2 ** min(attempt, 10)))    # full jitter
                if pause_s >= deadline.left_s():
                    raise self._unavailable()
                self._statistics.retries += 1
                await asyncio.sleep(pause_s)
        raise AssertionError('unreachable')

    async def _ask(self, connection: '_Connection', request: bytes, batch: Batch, deadline: '_Deadline') -> Outputs:
        assert connection.client is not None
        left_s = deadline.left_s()
        self._statistics.requests += 1
        self._statistics.in_flight += 1
        try:
            # Half of the time left, so that a call that hangs leaves time for another.
            answer = await connection.client.infer(request, max(left_s / 2, min(left_s, ATTEMPT_S_MIN)))
        finally:
            self._statistics.in_flight -= 1
        outputs = self._checked(answer, batch)
        self._statistics.windows += batch.windows
        return outputs

    def _note_failure(self, error: grpc.aio.AioRpcError, batch: Batch, concurrency: ConcurrencyLimit,
                      limit: int) -> None:
        """Slow down or open the breaker after a failed request. Errors: ModelError if asking again cannot help."""
        status = error.code().name
        if QUEUE_FULL in (error.details() or ''):
            status = EXHAUSTED
        self._statistics.failures[status] = self._statistics.failures.get(status, 0) + 1
        if status not in RETRIED:
            raise ModelError(
                f'The model cannot run a batch of {batch.categories.shape}: {status}, {error.details()}.',
                'check that Triton serves the model that this version was exported for, and see its log.') from error
        self._is_away(status, error)
        if status == EXHAUSTED:
            concurrency.shrink(limit)       # it answers, but has too much to do
        else:
            self._breaker.failed()

    def _checked(self, answer: bytes, batch: Batch) -> Outputs:
        """The answer's tensors. `stream.core.scores.collect` checks the numbers later, row by row.

        If an answer begins with the same bytes as an earlier, valid one with as many rows, it is valid too: only the
        contents follow, and the row ids among them are compared each time.
        """
        rows = len(batch)
        layout = self._layouts.get(rows)
        outputs = layout.outputs(answer, rows, batch.row_id) if layout else None
        if outputs is None:
            outputs = self._read(answer, batch)
        return outputs

    def _read(self, answer: bytes, batch: Batch) -> Outputs:
        """Parse an answer, check every part of it, and remember its layout for the next ones."""
        try:
            response = messages.ModelInferResponse.FromString(answer)
        except DecodeError as error:
            self._refuse(f'cannot be read ({error})')
        model = (response.model_name, response.model_version)
        if model != (self.model.name, self.model.version):
            self._refuse(f'comes from {model[0]} version {model[1]}')
        names = [output.name for output in response.outputs]
        if sorted(names) != sorted(self._outputs) or len(response.raw_output_contents) != len(names):
            self._refuse(f'has the outputs {names} with {len(response.raw_output_contents)} contents')
        parts = {}
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
            kind, (_, width) = self._outputs[output.name]
            shape = (len(batch), width)
            fits = len(content) == len(batch) * width * TYPES[kind].itemsize
            if (output.datatype, tuple(output.shape)) != (kind, shape) or not fits:
                self._refuse(f'has {output.name} as {output.datatype} {tuple(output.shape)} in {len(content)} bytes, '
                             f'expected {kind} {shape}')
            parts[output.name] = np.frombuffer(content, TYPES[kind]).reshape(shape)
        if not np.array_equal(parts['row_id_out'], batch.row_id):
            self._refuse('is for other rows than the request')
        self._layouts[len(batch)] = AnswerLayout.of(answer, response, self._outputs)
        return Outputs(**parts)

    def _refuse(self, why: str) -> NoReturn:
        raise ResponseRefused(
            f'An answer of Triton at {self.address} {why}.',
            f'check that it serves {self.model.name} version {self.model.version} as exported, and that no proxy '
            'in between reorders its batches.')

    def _other_model(self, why: str) -> ModelError:
        return ModelError(f'{self.model.name} version {self.model.version} at {self.address} {why}.',
                          'serve the folder that `model` names, or set `model` to a copy of the one that is served.')

    def _is_away(self, status: str, error: grpc.aio.AioRpcError) -> None:
        self._why_away = (f'Triton at {self.address} does not answer: {status}, {error.details()}.',
                          'start it, or see its log.')

    def _unavailable(self) -> ScorerUnavailable:
        problem, do = self._why_away
        return ScorerUnavailable(problem, do, self._breaker.retry_after_ms())


class _Connection:
    """The parts that belong to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, concurrency: ConcurrencyLimit) -> None:
        self.loop = loop
        self.concurrency = concurrency
        self.proving = asyncio.Lock()
        self.client: TritonClient | None = None


class _Deadline:
    """A time limit that begins now."""

    def __init__(self, clock: Callable[[], float], span_s: float) -> None:
        self._clock = clock
        self._end_s = clock() + span_s

    def left_s(self) -> float:
        return max(0.0, self._end_s - self._clock())
