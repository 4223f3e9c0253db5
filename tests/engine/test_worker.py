"""How a worker starts and stops if something fails, without Kafka."""
import asyncio
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.local.processes import free_ports
from stream.config import Settings
from stream.engine import worker
from stream.errors import KafkaError


class Part:
    """Stands for the app, the assignment or the publisher. `log` gets its name when it begins to stop."""

    def __init__(self, name: str, log: list[str], error: Exception | None = None, seconds: float = 0) -> None:
        self._name, self._log, self._error, self._seconds = name, log, error, seconds

    async def stop(self) -> None:
        self._log.append(self._name)
        await asyncio.sleep(self._seconds)
        if self._error is not None:
            raise self._error

    close = stop


def stop(app: Any, assignment: Any, publisher: Any, timeout_s: float = 5) -> None:
    asyncio.run(worker._stop(app, assignment, publisher, timeout_s))


def test_lanes_can_send_until_they_are_closed(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    log: list[str] = []
    stop(Part('app', log), Part('assignment', log), Part('publisher', log))
    assert log == ['app', 'assignment', 'publisher']
    assert caplog.messages == ['stopping', 'stopped; all finished work is committed']


def test_the_rest_is_closed_if_a_part_fails_and_the_first_error_is_logged(caplog: pytest.LogCaptureFixture):
    log: list[str] = []
    stop(Part('app', log, OSError('first')), Part('assignment', log, OSError('second')), Part('publisher', log))
    assert log == ['app', 'assignment', 'publisher']
    message, = caplog.messages
    assert message.startswith("stopping failed: OSError('first');")


def test_a_worker_that_gave_up_stopping_begins_to_stop_nothing_more(caplog: pytest.LogCaptureFixture):
    """The end of the event loop cancels what is left. It would wait for whatever begins after that."""
    log: list[str] = []
    began = time.monotonic()
    stop(Part('app', log, seconds=20), Part('assignment', log, seconds=20), Part('publisher', log, seconds=20),
         timeout_s=.1)
    assert log == ['app']
    assert time.monotonic() - began < 10
    assert 'did not stop within' in caplog.text


def test_brokers_that_vanish_before_the_join_end_the_worker_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
):
    async def topics(settings: Settings) -> Any:
        return SimpleNamespace(warnings=[], found={settings.clicks_topic: SimpleNamespace(partitions=2)})

    monkeypatch.setattr(worker, 'ensure_topics', topics)
    caplog.set_level(logging.INFO, 'stream.engine.worker')
    admin, nobody = free_ports(2)
    settings = Settings(brokers=f'127.0.0.1:{nobody}', scorer='constant', state_dir=tmp_path, admin_port=admin)
    with pytest.raises(KafkaError, match=r'Joining the group: .*Do: check that the brokers run'):
        asyncio.run(worker.run(settings))
    assert caplog.messages[-1] == 'stopped; all finished work is committed'
