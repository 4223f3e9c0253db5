"""The worker's HTTP server for orchestrators and monitoring: health, readiness, status and metrics.

    /live      200 while the worker lives; 503 if it must be restarted
    /ready     200 while events flow; 503 with the reasons if they do not
    /status    partitions, states and lags as JSON
    /metrics   Prometheus, or OpenMetrics if the request asks for it

No answer holds data of the shop: no user, no event, no key. `Status` lists everything that is told.

Requests are bounded. A line or a header has at most 8 KiB, a request at most 64 headers, and bodies are not read. A
connection is closed if its first or next request does not come within `idle_seconds_max`.
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
_LINGER_SECONDS = 1.0       # time to read what a client still sends after its answer
_STOP_SECONDS = 2.0         # time for answers in flight when the server stops
_HEADERS = {'Cache-Control': 'no-store', 'X-Content-Type-Options': 'nosniff', 'Server': 'stream'}

log = logging.getLogger(__name__)

LaneState = Literal['recovering', 'running', 'holding', 'standby']


class LaneStatus(msgspec.Struct):
    """The state of one partition number in this worker.

    step       the newest step that is done
    lag        records not folded yet, by input topic
    clock_ms   Unix ms of event time up to which timers have fired; 0: no event yet
    users      in the state
    """

    partition: int
    state: LaneState
    step: int = 0
    lag: dict[str, int] = {}
    clock_ms: int = 0
    users: int = 0
    blocks_in_flight: int = 0


class Status(msgspec.Struct):
    """The answer of `/status`."""

    version: str
    group: str
    model: str
    model_sha256: str
    lanes: list[LaneStatus] = []


class Health(Protocol):
    """What the worker says about itself. It is asked on the event loop, so every answer must be cheap."""

    def live(self) -> list[str]:
        """Reasons why the worker must be restarted; empty while it lives."""
        ...

    def ready(self) -> list[str]:
        """Reasons why events do not flow; empty while they do.

        A worker that has partitions but does not read them is not ready.
        """
        ...

    def status(self) -> Status: ...


class AdminServer:
    """Serves `PATHS` on one address.

    port   0: any free port; after `start`, the port in use
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
        """The address of the server, without a path."""
        return f'http://{f"[{self.host}]" if ":" in self.host else self.host}:{self.port}'

    async def start(self) -> None:
        """Listen, and log the address.

        Errors   UsageError if the address is in use or cannot be listened on.
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
        """Close the address and all connections. Does nothing if it was not started."""
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
