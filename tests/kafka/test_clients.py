"""Settings to Kafka clients, and Kafka's errors to ones that say what to do; without a broker."""
import asyncio
import logging
import socket
import time

import pytest
from aiokafka import errors as broker_errors

from stream.config import Settings
from stream.errors import KafkaError, UsageError
from stream.kafka.clients import bootstrap_servers, client_arguments, kafka_errors, open_admin, open_producer


def settings(brokers: str) -> Settings:
    return Settings(brokers=brokers, group='shop')


def test_brokers_become_a_list():
    assert bootstrap_servers(settings('one:9092, two:9093,[::1]:9094')) == ['one:9092', 'two:9093', '[::1]:9094']
    assert client_arguments(settings('one:9092')) == {'bootstrap_servers': ['one:9092'],
                                                      'client_id': 'stream-shop-worker'}


@pytest.mark.parametrize('brokers', ['one', 'one:', ':9092', 'one:port', 'one:0', 'one:65536', ' , '])
def test_what_is_no_address_is_refused(brokers: str):
    with pytest.raises(UsageError, match='brokers'):
        bootstrap_servers(settings(brokers))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize('opened', [open_admin, lambda given: open_producer(given, 'test')])
def test_a_missing_broker_is_one_error_and_no_noise(opened, caplog: pytest.LogCaptureFixture):
    async def run() -> None:
        async with opened(settings(f'127.0.0.1:{closed_port()}')):
            raise AssertionError('nobody listens there')

    caplog.set_level(logging.DEBUG)
    with pytest.raises(KafkaError, match=r'No broker of 127.0.0.1:\d+ answers \(.*Connect call failed') as caught:
        asyncio.run(run())
    assert 'start Kafka' in caught.value.do
    assert [record for record in caplog.records if record.name.startswith('aiokafka')] == []
    logging.getLogger('aiokafka').warning('later')
    assert 'later' in caplog.text       # kept back only while the client is open


def test_a_broker_that_says_nothing_is_given_up():
    async def run() -> None:
        async with open_admin(settings(f'127.0.0.1:{silent.getsockname()[1]}'), timeout_ms=300):
            raise AssertionError('nobody answers there')

    with socket.create_server(('127.0.0.1', 0)) as silent:
        started = time.monotonic()
        with pytest.raises(KafkaError, match='answers'):
            asyncio.run(run())
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(('error', 'do'), [
    (broker_errors.TopicAuthorizationFailedError('alerts'), 'grant'),
    (broker_errors.UnknownTopicOrPartitionError('alerts'), 'stream topics'),
    (broker_errors.InvalidReplicationFactorError('3'), '`replication`'),
    (broker_errors.MessageSizeTooLargeError('big'), 'max.message.bytes'),
    (broker_errors.InvalidTimestampError('2090'), 'message.timestamp.after.max.ms'),
    (broker_errors.KafkaTimeoutError(), 'that the brokers run'),
    (broker_errors.UnknownError('?'), 'log'),
])
def test_errors_of_kafka_say_what_to_do(error: Exception, do: str):
    with pytest.raises(KafkaError, match=r'^Reading: ') as caught, kafka_errors('Reading'):
        raise error
    assert do in caught.value.do
    assert 'KafkaTimeoutError' not in caught.value.problem      # that would be a name for its developers
