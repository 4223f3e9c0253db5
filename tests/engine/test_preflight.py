"""The checks before a start that need no broker; those that do are in tests/integration/test_check_broker.py."""
import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from stream.config import Settings
from stream.core.partitioners import detect, partition
from stream.engine.preflight import CheckResult, partitioner_result, run_checks
from stream.errors import KafkaError, ModelError, UsageError

MODEL = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'


def lines(**values: Any) -> dict[str, CheckResult]:
    """The worst line of each check, of a machine without a broker."""
    async def run() -> list[CheckResult]:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            closed = f'127.0.0.1:{probe.getsockname()[1]}'
        given = Settings(**({'brokers': closed, 'model': MODEL, 'admin_port': 0} | values))
        return [line async for line in run_checks(given)]

    order = ['ok', 'warning', 'problem']
    return {line.check: line for line in sorted(asyncio.run(run()), key=lambda line: order.index(line.outcome))}


def test_without_a_broker_everything_else_is_checked(tmp_path: Path):
    found = lines(state_dir=tmp_path / 'state')
    assert list(found) == ['settings', 'model', 'state', 'admin port', 'brokers']
    assert {name: line.outcome for name, line in found.items() if name != 'brokers'} == dict.fromkeys(
        ['settings', 'model', 'state', 'admin port'], 'ok')
    assert (found['brokers'].outcome, found['brokers'].exit_code) == ('problem', KafkaError.exit_code)
    assert 'start Kafka' in found['brokers'].do
    assert not (tmp_path / 'state').exists()


def test_settings_that_do_not_fit_each_other(monkeypatch: pytest.MonkeyPatch):
    assert 'same scores' in lines(scorer='constant')['settings'].text
    assert 'session_timeout_ms' in lines(session_timeout_ms=300_000)['settings'].text
    assert lines(brokers='nowhere')['settings'].exit_code == UsageError.exit_code
    monkeypatch.setenv('STREAM_BROKER', 'x')
    assert 'STREAM_BROKER' in lines()['settings'].text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(MODEL.parent, tmp_path / 'shopper')
    return tmp_path / 'shopper' / '1'


def test_the_model_folder_is_verified_with_its_repository_files(model: Path):
    assert lines(model=model)['model'].outcome == 'ok'
    config = model.parent / 'config.pbtxt'
    config.write_text(config.read_text() + '\n')
    assert lines(model=model)['model'].outcome == 'warning'
    shutil.copy(MODEL.parent / 'config.pbtxt', config)
    (model.parent / 'warmup' / '8.numbers').write_bytes(b'')
    assert lines(model=model)['model'].outcome == 'warning'
    config.unlink()
    assert lines(model=model)['model'].exit_code == ModelError.exit_code
    assert 'span differs' in lines(window_span_days=30)['model'].text
    with (model / 'model.onnx').open('r+b') as file:
        file.write(b'x')
    assert 'SHA-256 differs' in lines(model=model)['model'].text
    assert 'no model' in lines(model=model.parent)['model'].text


def test_triton_that_is_away_is_a_problem():
    found = lines(scorer='triton', triton='127.0.0.1:1')['triton']
    assert found.exit_code == ModelError.exit_code
    assert '127.0.0.1:1' in found.text
    assert 'triton' not in lines()


def test_a_state_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / 'file').write_text('')
    assert lines(state_dir=tmp_path / 'file')['state'].exit_code == UsageError.exit_code
    assert lines(state_dir=tmp_path / 'file' / 'state')['state'].outcome == 'problem'
    assert lines(state_dir=tmp_path)['state'].outcome == 'ok'


def test_a_port_that_is_taken():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        taken.settimeout(0.1)       # whoever asks what is there is left without an answer
        found = lines(admin_port=port)['admin port']
        assert found.exit_code == UsageError.exit_code
        assert f'127.0.0.1:{port}' in found.text
    assert lines(admin_port=port)['admin port'].outcome == 'ok'
    assert lines(admin_host='192.0.2.1', admin_port=port)['admin port'].outcome == 'problem'


def judged(setting: Any, keys: list[tuple[bytes, int]], partitions: int = 8) -> CheckResult:
    return partitioner_result(Settings(partitioner=setting), 'clicks', detect(keys, partitions), partitions)


def test_the_partitioner_is_compared_with_the_setting():
    by_crc32 = [(key, partition('crc32', key, 8)) for key in (b'u%d' % number for number in range(200))]
    assert judged('crc32', by_crc32).outcome == 'ok'
    wrong = judged('murmur2', by_crc32)
    assert (wrong.outcome, wrong.exit_code) == ('problem', UsageError.exit_code)
    assert 'partitioner = "crc32", which fits 100.0 %' in wrong.do
    assert 'set partitioner = "crc32"' in judged('none', by_crc32).do
    stray = [(b'u1', (by_crc32[1][1] + 1) % 8), *by_crc32]
    assert judged('crc32', stray).outcome == 'warning'
    assert '0.5 %' in judged('crc32', stray).text
    assert judged('murmur2', by_crc32[:5]).outcome == 'ok'
    assert 'too few' in judged('murmur2', by_crc32[:5]).text
    assert 'every partitioner agrees' in judged('murmur2', [(b'u1', 0)] * 100, partitions=1).text
    by_turns = [(b'u%d' % number, number % 8) for number in range(200)]
    assert judged('murmur2', by_turns).outcome == 'problem'
    assert judged('none', by_turns).outcome == 'ok'
