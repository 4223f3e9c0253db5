"""Bytes to and from Triton: its gRPC calls, a request written by hand, and an answer read without parsing it again.

Everything that is asked once per connection uses the generated messages of Triton's protocol. The two that are made for
every batch do not, because the generated ones copy each array three times. Measured on 2 cores, 256 windows of 64
slots: 24 us instead of 3,000 us for a request, 5 us instead of 15 us for an answer. tests/scoring/test_triton.py checks
that both agree with the generated messages.

Source   Protocol Buffers' encoding; Triton's grpc_service.proto.
"""
import functools
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stream.core.features import COUNTERS, SLOT_NUMBERS, Batch
from stream.core.scores import OUTPUT_NAMES, Outputs

TYPES = {'INT32': np.dtype('<i4'), 'INT64': np.dtype('<i8'), 'FP32': np.dtype('<f4')}
# Name -> type and shape of a tensor; -1 is any size.
Tensors = dict[str, tuple[str, tuple[int, ...]]]
INPUTS: Tensors = {'categories': ('INT32', (-1, -1, 3)), 'numbers': ('FP32', (-1, -1, SLOT_NUMBERS)),
                   'counters': ('FP32', (-1, COUNTERS)), 'row_id': ('INT64', (-1, 1))}
messages: Any = service_pb2     # built at import, so a type checker sees nothing in it
_INFER = f'/{service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name}/ModelInfer'
# Tags of `raw_input_contents` (field 7 of a request) and `raw_output_contents` (field 6 of an answer). The
# number of bytes and the bytes follow.
_CONTENTS_IN, _CONTENTS_OUT = b'\x3a', b'\x32'
_CHANNEL = [
    ('grpc.max_send_message_length', -1),
    ('grpc.max_receive_message_length', -1),
    # Each client has a connection of its own. A shared one may hang.
    ('grpc.use_local_subchannel_pool', 1),
    ('grpc.initial_reconnect_backoff_ms', 100),
    ('grpc.min_reconnect_backoff_ms', 1_000),
    ('grpc.max_reconnect_backoff_ms', 1_000),
]


class TritonClient:
    """One connection to Triton, for one version of a model. Timeouts are seconds.

    Not tritonclient's own class, which builds each request of Python objects, copies each array three times and wraps
    each answer.

    Errors   grpc.aio.AioRpcError.
    """

    def __init__(self, address: str, name: str, version: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_unary(_INFER)
        self._model = {'name': name, 'version': version}

    # Each is a coroutine, which holds `self` while it waits. A channel that nobody holds is closed, with its calls.
    async def is_server_live(self, timeout_s: float) -> bool:
        return (await self._stub.ServerLive(messages.ServerLiveRequest(), timeout=timeout_s)).live

    async def is_model_ready(self, timeout_s: float) -> bool:
        return (await self._stub.ModelReady(messages.ModelReadyRequest(**self._model), timeout=timeout_s)).ready

    async def model_metadata(self, timeout_s: float) -> Any:
        return await self._stub.ModelMetadata(messages.ModelMetadataRequest(**self._model), timeout=timeout_s)

    async def model_config(self, timeout_s: float) -> Any:
        request = messages.ModelConfigRequest(**self._model)
        return (await self._stub.ModelConfig(request, timeout=timeout_s)).config

    async def infer(self, request: bytes, timeout_s: float) -> bytes:
        """A serialized ModelInferResponse to a serialized ModelInferRequest."""
        return await self._infer(request, timeout=timeout_s)

    async def close(self) -> None:
        await self._channel.close()


def request_bytes(name: str, version: str, batch: Batch) -> bytes:
    """A serialized ModelInferRequest for all outputs. Each array is copied once.

    The fields of a message may come in any order. `raw_input_contents` holds rows in C order, little-endian.
    """
    arrays = [np.ascontiguousarray(getattr(batch, tensor), TYPES[kind]) for tensor, (kind, _) in INPUTS.items()]
    parts: list[bytes | memoryview] = [_request_head(name, version, tuple(array.shape for array in arrays))]
    for array in arrays:
        parts += (_CONTENTS_IN, _varint(array.nbytes), array.data)
    return b''.join(parts)


@functools.lru_cache(4 * 256)       # one for each length and number of rows
def _request_head(name: str, version: str, shapes: tuple[tuple[int, ...], ...]) -> bytes:
    """A request without the contents of its tensors."""
    request = messages.ModelInferRequest(model_name=name, model_version=version)
    for (tensor, (kind, _)), shape in zip(INPUTS.items(), shapes, strict=True):
        request.inputs.add(name=tensor, datatype=kind, shape=shape)
    for output in OUTPUT_NAMES:
        request.outputs.add(name=output)
    return request.SerializeToString()


class AnswerLayout:
    """Where an answer keeps the contents of its tensors. All answers of one model with equally many rows are alike."""

    def __init__(self, head: bytes, marks: list[tuple[int, bytes]], tensors: list[tuple[str, np.dtype, int, int]],
                 length: int) -> None:
        self._head = head           # the fields before the contents
        self._marks = marks         # where each content begins, and the tag and length in front of it
        self._tensors = tensors     # name, type, numbers per row, where it begins
        self._length = length

    @classmethod
    def of(cls, answer: bytes, response: Any, expected: Tensors) -> 'AnswerLayout | None':
        """The layout of an answer that was parsed and found right. None if its fields come in another order."""
        marks, tensors, end = [], [], len(answer)
        for output, content in reversed(list(zip(response.outputs, response.raw_output_contents, strict=True))):
            kind, (_, width) = expected[output.name]
            begin = end - len(content)
            mark = _CONTENTS_OUT + _varint(len(content))
            if answer[begin - len(mark):begin] != mark:
                return None
            marks.append((begin, mark))
            tensors.append((output.name, TYPES[kind], width, begin))
            end = begin - len(mark)
        return cls(answer[:end], marks, tensors, len(answer))

    def outputs(self, answer: bytes, rows: int, row_id: np.ndarray) -> Outputs | None:
        """The tensors of an answer with `rows` rows, read-only. None if its layout or its row ids are others."""
        if len(answer) != self._length or not answer.startswith(self._head):
            return None
        for begin, mark in self._marks:
            if not answer.endswith(mark, 0, begin):
                return None
        parts = {name: np.frombuffer(answer, kind, rows * width, begin).reshape(rows, width)
                 for name, kind, width, begin in self._tensors}
        return Outputs(**parts) if parts['row_id_out'].tobytes() == row_id.tobytes() else None


def _varint(number: int) -> bytes:
    """Seven bits per byte, the lowest first. The eighth bit says that more bytes follow."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
