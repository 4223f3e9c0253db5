"""The checks before a start, with a real broker and a real Triton."""
import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from typer.testing import CliRunner

from deploy.local.parts import Kafka, Triton
from stream.cli.main import app
from stream.config import Settings
from stream.core.partitioners import partition
from stream.engine.preflight import CheckResult, run_checks
from stream.errors import KafkaError, UsageError
from stream.kafka.clients import client_arguments, open_producer
from stream.kafka.topics import ensure_topics
from tests.integration.test_topics_broker import existing, shop

MODEL = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'


def checked(given: Settings, during: Callable[[], AbstractAsyncContextManager[Any]] | None = None) -> list[CheckResult]:
    async def run() -> list[CheckResult]:
        if during is None:
            return [line async for line in run_checks(given)]
        async with during():
            return [line async for line in run_checks(given)]
    return asyncio.run(run())


def of(lines: list[CheckResult], name: str) -> list[tuple[str, str]]:
    return [(line.outcome, line.text) for line in lines if line.check == name]


def ready(kafka: Kafka, name: str, **values: Any) -> Settings:
    given = shop(kafka, name, model=MODEL, admin_port=0, **values)
    asyncio.run(ensure_topics(given))
    return given


def test_a_machine_that_is_ready_has_nothing_but_oks_and_stays_as_it_is(kafka: Kafka):
    given = shop(kafka, 'check-ready', model=MODEL, admin_port=0)
    fresh = checked(given)
    assert [outcome for outcome, _ in of(fresh, 'topics')] == ['warning'] * 5
    assert existing(given) == []
    asyncio.run(ensure_topics(given))
    lines = checked(given)
    assert {line.outcome for line in lines} == {'ok'}, lines
    assert [line.check for line in lines] == ['settings', 'brokers', 'topics', 'partitioner', 'partitioner', 'group',
                                              'model', 'state', 'admin port']
    assert of(lines, 'brokers') == [('ok', f'1 of 1 reached: {kafka.brokers}.')]


def send(given: Settings, topic: str, keys: list[bytes | None], place: Callable[[bytes | None], int]) -> None:
    async def run() -> None:
        async with open_producer(given, 'test') as producer:
            await asyncio.gather(*[await producer.send(topic, b'{}', key=key, partition=place(key)) for key in keys])
    asyncio.run(run())


def test_the_partitioner_of_the_newest_records_is_found_out(kafka: Kafka):
    given = ready(kafka, 'check-keys')
    keys: list[bytes | None] = [b'u%d' % number for number in range(300)]
    send(given, given.clicks_topic, keys, lambda key: partition('crc32', key or b'', 3))
    send(given, given.carts_topic, [*keys, None, None], lambda key: partition('murmur2', key or b'', 3))
    lines = checked(given)
    [problem, nameless, fine] = [line for line in lines if line.check == 'partitioner']
    assert (problem.outcome, problem.exit_code) == ('problem', UsageError.exit_code)
    assert '300 keys of check-keys.clicks' in problem.text
    assert 'partitioner = "crc32"' in problem.do
    assert '2 of the newest 302 records of check-keys.carts have no key' in nameless.text
    assert fine.outcome == 'ok'


def test_a_group_that_others_use_is_a_problem_and_ones_own_is_not(kafka: Kafka):
    given = ready(kafka, 'check-group')

    def member(client: str, topic: str) -> Any:
        @asynccontextmanager
        async def joined():
            consumer = AIOKafkaConsumer(topic, **(client_arguments(given) | {'client_id': client}),
                                        group_id=given.group, enable_auto_commit=False)
            await consumer.start()
            try:
                yield
                for tp in consumer.assignment():        # without a position there is nothing to commit
                    await consumer.position(tp)
                await consumer.commit()
            finally:
                await consumer.stop()
        return joined

    ours = client_arguments(given)['client_id']
    assert of(checked(given, member(ours, given.clicks_topic)), 'group') == [
        ('ok', 'check-group: 1 worker is running.')]
    assert of(checked(given), 'group') == [('ok', 'check-group: no worker is running. It has committed offsets.')]
    [(outcome, text)] = of(checked(given, member('somebody', given.alerts_topic)), 'group')
    assert (outcome, text) == ('problem', 'The group check-group is in use by clients somebody.')
    [(outcome, text), _] = of(checked(given), 'group')
    assert outcome == 'warning'
    assert 'committed offsets of check-group.alerts' in text


def test_the_command_ends_with_the_code_of_the_first_problem(kafka: Kafka):
    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        result = CliRunner().invoke(app, ['check', '--json', f'--set=model={MODEL}', '--set=admin_port=0', *arguments])
        return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()]

    code, lines = run(f'--set=brokers={kafka.brokers}', '--set=group=check-command')
    assert code == 0
    assert 'problem' not in {line['outcome'] for line in lines}
    code, lines = run('--set=brokers=127.0.0.1:1', '--set=state_dir=/proc/no')
    assert code == KafkaError.exit_code
    assert [line['check'] for line in lines if line['outcome'] == 'problem'] == ['brokers', 'state']
    assert run('--set=nonsense=1')[0] == UsageError.exit_code
    shown = CliRunner().invoke(app, ['check', '--set=brokers=127.0.0.1:1', f'--set=model={MODEL}'])
    assert 'problem brokers' in shown.stdout
    assert 'Do: start Kafka' in shown.stdout


def test_triton_is_asked_for_its_model(kafka: Kafka, triton: Triton):
    given = ready(kafka, 'check-triton', scorer='triton', triton=triton.address)
    assert of(checked(given), 'triton') == [('ok', f'{triton.address} has shopper version 1 ready.')]


@pytest.mark.parametrize('topics', [['clicks'], ['clicks', 'carts']])
def test_inputs_without_records_say_that_there_are_too_few(kafka: Kafka, topics: list[str]):
    given = shop(kafka, f'check-empty-{len(topics)}', model=MODEL, admin_port=0)
    if len(topics) == 2:
        asyncio.run(ensure_topics(given))
    texts = [text for _, text in of(checked(given), 'partitioner')]
    assert texts == ([f'0 keys of {given.clicks_topic} are too few to tell; 13 are needed.',
                      f'0 keys of {given.carts_topic} are too few to tell; 13 are needed.'] if len(topics) == 2 else [])
