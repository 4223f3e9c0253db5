"""A real broker and a real Triton for every test that asks: started once in a session, gone at its end however it ends.

A machine that cannot run them fails these tests with what to install; nothing is skipped.
"""
from collections.abc import Iterator

import hypothesis
import pytest

from deploy.local.parts import Kafka, Triton

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile('stream', deadline=None)
hypothesis.settings.load_profile('stream')


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
