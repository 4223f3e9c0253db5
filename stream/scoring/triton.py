"""The production scorer: Triton Inference Server over gRPC, the model and its version pinned.

One batch is one request. A step's batches go out together, as many as `Slots` lets in; each

1. waits for its slot, behind the batches of steps that came earlier;
2. is not sent while the breaker is not closed: the step fails at once with `ScorerUnavailable`;
3. is sent with a deadline of its own, inside the step's;
4. is refused unless model, version, names, types, shapes and row ids of the answer are the ones asked for;
5. is sent again after a random pause where that may help, in its slot, while the step's deadline allows.

A server that was never asked, or comes back, first has to prove itself: live, model ready, the same tensors and, where
its configuration tells, the same weights. It does so on a connection of its own: an old one may hang for minutes.
"""
import asyncio
import functools
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc
import msgspec
import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stream.core.features import COUNTERS, SLOT_NUMBERS, Batch
from stream.core.scores import OUTPUT_NAMES, Outputs
from stream.errors import ModelError, ResponseRefused, ScorerUnavailable
from stream.scoring.artefact import SHA256_PARAMETER, load_artefact
from stream.scoring.breaker import Breaker, BreakerState, Slots

PROBE_TIMEOUT_MS = 2_000
PAUSE_S_FIRST, PAUSE_S_MAX = 0.05, 1.0
REFUSALS_MAX = 3                # answers to one batch that may be refused; then something lies steadily
ATTEMPT_S_MIN = 0.25            # no call gets less, while the step has it left

EXHAUSTED = 'RESOURCE_EXHAUSTED'
QUEUE_FULL = 'Exceeds maximum queue size'       # with which Triton says UNAVAILABLE (its dynamic batcher)
# Asked again: nothing of the question was wrong. NOT_FOUND: the model is being loaded anew. INTERNAL, UNKNOWN,
# CANCELLED, ABORTED: how the death of a server, or of its model, looks to a call that it was working on.
RETRIED = frozenset({'UNAVAILABLE', 'DEADLINE_EXCEEDED', EXHAUSTED, 'NOT_FOUND', 'INTERNAL', 'UNKNOWN', 'CANCELLED',
                     'ABORTED'})

_TYPES = {'INT32': np.dtype('<i4'), 'INT64': np.dtype('<i8'), 'FP32': np.dtype('<f4')}
_INPUTS = {'categories': ('INT32', (-1, -1, 3)), 'numbers': ('FP32', (-1, -1, SLOT_NUMBERS)),
           'counters': ('FP32', (-1, COUNTERS)), 'row_id': ('INT64', (-1, 1))}
_messages: Any = service_pb2     # made when it is imported: a type checker sees nothing in it
_INFER = f'/{service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name}/ModelInfer'
# Tags of a request's `raw_input_contents`, field 7, and of an answer's `raw_output_contents`, field 6, on the wire: the
# number of bytes and the bytes follow.
_CONTENTS, _CONTENTS_OUT = b'\x3a', b'\x32'
_CHANNEL = [
    ('grpc.max_send_message_length', -1),
    ('grpc.max_receive_message_length', -1),
    # A new client is a new connection, not a share of one that hangs.
    ('grpc.use_local_subchannel_pool', 1),
    ('grpc.initial_reconnect_backoff_ms', 100),
    ('grpc.min_reconnect_backoff_ms', 1_000),
    ('grpc.max_reconnect_backoff_ms', 1_000),
]


class Statistics(msgspec.Struct):
    """Counts since the scorer was made; read them whenever you like.

    failures   of requests, by gRPC status, e.g. {'UNAVAILABLE': 3}
    in_flight  requests that are on their way
    """

    requests: int = 0
    windows: int = 0            # answered
    request_seconds: float = 0.0    # of answered requests, with the time on the wire
    retries: int = 0
    refused: int = 0            # answers that did not fit their question
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    in_flight: int = 0
    in_flight_limit: int = 0
    breaker: BreakerState = 'open'
    breaker_opened: int = 0


class TritonScorer:
    """Scores with a served model that is a local model folder's twin: the same name and version.

    address        host:port of Triton's gRPC service
    version_dir    the local copy; verified, and the source of the model's SHA-256
    timeout_ms     of one `score`, with all retries, from when its first batch gets its slot: waiting for the batches
                   of other steps says nothing about the server, and each of those has a deadline itself
    in_flight_max  requests at once, over all steps
    served_sha256  what the server's configuration says of its weights; '' before the first answer, or if it is silent

    Used by one event loop at a time; on another loop it connects anew.
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
        self._statistics = Statistics()
        self._breaker = breaker or Breaker(clock)
        self._clock = clock
        self._timeout_s = timeout_ms / 1000
        self._in_flight_max = in_flight_max
        self._why_away = (f'Triton at {address} has not answered yet.', '')
        self._line: _Line | None = None
        self._layouts: dict[int, _Layout | None] = {}       # by the number of rows
        tiers = len(self.tier_names)
        self._wanted = {name: (('INT64', (-1, 1)) if name == 'row_id_out' else
                               ('FP32', (-1, tiers if name == 'tier_probabilities' else 1))) for name in OUTPUT_NAMES}

    @property
    def statistics(self) -> Statistics:
        """The counts, and the state as of now."""
        self._statistics.breaker = self._breaker.state
        self._statistics.breaker_opened = self._breaker.opened
        self._statistics.in_flight_limit = self._line.slots.limit if self._line else self._in_flight_max
        return self._statistics

    async def open(self) -> None:
        """Verify the server now instead of at the first batch.

        Errors   ScorerUnavailable where it is not there, or the model is not ready; ModelError where it serves
                 something else.
        """
        await self._prove(self._line_of_this_loop())

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        """Outputs of each batch, read-only. All or nothing.

        Errors   ScorerUnavailable: hold, and ask again after its `retry_after_ms`. ResponseRefused: what answers is not
                 the model. ModelError: the server does not take the request, or serves something else.
        Cancelling it cancels its calls; others go on.
        """
        if not batches:
            return []
        line = self._line_of_this_loop()
        await self._prove(line)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(line, batch)) for batch in batches]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None        # the first ended the others
        return [task.result() for task in tasks]

    async def close(self) -> None:
        """Close the connection. Nothing may be scoring."""
        line, self._line = self._line, None
        if line and line.client and line.loop is asyncio.get_running_loop():
            await line.client.close()

    def _line_of_this_loop(self) -> '_Line':
        loop = asyncio.get_running_loop()
        if self._line is None or self._line.loop is not loop:
            self._line = _Line(loop, Slots(self._in_flight_max))
        return self._line

    async def _prove(self, line: '_Line') -> None:
        """Let the server prove itself if it has to; callers meanwhile wait for the one that asks."""
        if line.client and self._breaker.state == 'closed':
            return
        async with line.proving:
            if self._breaker.state == 'closed':
                line.client = line.client or self._client()     # another loop's was closed with it
                return
            if not self._breaker.may_probe():
                raise self._unavailable()
            well = None
            try:
                # The old client is closed when its last call lets go of it: closing it now would cancel that call.
                line.client = self._client()
                await self._verify(line.client)
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

    def _client(self) -> '_Client':
        return _Client(self.address, self.model.name, self.model.version)

    async def _verify(self, client: '_Client') -> None:
        """The checks of the module's docstring. Not `server ready`: that waits for other people's models too."""
        name, version = self.model.name, self.model.version
        deadline = _Deadline(self._clock, min(self._timeout_s, PROBE_TIMEOUT_MS / 1000))
        deadline.start()
        if not await client.is_server_live(deadline.left_s()):
            raise ScorerUnavailable(f'Triton at {self.address} is not live.', 'see its log.', 0)
        if not await client.is_model_ready(deadline.left_s()):
            raise ScorerUnavailable(
                f'Triton at {self.address} has no model {name} version {version} ready.',
                'put the model folder into its repository and load it, or set `model` to the one that it serves.', 0)
        metadata = await client.model_metadata(deadline.left_s())
        for what, wanted, tensors in (('inputs', _INPUTS, metadata.inputs),
                                      ('outputs', self._wanted, metadata.outputs)):
            served = {tensor.name: (tensor.datatype, tuple(tensor.shape)) for tensor in tensors}
            if what == 'outputs':       # a model may give more than is asked of it
                served = {name: tensor for name, tensor in served.items() if name in wanted}
            if served != wanted:
                raise self._other_model(f'has the {what} {served}, expected {wanted}')
        config = await client.model_config(deadline.left_s())
        if config.max_batch_size < self.rows_max:
            raise ModelError(
                f'Triton at {self.address} takes batches of {config.max_batch_size} rows, these have up to '
                f'{self.rows_max}.', f'set batch_rows_max to {config.max_batch_size}, or raise max_batch_size in the '
                "model's config.pbtxt.")
        if SHA256_PARAMETER in config.parameters:
            self.served_sha256 = config.parameters[SHA256_PARAMETER].string_value
            if self.served_sha256 != self.model.sha256:
                raise self._other_model(f'has the SHA-256 {self.served_sha256}, the folder {self.model.sha256}')

    async def _answer(self, line: '_Line', batch: Batch) -> Outputs:
        """One batch's outputs. The slot is kept between attempts, so that retries crowd nobody out."""
        async with line.slots:
            deadline = _Deadline(self._clock, self._timeout_s)
            deadline.start()
            request = request_bytes(self.model.name, self.model.version, batch)
            refused = 0
            for attempt in itertools.count():
                if self._breaker.state != 'closed':
                    raise self._unavailable()
                limit = line.slots.limit
                try:
                    outputs = await self._ask(line, request, batch, deadline)
                except ResponseRefused as error:
                    refused += 1
                    self._statistics.refused += 1
                    if refused == REFUSALS_MAX:
                        raise
                    self._why_away = (error.problem, error.do)
                except grpc.aio.AioRpcError as error:
                    self._judge(error, batch, line.slots, limit)
                else:
                    self._breaker.answered()
                    line.slots.grow()
                    return outputs
                pause_s = random.uniform(0, min(PAUSE_S_MAX, PAUSE_S_FIRST * 2 ** min(attempt, 10)))    # full jitter
                if pause_s >= deadline.left_s():
                    raise self._unavailable()
                self._statistics.retries += 1
                await asyncio.sleep(pause_s)
        raise AssertionError('unreachable')

    async def _ask(self, line: '_Line', request: bytes, batch: Batch, deadline: '_Deadline') -> Outputs:
        assert line.client is not None
        left_s = deadline.left_s()
        started_s = self._clock()
        self._statistics.requests += 1
        self._statistics.in_flight += 1
        try:
            # Half of what is left: a call that hangs leaves time to ask again.
            answer = await line.client.infer(request, max(left_s / 2, min(left_s, ATTEMPT_S_MIN)))
        finally:
            self._statistics.in_flight -= 1
        outputs = self._checked(answer, batch)
        self._statistics.windows += len(batch)
        self._statistics.request_seconds += self._clock() - started_s
        return outputs

    def _judge(self, error: grpc.aio.AioRpcError, batch: Batch, slots: Slots, limit: int) -> None:
        """What a failed request means for the next ones. Errors: ModelError where asking again is of no use."""
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
            slots.shrink(limit)     # it is there, and says that it has too much to do
        else:
            self._breaker.failed()

    def _checked(self, answer: bytes, batch: Batch) -> Outputs:
        """The answer's tensors. Numbers are judged later, row by row (`stream.core.scores.collect`).

        An answer that begins byte for byte as one to as many rows that was read and found right is right too: what
        follows are the contents, and the row ids among them are compared again.
        """
        rows = len(batch)
        layout = self._layouts.get(rows)
        outputs = layout.outputs(answer, rows, batch.row_id) if layout else None
        if outputs is None:
            outputs = self._read(answer, batch)
        return outputs

    def _read(self, answer: bytes, batch: Batch) -> Outputs:
        """An answer of whatever form, every part of it checked; its layout is kept for the next ones."""
        try:
            response = _messages.ModelInferResponse.FromString(answer)
        except DecodeError as error:
            self._refuse(f'cannot be read ({error})')
        model = (response.model_name, response.model_version)
        if model != (self.model.name, self.model.version):
            self._refuse(f'comes from {model[0]} version {model[1]}')
        names = [output.name for output in response.outputs]
        if sorted(names) != sorted(self._wanted) or len(response.raw_output_contents) != len(names):
            self._refuse(f'has the outputs {names} with {len(response.raw_output_contents)} contents')
        parts = {}
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
            kind, (_, width) = self._wanted[output.name]
            shape = (len(batch), width)
            fits = len(content) == len(batch) * width * _TYPES[kind].itemsize
            if (output.datatype, tuple(output.shape)) != (kind, shape) or not fits:
                self._refuse(f'has {output.name} as {output.datatype} {tuple(output.shape)} in {len(content)} bytes, '
                             f'expected {kind} {shape}')
            parts[output.name] = np.frombuffer(content, _TYPES[kind]).reshape(shape)
        if not np.array_equal(parts['row_id_out'], batch.row_id):
            self._refuse('is for other rows than it was asked about')
        self._layouts[len(batch)] = _Layout.of(answer, response, self._wanted)
        return Outputs(**parts)

    def _refuse(self, why: str) -> NoReturn:
        raise ResponseRefused(
            f'An answer of Triton at {self.address} {why}.',
            f'check that it serves {self.model.name} version {self.model.version} as exported, and that nothing '
            'between reorders its batches.')

    def _other_model(self, why: str) -> ModelError:
        return ModelError(f'{self.model.name} version {self.model.version} at {self.address} {why}.',
                          'serve the folder that `model` names, or set `model` to a copy of the one that is served.')

    def _is_away(self, status: str, error: grpc.aio.AioRpcError) -> None:
        self._why_away = (f'Triton at {self.address} does not answer: {status}, {error.details()}.',
                          'start it, or see its log.')

    def _unavailable(self) -> ScorerUnavailable:
        problem, do = self._why_away
        return ScorerUnavailable(problem, do, self._breaker.retry_after_ms())


class _Line:
    """What belongs to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, slots: Slots) -> None:
        self.loop = loop
        self.slots = slots
        self.proving = asyncio.Lock()
        self.client: _Client | None = None


class _Client:
    """One connection to Triton, and what is asked over it about one version of a model.

    Not tritonclient's own: that builds each request of Python objects, copies each array three times and wraps each
    answer. Its messages and service are used. Timeouts are seconds. Errors: AioRpcError of gRPC.
    """

    def __init__(self, address: str, name: str, version: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_unary(_INFER)
        self._model = {'name': name, 'version': version}

    # Each is a coroutine that holds `self` while it waits: a channel that nobody holds is closed, with its calls.
    async def is_server_live(self, timeout_s: float) -> bool:
        return (await self._stub.ServerLive(_messages.ServerLiveRequest(), timeout=timeout_s)).live

    async def is_model_ready(self, timeout_s: float) -> bool:
        return (await self._stub.ModelReady(_messages.ModelReadyRequest(**self._model), timeout=timeout_s)).ready

    async def model_metadata(self, timeout_s: float) -> Any:
        return await self._stub.ModelMetadata(_messages.ModelMetadataRequest(**self._model), timeout=timeout_s)

    async def model_config(self, timeout_s: float) -> Any:
        request = _messages.ModelConfigRequest(**self._model)
        return (await self._stub.ModelConfig(request, timeout=timeout_s)).config

    async def infer(self, request: bytes, timeout_s: float) -> bytes:
        """A serialized ModelInferResponse to a serialized ModelInferRequest."""
        return await self._infer(request, timeout=timeout_s)

    async def close(self) -> None:
        await self._channel.close()


class _Layout:
    """Where the contents of an answer's tensors lie, once one with as many rows was read: all such are alike.

    Source   Protocol Buffers' encoding; `raw_output_contents` is the last field of Triton's ModelInferResponse.
    """

    def __init__(self, head: bytes, marks: list[tuple[int, bytes]], tensors: list[tuple[str, np.dtype, int, int]],
                 length: int) -> None:
        self._head = head           # the fields before the contents
        self._marks = marks         # where each content begins, and the tag and length that stand before it
        self._tensors = tensors     # name, type, numbers a row, where it begins
        self._length = length

    @classmethod
    def of(cls, answer: bytes, response: Any, wanted: dict[str, tuple[str, tuple[int, int]]]) -> '_Layout | None':
        """The layout of an answer that was read and is right; None where its fields come in another order."""
        marks, tensors, end = [], [], len(answer)
        for output, content in reversed(list(zip(response.outputs, response.raw_output_contents, strict=True))):
            kind, (_, width) = wanted[output.name]
            begin = end - len(content)
            mark = _CONTENTS_OUT + _varint(len(content))
            if answer[begin - len(mark):begin] != mark:
                return None
            marks.append((begin, mark))
            tensors.append((output.name, _TYPES[kind], width, begin))
            end = begin - len(mark)
        return cls(answer[:end], marks, tensors, len(answer))

    def outputs(self, answer: bytes, rows: int, row_id: np.ndarray) -> Outputs | None:
        """The tensors of an answer to so many rows, read-only; None where it is laid out otherwise, or others'."""
        if len(answer) != self._length or not answer.startswith(self._head):
            return None
        for begin, mark in self._marks:
            if not answer.endswith(mark, 0, begin):
                return None
        parts = {name: np.frombuffer(answer, kind, rows * width, begin).reshape(rows, width)
                 for name, kind, width, begin in self._tensors}
        return Outputs(**parts) if parts['row_id_out'].tobytes() == row_id.tobytes() else None


class _Deadline:
    """A span of time that begins with the first `start`."""

    def __init__(self, clock: Callable[[], float], span_s: float) -> None:
        self._clock = clock
        self._span_s = span_s
        self._end_s: float | None = None

    def start(self) -> None:
        if self._end_s is None:
            self._end_s = self._clock() + self._span_s

    def left_s(self) -> float:
        return self._span_s if self._end_s is None else max(0.0, self._end_s - self._clock())


def request_bytes(name: str, version: str, batch: Batch) -> bytes:
    """A serialized ModelInferRequest for all outputs; each array is copied once.

    Source   Protocol Buffers' encoding: fields come in any order, and repeated ones in theirs. `raw_input_contents`
             holds rows in C order, little-endian (Triton's grpc_service.proto).
    """
    arrays = [np.ascontiguousarray(getattr(batch, tensor), _TYPES[kind]) for tensor, (kind, _) in _INPUTS.items()]
    parts: list[bytes | memoryview] = [_request_head(name, version, tuple(array.shape for array in arrays))]
    for array in arrays:
        parts += (_CONTENTS, _varint(array.nbytes), array.data)
    return b''.join(parts)


@functools.lru_cache(4 * 256)       # one for each length and number of rows
def _request_head(name: str, version: str, shapes: tuple[tuple[int, ...], ...]) -> bytes:
    """All of a request but the contents of its tensors."""
    request = _messages.ModelInferRequest(model_name=name, model_version=version)
    for (tensor, (kind, _)), shape in zip(_INPUTS.items(), shapes, strict=True):
        request.inputs.add(name=tensor, datatype=kind, shape=shape)
    for output in OUTPUT_NAMES:
        request.outputs.add(name=output)
    return request.SerializeToString()


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
