"""Produce and fetch requests that the client library sends and answers as if they were its own, without its structs.

Relies on what `AIOKafkaConnection` in aiokafka 0.14 does with a request (`send` and `_handle_frame` in conn.py). It
calls `prepare` with the versions that the broker offers, then `build_request_header` and `encode`. For the response, it
calls `parse_response_header` and `RESPONSE_TYPE.decode` with a BytesIO. `post` does the work of `send` itself, so it
also relies on `_writer`, `_requests`, `_versions`, `_client_id` and `_next_correlation_id`. The project allows no later
release than 0.14.
"""
import asyncio
import struct
from io import BytesIO
from typing import Any, ClassVar, Self

from aiokafka.conn import CloseReason
from aiokafka.errors import IncompatibleBrokerVersion, KafkaConnectionError

from stream.kafka import wire

HEADER_BYTES = 4        # of a response
_SIZE = _CORRELATION_ID = struct.Struct('>i')


class Encoded:
    """Bytes in place of one of aiokafka's structs."""

    __slots__ = ('_data',)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def encode(self) -> bytes:
        return self._data


class ResponseHeader:
    """The header of a response."""

    __slots__ = ('correlation_id',)

    def __init__(self, correlation_id: int) -> None:
        self.correlation_id = correlation_id


class LeanRequest:
    """A request of one of the versions from VERSION_MIN to VERSION_MAX, none of which has tagged fields."""

    API_KEY: ClassVar[int]
    NAME: ClassVar[str]
    VERSION_MIN: ClassVar[int]
    VERSION_MAX: ClassVar[int]
    version = -1

    def prepare(self, versions: dict[int, tuple[int, int]]) -> Self:
        """Choose the newest version that both sides know. Errors: IncompatibleBrokerVersion."""
        lowest, highest = versions.get(self.API_KEY, (0, -1))
        self.version = min(highest, self.VERSION_MAX)
        if self.version < max(lowest, self.VERSION_MIN):
            raise IncompatibleBrokerVersion(
                f'the broker offers versions {lowest} to {highest} of the request {self.NAME}, and this worker knows '
                f'{self.VERSION_MIN} to {self.VERSION_MAX}')
        return self

    def build_request_header(self, correlation_id: int, client_id: str) -> Encoded:
        return Encoded(wire.request_header(self.API_KEY, self.version, correlation_id, client_id.encode()))

    def encode(self) -> bytes:
        raise NotImplementedError

    def parse_response_header(self, response: BytesIO) -> ResponseHeader:
        return ResponseHeader(_CORRELATION_ID.unpack(response.read(HEADER_BYTES))[0])

    @property
    def RESPONSE_TYPE(self) -> Self:  # noqa: N802 - aiokafka's name
        return self         # `decode` needs the version

    def decode(self, response: BytesIO) -> Any:
        raise NotImplementedError


class ProduceRequest(LeanRequest):
    """Batches for partitions that one broker leads. The response is the list of `wire.produce_response`."""

    API_KEY, NAME, VERSION_MIN, VERSION_MAX = 0, 'Produce', 3, 8

    def __init__(self, timeout_ms: int, topics: dict[bytes, list[tuple[int, bytearray]]]) -> None:
        self._timeout_ms = timeout_ms
        self._topics = topics

    def encode(self) -> bytes:
        return wire.produce_request(self._timeout_ms, self._topics)

    def decode(self, response: BytesIO) -> list[tuple[bytes, int, int, int, bytes | None]]:
        return wire.produce_response(response.getvalue(), HEADER_BYTES, self.version)


class FetchRequest(LeanRequest):
    """A fetch of committed records, or of all. The response is that of `wire.fetch_response`.

    Version 10 is the first that brokers answer with records compressed by zstd.
    """

    API_KEY, NAME, VERSION_MIN, VERSION_MAX = 1, 'Fetch', 4, 11

    def __init__(self, options: tuple[int, int, int, int, int], topics: dict[bytes, list[tuple[int, int]]]) -> None:
        self._options = options     # as `wire.fetch_request` takes them
        self._topics = topics

    def encode(self) -> bytes:
        return wire.fetch_request(self.version, *self._options, self._topics)

    def decode(self, response: BytesIO) -> Any:
        return wire.fetch_response(response.getvalue(), HEADER_BYTES, self.version)


def post(connection: Any, request: LeanRequest) -> asyncio.Future[Any]:
    """Send a request now; return a future of the response. It gets an error if the connection closes.

    `AIOKafkaConnection.send` does the same, and watches the time limit of each request with a coroutine and a timer.
    Here that is up to the caller, who closes the connection then.

    Errors   KafkaConnectionError if the connection is closed; IncompatibleBrokerVersion
    """
    if connection._writer is None:
        raise KafkaConnectionError(f'No connection to broker at {connection.host}:{connection.port}')
    request.prepare(connection._versions)
    correlation_id = connection._next_correlation_id()
    header = request.build_request_header(correlation_id, connection._client_id).encode()
    body = request.encode()
    try:
        connection._writer.write(b''.join((_SIZE.pack(len(header) + len(body)), header, body)))
    except OSError as error:
        connection.close(reason=CloseReason.CONNECTION_BROKEN)
        raise KafkaConnectionError(f'Connection at {connection.host}:{connection.port} broken: {error}') from error
    response = asyncio.get_running_loop().create_future()
    connection._requests.append((correlation_id, request, response))
    return response
