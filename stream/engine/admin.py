"""The worker's HTTP server for machines that look after it: is it alive, is it ready, how is it doing.

    /live      200 while the event loop answers and nothing has declared the worker dead, else 503: restart it
    /ready     200 while events really flow, else 503 with the reasons
    /status    partitions, states and lags as JSON
    /metrics   Prometheus (or OpenMetrics, for whoever asks)

None of them holds data of a shop: no user, no event, no key. What may be told is what `Status` has room for.
Requests are bounded: a line or a header of 8 KiB, 64 headers, no body is read, and a connection that has not sent its
request, or its next one, within `idle_seconds_max` is closed.
"""
import logging
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import msgspec
from aiohttp import web

from stream.errors import UsageError
from stream.metrics import Metrics

PATHS = ('/live', '/ready', '/status', '/metrics')

_LINE_BYTES_MAX = 8 << 10
_HEADERS_MAX = 64
_LINGER_SECONDS = 1.0       # for what a client still sends after its answer
_STOP_SECONDS = 2.0         # for answers that are on their way when the server stops
_HEADERS = {'Cache-Control': 'no-store', 'X-Content-Type-Options': 'nosniff', 'Server': 'stream'}

log = logging.getLogger(__name__)

LaneState = Literal['recovering', 'running', 'holding', 'draining', 'standby']


class LaneStatus(msgspec.Struct):
    """One partition number, as this worker has it.

    step       the newest step that is done
    lag        records left to fold, by input topic
    clock_ms   Unix ms of event time up to which timers have fired; 0: no event yet
    users      in its state
    """

    partition: int
    state: LaneState
    step: int = 0
    lag: dict[str, int] = {}
    clock_ms: int = 0
    users: int = 0
    blocks_in_flight: int = 0


class Status(msgspec.Struct):
    """Everything that `/status` tells."""

    version: str
    group: str
    model: str
    model_sha256: str
    lanes: list[LaneStatus] = []


class Health(Protocol):
    """What the worker knows of itself; the answers must be cheap, they are given on the event loop."""

    def live(self) -> list[str]:
        """Why the worker is dead and has to be restarted; empty while it lives."""
        ...

    def ready(self) -> list[str]:
        """Why events do not flow; empty while they do. A worker that is assigned but not reading is not ready."""
        ...

    def status(self) -> Status: ...


class _Progress(msgspec.Struct):
    """How far one topic partition has come. `lag` is None until it is known; `moved_at` in seconds of the clock."""

    moved_at: float
    position: int = -1
    lag: int | None = None


class AdminServer:
    """Serves `PATHS` on one address.

    port   0: any free port; after `start`, the one that it is
    """

    def __init__(self, host: str, port: int, health: Health, metrics: Metrics, idle_seconds_max: float = 10.0) -> None:
        self.host = host
        self.port = port
        self._health = health
        self._metrics = metrics
        self._idle_seconds_max = idle_seconds_max
        self._runner: web.ServerRunner | None = None
        self._answers: Mapping[str, Callable[[web.BaseRequest], web.Response]] = {
            '/live': lambda _: _verdict('live', self._health.live()),
            '/ready': lambda _: _verdict('ready', self._health.ready()),
            '/status': lambda _: _json(200, self._health.status()),
            '/metrics': self._exposition}

    @property
    def url(self) -> str:
        """Where it answers, without a path."""
        return f'http://{f"[{self.host}]" if ":" in self.host else self.host}:{self.port}'

    async def start(self) -> None:
        """Listen; log where.

        Errors   UsageError where the address is taken or cannot be listened on.
        """
        server = web.Server(
            self._answer, access_log=None, max_line_size=_LINE_BYTES_MAX, max_field_size=_LINE_BYTES_MAX,
            max_headers=_HEADERS_MAX, keepalive_timeout=self._idle_seconds_max, lingering_time=_LINGER_SECONDS)
        runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=_STOP_SECONDS)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except OSError as error:
            await runner.cleanup()
            raise UsageError(
                f'The admin server cannot listen on {self.host}:{self.port}: {error.strerror or error}.',
                'stop what listens there, or set admin_port (0: any free port) and admin_host (an address of this '
                'machine).') from error
        self._runner = runner
        self.port = runner.addresses[0][1]
        log.info('health and metrics: %s (%s)', self.url, ' '.join(PATHS))

    async def stop(self) -> None:
        """Close the address and all connections; nothing happens where it was not started."""
        runner, self._runner = self._runner, None
        if runner:
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        answer = self._answers.get(request.path)
        if answer is None:
            return _json(404, {'error': 'there is no such page', 'pages': PATHS})
        if request.method not in ('GET', 'HEAD'):
            return _json(405, {'error': 'pages can only be read'}, Allow='GET, HEAD')
        return answer(request)

    def _exposition(self, request: web.BaseRequest) -> web.Response:
        text, content_type = self._metrics.exposition(request.headers.get('Accept', ''))
        return web.Response(body=text, headers={**_HEADERS, 'Content-Type': content_type})


def _verdict(what: str, reasons: list[str]) -> web.Response:
    return _json(503 if reasons else 200, {what: not reasons, 'reasons': reasons})


def _json(status: int, value: object, **headers: str) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value) + b'\n',
                        headers={**_HEADERS, 'Content-Type': 'application/json', **headers})
