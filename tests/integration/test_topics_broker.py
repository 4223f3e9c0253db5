"""Topics on a real broker: created, checked, refused."""
import asyncio
import json
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from typer.testing import CliRunner, Result

from deploy.local.parts import Kafka
from stream.cli.main import app
from stream.config import Settings
from stream.errors import KafkaError
from stream.kafka.clients import open_admin
from stream.kafka.topics import Topics, ensure_topics, read_topics, survey, topic_specs


def names(name: str) -> dict[str, str]:
    return {'group': name, 'clicks_topic': f'{name}.clicks', 'carts_topic': f'{name}.carts',
            'alerts_topic': f'{name}.alerts', 'scores_topic': f'{name}.scores', 'dead_letters_topic': f'{name}.dead'}


def shop(kafka: Kafka, name: str, **values: Any) -> Settings:
    return Settings(**({'brokers': kafka.brokers, 'partitions': 3, **names(name)} | values))


def create(given: Settings, *topics: NewTopic) -> None:
    async def run(admin: AIOKafkaAdminClient) -> None:
        response: Any = await admin.create_topics(list(topics))
        assert [error for _, error, _ in response.topic_errors] == [0] * len(topics)
    asyncio.run(with_admin(given, run))


async def with_admin(given: Settings, run: Any) -> Any:
    async with open_admin(given) as admin:
        return await run(admin)


def existing(given: Settings) -> list[str]:
    names = [topic.name for topic in topic_specs(given)]
    return list(asyncio.run(with_admin(given, lambda admin: read_topics(admin, names))))


def command(given: Settings, *arguments: str) -> Result:
    overrides = [f'--set={name}={value}' for name, value in given.model_dump(exclude_defaults=True).items()]
    return CliRunner().invoke(app, ['topics', *overrides, *arguments])


def test_everything_missing_is_created_once_as_it_is_wanted(kafka: Kafka):
    given = shop(kafka, 'topics-new', publish='all', journal_topic='topics-new.journal')
    before = asyncio.run(survey(given, create=False))
    assert len(before.missing) == 7
    assert existing(given) == []
    made = asyncio.run(ensure_topics(given))
    assert sorted(made.created) == sorted(existing(given)) == sorted(topic.name for topic in topic_specs(given))
    assert (made.missing, made.findings) == ([], [])
    for topic in topic_specs(given):
        found = made.found[topic.name]
        assert (found.partitions, found.replication) == (3, 1)
        assert {name: found.config[name] for name in topic.config if name in found.config} == {
            name: value for name, value in topic.config.items() if name in found.config}
    again = asyncio.run(ensure_topics(given))
    assert (again.created, again.findings, again.found) == ([], [], made.found)


def test_two_workers_that_start_together_agree(kafka: Kafka):
    given = shop(kafka, 'topics-race')

    async def run() -> list[Topics]:
        return list(await asyncio.gather(*[ensure_topics(given) for _ in range(4)]))

    found = asyncio.run(run())
    assert all(topics.found == found[0].found and not topics.findings for topics in found)
    assert sorted(name for topics in found for name in topics.created) == sorted(found[0].found)


def test_the_other_input_and_the_changelog_follow_the_input_that_exists(kafka: Kafka):
    given = shop(kafka, 'topics-follow')
    create(given, NewTopic('topics-follow.carts', 5, 1, topic_configs={'cleanup.policy': 'compact'}))
    topics = asyncio.run(ensure_topics(given))
    assert topics.findings == []        # a compacted input is the shop's own affair
    assert [topics.partitions(name) for name in (
        'topics-follow.clicks', 'topics-follow.carts', 'topics-follow-users-changelog', 'topics-follow.alerts')
            ] == [5, 5, 5, 3]


@pytest.mark.parametrize(('name', 'topics', 'message'), [
    ('topics-compacted', [('alerts', 1, 'compact')], 'cleanup.policy is compact, should be delete'),
    ('topics-unequal', [('clicks', 2, 'delete'), ('carts', 4, 'delete')], 'is 2, should be 4, as the other input has'),
])
def test_what_does_not_fit_is_refused_before_anything_is_created(kafka: Kafka, name: str, topics: Any, message: str):
    given = shop(kafka, name)
    create(given, *[NewTopic(f'{name}.{topic}', count, 1, topic_configs={'cleanup.policy': policy})
                    for topic, count, policy in topics])
    with pytest.raises(KafkaError, match=message):      # also while the broker has not heard of them yet
        asyncio.run(ensure_topics(given))
    result = command(given)
    assert isinstance(result.exception, KafkaError)
    assert 'problem' in result.stdout
    assert existing(given) == [f'{name}.{topic}' for topic, _, _ in topics]


def test_more_replicas_than_brokers_say_which_setting_is_wrong(kafka: Kafka):
    given = shop(kafka, 'topics-replicas', replication=3)
    with pytest.raises(KafkaError, match='InvalidReplicationFactor') as caught:
        asyncio.run(ensure_topics(given))
    assert '`replication`' in caught.value.do


def test_the_command_shows_creates_and_repeats(kafka: Kafka):
    given = shop(kafka, 'topics-shown')
    shown = command(given, '--dry-run')
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count('missing') == 5
    assert existing(given) == []
    assert command(given).stdout.count('created') == 5
    again = command(given)
    assert again.stdout.count(' ok ') == 5
    assert '7 days' in again.stdout
    told = json.loads(command(given, '--json').stdout)
    assert told['found']['topics-shown.clicks']['partitions'] == 3
    warned = command(shop(kafka, 'topics-shown', alerts_retention_days=30), '--dry-run')
    assert warned.exit_code == 0
    assert 'warning' in warned.stdout
    assert 'retention.ms is 604800000, should be 2592000000 (alerts_retention_days)' in ' '.join(warned.stderr.split())
