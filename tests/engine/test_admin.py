import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps

import aiohttp
import pytest

from stream.engine.admin import AdminServer, LaneStatus, Status
from stream.errors import UsageError
from stream.metrics import Metrics

DEADLINE_S = 20


class Reported:
    """A worker's health, as a test wants it."""

    def __init__(self) -> None:
        self.dead: list[str] = []
        self.waits: list[str] = []
        self.lanes = [LaneStatus(3, 'running', 17, {'clicks': 5, 'carts': 0}, 1_700_000_000_000, 12, 2)]

    def live(self) -> list[str]:
        return self.dead

    def ready(self) -> list[str]:
        return self.waits

    def status(self) -> Status:
        return Status('0.1.0', 'stream', 'shopper', 'ab' * 32, self.lanes)


def on_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: object, **named: object) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await test(*arguments, **named)
        asyncio.run(bounded())
    return run


@asynccontextmanager
async def serving(health: Reported, metrics: Metrics | None = None, idle_seconds_max: float = 10.0,
                  ) -> AsyncIterator[AdminServer]:
    server = AdminServer('127.0.0.1', 0, health, metrics or Metrics(), idle_seconds_max)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def asked(server: AdminServer, path: str, method: str = 'GET', **options: object,
                ) -> tuple[int, aiohttp.typedefs.LooseHeaders, bytes]:
    async with aiohttp.ClientSession() as session, session.request(method, server.url + path, **options) as response:
        return response.status, response.headers, await response.read()


async def sent(server: AdminServer, request: bytes) -> bytes:
    """Everything that comes back for these bytes until the server closes the connection."""
    reader, writer = await asyncio.open_connection('127.0.0.1', server.port)
    answer = b''
    with contextlib.suppress(ConnectionError):      # it may close before it has read everything
        writer.write(request)
        await writer.drain()
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(1 << 16):
            answer += chunk
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


@pytest.mark.parametrize(('path', 'list_name'), [('/live', 'dead'), ('/ready', 'waits')])
@on_a_loop
async def test_a_verdict_is_200_or_503_with_its_reasons(path: str, list_name: str):
    health = Reported()
    async with serving(health) as server:
        assert server.port > 0
        status, _, body = await asked(server, path)
        assert (status, json.loads(body)) == (200, {path[1:]: True, 'reasons': []})
        getattr(health, list_name).append('the group has gone')
        status, _, body = await asked(server, path)
        assert (status, json.loads(body)) == (503, {path[1:]: False, 'reasons': ['the group has gone']})


@on_a_loop
async def test_status_tells_partitions_states_and_lags():
    async with serving(Reported()) as server:
        status, headers, body = await asked(server, '/status')
    assert (status, headers['Content-Type']) == (200, 'application/json')
    assert json.loads(body) == {
        'version': '0.1.0', 'group': 'stream', 'model': 'shopper', 'model_sha256': 'ab' * 32, 'lanes': [{
            'partition': 3, 'state': 'running', 'step': 17, 'lag': {'clicks': 5, 'carts': 0},
            'clock_ms': 1_700_000_000_000, 'users': 12, 'blocks_in_flight': 2}]}


@on_a_loop
async def test_metrics_are_those_of_the_worker():
    metrics = Metrics()
    metrics.events_read.inc(42)
    async with serving(Reported(), metrics) as server:
        status, headers, body = await asked(server, '/metrics')
        assert (status, headers['Content-Type'].split(';')[0]) == (200, 'text/plain')
        assert b'stream_events_read_total 42.0\n' in body
        _, headers, body = await asked(server, '/metrics', headers={'Accept': 'application/openmetrics-text'})
        assert headers['Content-Type'].startswith('application/openmetrics-text')
        assert body.endswith(b'# EOF\n')


@pytest.mark.parametrize('path', ['/', '/live/', '/status/users', '/metrics/../etc/passwd', '/%2e%2e/live', '//live'])
@on_a_loop
async def test_other_pages_are_not_there(path: str):
    async with serving(Reported()) as server:
        answer = await sent(server, b'GET ' + path.encode() + b' HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n')
        assert answer.startswith(b'HTTP/1.1 404 ')
        assert b'/ready' in answer


@pytest.mark.parametrize('method', ['POST', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE'])
@on_a_loop
async def test_pages_can_only_be_read(method: str):
    async with serving(Reported()) as server:
        status, headers, _ = await asked(server, '/ready', method)
        assert (status, headers['Allow']) == (405, 'GET, HEAD')
        status, _, body = await asked(server, '/ready', 'HEAD')
        assert (status, body) == (200, b'')


@on_a_loop
async def test_answers_are_not_kept_and_do_not_name_the_server():
    async with serving(Reported()) as server:
        for path in ('/live', '/metrics', '/nowhere'):
            _, headers, _ = await asked(server, path)
            assert headers['Cache-Control'] == 'no-store'
            assert headers['Server'] == 'stream'


@pytest.mark.parametrize('request_bytes', [
    b'GET /' + b'a' * 10_000 + b' HTTP/1.1\r\nHost: h\r\n\r\n',
    b'GET /live HTTP/1.1\r\nHost: h\r\nCookie: ' + b'a' * 10_000 + b'\r\n\r\n',
    b'GET /live HTTP/1.1\r\nHost: h\r\n' + b''.join(b'X-%d: y\r\n' % n for n in range(200)) + b'\r\n',
    b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
], ids=['line', 'header', 'headers', 'tls'])
@on_a_loop
async def test_an_oversized_or_foreign_request_is_refused_and_the_server_goes_on(request_bytes: bytes):
    async with serving(Reported(), idle_seconds_max=0.2) as server:
        assert (await sent(server, request_bytes))[:12] in (b'HTTP/1.1 400', b'HTTP/1.0 400')
        assert (await asked(server, '/live'))[0] == 200


@on_a_loop
async def test_a_body_is_not_read():
    async with serving(Reported()) as server:
        answer = await sent(server, b'POST /live HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n'
                                    + b'a' * (1 << 20))
        assert answer.startswith(b'HTTP/1.1 405 ')


@pytest.mark.parametrize('beginning', [b'', b'GET /live', b'GET /live HTTP/1.1\r\nHost: h\r\n'])
@on_a_loop
async def test_a_request_that_does_not_come_costs_no_connection(beginning: bytes):
    async with serving(Reported(), idle_seconds_max=0.2) as server:
        assert await sent(server, beginning) == b''     # ends at all: the server has closed it
        assert (await asked(server, '/live'))[0] == 200


@on_a_loop
async def test_a_connection_is_kept_for_the_next_question_and_then_closed():
    async with serving(Reported(), idle_seconds_max=0.2) as server:
        answer = await sent(server, b'GET /live HTTP/1.1\r\nHost: h\r\n\r\n' * 2)
        assert answer.count(b'HTTP/1.1 200 OK') == 2


@on_a_loop
async def test_an_address_that_is_taken_says_what_to_do():
    async with serving(Reported()) as server:
        again = AdminServer('127.0.0.1', server.port, Reported(), Metrics())
        with pytest.raises(UsageError, match=rf'127\.0\.0\.1:{server.port}.*Do: .*admin_port') as raised:
            await again.start()
        assert 'in use' in raised.value.problem
        await again.stop()


@on_a_loop
async def test_an_address_of_another_machine_says_what_to_do():
    with pytest.raises(UsageError, match=r'Do: .*admin_host'):
        await AdminServer('192.0.2.1', 0, Reported(), Metrics()).start()


@on_a_loop
async def test_stopping_frees_the_address_and_ends_open_connections():
    async with serving(Reported()) as server:
        reader, writer = await asyncio.open_connection('127.0.0.1', server.port)
        writer.write(b'GET /live HTTP/1.1\r\nHost: h\r\n\r\n')
        assert (await reader.readuntil(b'}\n')).startswith(b'HTTP/1.1 200')
    assert await reader.read() == b''
    writer.close()
    await writer.wait_closed()
    with socket.socket() as probe:
        assert probe.connect_ex(('127.0.0.1', server.port)) != 0
