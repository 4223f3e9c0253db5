"""The topics that the settings ask for, and how existing ones differ; without a broker."""
from typing import Any

import pytest

from stream.config import Settings
from stream.core.layout import DAY, DAY_MS, DAYS_KEPT, HEADER, ROW
from stream.core.user import User, encode
from stream.errors import KafkaError, UsageError
from stream.kafka.topics import (
    BROKER_RECORD_BYTES_MAX,
    DEAD_LETTER_MORE_BYTES,
    Found,
    Topics,
    as_error,
    changelog_record_bytes_max,
    compare,
    topic_specs,
)

MIB = str(BROKER_RECORD_BYTES_MAX)
DEFAULTS = {'cleanup.policy': 'delete', 'retention.ms': str(7 * DAY_MS), 'max.message.bytes': MIB,
            'min.compaction.lag.ms': '0'}


def settings(**values: Any) -> Settings:
    return Settings(**({'group': 'shop'} | values))


def fitting(given: Settings, partitions: int = 8) -> dict[str, Found]:
    """Topics as they are after a worker has created them."""
    return {topic.name: Found(partitions, given.replication, DEFAULTS | topic.config)
            for topic in topic_specs(given)}


def changed(topics: dict[str, Found], name: str, partitions: int | None = None, **config: str) -> dict[str, Found]:
    there = topics[name]
    more = {key.replace('_', '.'): value for key, value in config.items()}
    return topics | {name: Found(partitions or there.partitions, there.replication, there.config | more)}


def told(given: Settings, topics: dict[str, Found]) -> list[tuple[str, str, str]]:
    missing, findings = compare(given, topics)
    assert missing == []
    return [(finding.level, finding.topic, finding.what) for finding in findings]


def test_what_a_worker_creates_fits_it():
    given = settings(publish='all', journal_topic='journal', replication=3)
    assert list(fitting(given)) == ['clicks', 'carts', 'alerts', 'dead-letters', 'shop-users-changelog', 'scores',
                                    'journal']
    assert told(given, fitting(given)) == []


def test_topics_that_are_not_used_are_not_asked_for():
    assert {topic.role for topic in topic_specs(settings())} == {'input', 'alerts', 'dead letters', 'changelog'}


def test_missing_topics_are_created_with_the_partitions_of_the_input_that_exists():
    given = settings(partitions=4)
    missing, findings = compare(given, {'carts': Found(12, 1, DEFAULTS)})
    assert findings == []
    assert {entry.spec.name: entry.partitions for entry in missing} == {
        'clicks': 12, 'shop-users-changelog': 12, 'alerts': 4, 'dead-letters': 4}
    assert {entry.partitions for entry in compare(given, {})[0]} == {4}


def test_inputs_need_one_partition_count_and_the_changelog_theirs():
    given = settings()
    topics = changed(fitting(given), 'clicks', partitions=6)
    assert told(given, topics) == [('problem', 'clicks', 'the number of partitions')]
    topics = changed(fitting(given), 'shop-users-changelog', partitions=6)
    assert told(given, topics) == [('problem', 'shop-users-changelog', 'the number of partitions')]
    assert told(given, changed(fitting(given), 'alerts', partitions=3)) == []


@pytest.mark.parametrize(('topic', 'policy', 'level'), [
    ('alerts', 'compact', 'problem'), ('alerts', 'compact,delete', 'problem'), ('dead-letters', 'compact', 'problem'),
    ('journal', 'compact', 'problem'), ('shop-users-changelog', 'delete', 'problem'),
    ('shop-users-changelog', 'compact,delete', 'problem'), ('scores', 'delete', 'warning'), ('clicks', 'compact', None),
])
def test_cleanup_policies(topic: str, policy: str, level: str | None):
    given = settings(publish='all', journal_topic='journal')
    topics = changed(fitting(given), topic, cleanup_policy=policy)
    assert told(given, topics) == ([(level, topic, 'cleanup.policy')] if level else [])


def test_a_problem_names_topic_value_target_and_what_to_do():
    given = settings(brokers='one:9092')
    topics = changed(fitting(given), 'alerts', cleanup_policy='compact')
    topics = changed(topics, 'shop-users-changelog', cleanup_policy='delete')
    error = as_error(Topics(topics, [], *compare(given, topics)))
    assert isinstance(error, KafkaError)
    assert 'The topic alerts: cleanup.policy is compact, should be delete (' in error.problem
    assert 'The topic shop-users-changelog: cleanup.policy is delete, should be compact (' in error.problem
    assert ('`kafka-configs.sh --bootstrap-server one:9092 --alter --topic alerts --add-config cleanup.policy=delete`; '
            in error.do)


def test_retention_lag_and_replication_that_are_too_small_are_warnings():
    given = settings(replication=2, alerts_retention_days=30)
    topics = changed(fitting(given), 'alerts', retention_ms=str(7 * DAY_MS))
    assert told(given, topics) == [('warning', 'alerts', 'retention.ms')]
    assert told(given, changed(topics, 'alerts', retention_ms='-1')) == []
    assert told(given, changed(topics, 'alerts', retention_ms=str(31 * DAY_MS))) == []
    topics = changed(fitting(given), 'shop-users-changelog', min_compaction_lag_ms='1000')
    assert told(given, topics) == [('warning', 'shop-users-changelog', 'min.compaction.lag.ms')]
    topics = fitting(given) | {'clicks': Found(8, 1, DEFAULTS)}
    assert told(given, topics) == [('warning', 'clicks', 'the replication factor')]


def test_a_configuration_that_is_hidden_is_said_so():
    given = settings()
    topics = fitting(given) | {'alerts': Found(8, 1, {})}
    assert told(given, topics) == [('warning', 'alerts', 'the configuration')]


def test_the_changelog_takes_the_largest_record():
    assert changelog_record_bytes_max(settings()) == BROKER_RECORD_BYTES_MAX
    large = settings(window_events_max=65_535)
    user = User('ada')
    user.days = bytearray(DAYS_KEPT * DAY.size)
    user.ids, user.rows = bytearray(65_535 * 8), bytearray(65_535 * ROW.size)
    user.outbox = bytes(20_000)
    assert len(encode(user)) > HEADER.size + 65_535 * 32
    assert len(encode(user)) <= changelog_record_bytes_max(large) <= len(encode(user)) + 10_000
    events = settings(publish='events')
    assert changelog_record_bytes_max(events) > 4_096 * events.block_events_max
    assert changelog_record_bytes_max(settings(publish='events', block_events_max=100_000)) == 64 << 20
    topics = changed(fitting(large), 'shop-users-changelog', max_message_bytes=MIB)
    assert told(large, topics) == [('problem', 'shop-users-changelog', 'max.message.bytes')]


def test_a_dead_letter_is_larger_than_the_record_that_it_was():
    given = settings()
    topics = changed(fitting(given), 'carts', max_message_bytes=str(3 << 20))
    assert told(given, topics) == [('warning', 'dead-letters', 'max.message.bytes')]
    enough = str((3 << 20) + DEAD_LETTER_MORE_BYTES)
    assert told(given, changed(topics, 'dead-letters', max_message_bytes=enough)) == []
    del topics['dead-letters']
    [entry], _ = compare(given, topics)
    assert entry.spec.config['max.message.bytes'] == enough


@pytest.mark.parametrize(('values', 'message'), [
    ({'alerts_topic': 'clicks'}, 'Two settings name the topic clicks'),
    ({'dead_letters_topic': 'shop-users-changelog'}, 'Two settings'),
    ({'journal_topic': 'a journal'}, "'a journal' cannot be the name"),
    ({'journal_topic': '.'}, 'cannot be the name'),
])
def test_names_that_cannot_be_are_refused(values: dict[str, str], message: str):
    with pytest.raises(UsageError, match=message):
        topic_specs(settings(**values))


def test_partitions_of_a_topic_that_is_not_there():
    topics = Topics({'clicks': Found(8, 1, {})}, [], [], [])
    assert topics.partitions('clicks') == 8
    with pytest.raises(KafkaError, match='There is no topic carts'):
        topics.partitions('carts')
