"""A real broker and a real Triton for the tests that ask for them. A session starts each once, and always stops it.

On a machine that cannot run them, these tests fail and say what to install.

A few tests skip if the machine lacks something. `tests/skips.py` lists all of them with the reasons.
"""
# ruff: noqa: E402  (the libraries read the number of threads when they are imported)
import os

# One thread for matrix products. The tests' matrices are tiny, so a second thread only waits for the first one. If
# another process occupies its core, it waits for a whole time slice at each product. Processes that tests start inherit
# this.
for _variable in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(_variable, '1')

from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from deploy.local.parts import Kafka, Triton
from stream.state.store import Memory, PartitionStore
from tests.skips import may_skip

# The time of an example depends on how busy the machine is, so it has no limit.
hypothesis.settings.register_profile('stream', deadline=None)
hypothesis.settings.load_profile('stream')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skips but is not listed fails."""
    report = yield
    if report.skipped and not hasattr(report, 'wasxfail'):
        reason = report.longrepr[2].removeprefix('Skipped: ')
        if not may_skip(item.nodeid, reason):
            report.outcome = 'failed'
            report.longrepr = f'{item.nodeid} skips: {reason}. Do: list it in tests/skips.py, or let it run.'
    return report


@pytest.fixture(scope='session')
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """`.brokers` is host:port. It is shared: use topics and groups of your own, and leave it running."""
    with Kafka(tmp_path_factory.mktemp('parts') / 'kafka') as part:
        yield part


@pytest.fixture(scope='session')
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """`.address` is host:port of its gRPC service, with the shipped model. It is shared: leave it running."""
    with Triton(tmp_path_factory.mktemp('parts') / 'triton') as part:
        yield part


@pytest.fixture(scope='module')
def memory() -> Memory:
    """Cache and write buffers of a module's stores."""
    return Memory(16, 16)


@pytest.fixture
def store(tmp_path: Path, memory: Memory) -> PartitionStore:
    """The empty store of partition 0."""
    return PartitionStore(tmp_path / 'users-0', memory)
