"""The worker's topics: created where they are missing, checked where they exist.

    topic           partitions         cleanup.policy   also
    clicks, carts   the same count     the shop's own   compacted inputs are fine
    changelog       as the inputs      compact          min.compaction.lag.ms, max.message.bytes for the largest record
    alerts          any                delete, only     retention.ms: compacting by user would drop every kind but one
    scores          any                compact          only where `publish` is not `changes`
    dead letters    any                delete, only     a null value, kept as it came, is what compaction deletes
    journal         any                delete, only     only where the setting names it

`compare` is pure: what there is and what is wanted in, findings out. A problem stops a worker before it reads anything;
with a warning it can go on. Nothing that exists is altered: a topic may have other users.
"""
import asyncio
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code

from stream.config import Settings
from stream.core.layout import DAY, DAY_MS, DAYS_KEPT, HEADER, HOUR_MS, ROW
from stream.errors import KafkaError, UsageError
from stream.kafka.clients import as_kafka_error, open_admin

COMPACTION_LAG_MS = HOUR_MS             # longer than the longest pause of a worker that is still alive
CHANGELOG_SEGMENT_BYTES = 100 << 20     # the newest segment is never compacted, and is read whole at recovery
BROKER_RECORD_BYTES_MAX = 1_048_588     # the brokers' own default of max.message.bytes
DEAD_LETTER_MORE_BYTES = 64 << 10       # what a dead letter's key and headers add to the record as it came
_RECORD_BYTES_CEILING = 64 << 20        # a request may have 100 MiB (socket.request.max.bytes)
_ID_BYTES = 8
_DECISION_BYTES_MAX, _DECISIONS_MAX = 8_192, 3      # a message with all its reasons; kinds of decisions in one step
_SCORES_MESSAGE_BYTES_MAX = 4_096                   # two ids of 256 characters, each as long as JSON can make them
_READY_TIMEOUT_S = 30
_CONFIGS = ('cleanup.policy', 'retention.ms', 'max.message.bytes', 'min.compaction.lag.ms', 'message.timestamp.type',
            'message.timestamp.after.max.ms')
_NAME = re.compile(r'[A-Za-z0-9._-]{1,249}')

Role = Literal['input', 'alerts', 'scores', 'dead letters', 'journal', 'changelog']


class Wanted(msgspec.Struct, frozen=True):
    """A topic as the settings ask for it; `config` is what it is created with."""

    name: str
    role: Role
    config: dict[str, str]


class Found(msgspec.Struct, frozen=True):
    """A topic as it is: that of its configuration which matters here, empty where it may not be read."""

    partitions: int
    replication: int
    config: dict[str, str]


class Missing(msgspec.Struct, frozen=True):
    """A topic that is to be created with so many partitions."""

    wanted: Wanted
    partitions: int


class Finding(msgspec.Struct, frozen=True):
    """One difference: `what` of `topic` is `found`, `wanted` is another value."""

    level: Literal['warning', 'problem']
    topic: str
    what: str
    found: str
    wanted: str
    do: str

    @property
    def problem(self) -> str:
        """One sentence, without what to do."""
        return f'The topic {self.topic}: {self.what} is {self.found}, wanted {self.wanted}.'


class Topics(msgspec.Struct):
    """What there is, what is missing, and what does not fit.

    found     by name; a topic that was just created is here
    created   names of those
    missing   topics that are not there; none after creation
    """

    found: dict[str, Found]
    created: list[str]
    missing: list[Missing]
    findings: list[Finding]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == 'warning']

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == 'problem']

    def partitions(self, name: str) -> int:
        """Partitions of a topic; KafkaError where it does not exist."""
        if name not in self.found:
            raise KafkaError(f'There is no topic {name}.', "check the name; `stream topics` creates the worker's own.")
        return self.found[name].partitions


def changelog_topic(settings: Settings) -> str:
    """Name of the topic that keeps every user's newest record."""
    return f'{settings.group}-users-changelog'


def changelog_record_bytes_max(settings: Settings) -> int:
    """An upper bound of a user's record, and what max.message.bytes of the changelog must allow, in bytes.

    A full window, all day buckets, and an outbox with the messages of one step. Rounded up to at least 1 MiB, so that
    several records share a batch.
    """
    record = HEADER.size + DAYS_KEPT * DAY.size + settings.window_events_max * (_ID_BYTES + ROW.size)
    scores = {'changes': 0, 'all': 1, 'events': settings.block_events_max}[settings.publish]
    outbox = _DECISIONS_MAX * _DECISION_BYTES_MAX + scores * _SCORES_MESSAGE_BYTES_MAX
    return min(max(record + outbox, BROKER_RECORD_BYTES_MAX), _RECORD_BYTES_CEILING)


def wanted_topics(settings: Settings, input_bytes_max: int = BROKER_RECORD_BYTES_MAX) -> list[Wanted]:
    """The topics of a worker with these settings.

    input_bytes_max   max.message.bytes of the inputs: a dead letter is as large as the record that it was
    Errors            UsageError where two have one name, or a name is none.
    """
    kept = {'cleanup.policy': 'delete', 'retention.ms': str(settings.alerts_retention_days * DAY_MS)}
    large = {'max.message.bytes': str(changelog_record_bytes_max(settings))}
    topics = [
        Wanted(settings.clicks_topic, 'input', {}),
        Wanted(settings.carts_topic, 'input', {}),
        Wanted(settings.alerts_topic, 'alerts', kept),
        Wanted(settings.dead_letters_topic, 'dead letters', kept | {
            'max.message.bytes': str(input_bytes_max + DEAD_LETTER_MORE_BYTES)}),
        Wanted(changelog_topic(settings), 'changelog', large | {
            'cleanup.policy': 'compact', 'min.compaction.lag.ms': str(COMPACTION_LAG_MS),
            'segment.bytes': str(CHANGELOG_SEGMENT_BYTES)}),
    ]
    if settings.publish != 'changes':
        topics.append(Wanted(settings.scores_topic, 'scores', {'cleanup.policy': 'compact'}))
    if settings.journal_topic:
        topics.append(Wanted(settings.journal_topic, 'journal', kept | large))
    names = [topic.name for topic in topics]
    for name in names:
        if not _NAME.fullmatch(name) or name in ('.', '..'):
            raise UsageError(f'{name!r} cannot be the name of a topic.',
                             'use letters, digits, dots, underscores and hyphens, at most 249.')
        if names.count(name) > 1:
            raise UsageError(f'Two settings name the topic {name}.', 'give each of them a topic of its own.')
    return topics


def compare(settings: Settings, found: Mapping[str, Found]) -> tuple[list[Missing], list[Finding]]:
    """What is missing and what does not fit, of the topics in `found`, by name."""
    there = [found[name] for name in (settings.clicks_topic, settings.carts_topic) if name in found]
    inputs = max([topic.partitions for topic in there], default=settings.partitions)
    bytes_max = max([_number(topic, 'max.message.bytes') for topic in there], default=0)
    wanted = wanted_topics(settings, bytes_max or BROKER_RECORD_BYTES_MAX)
    missing, findings = [], []
    for topic in wanted:
        there = found.get(topic.name)
        if there is None:
            missing.append(Missing(topic, inputs if topic.role in ('input', 'changelog') else settings.partitions))
        else:
            findings += _partition_findings(settings, topic, there, inputs)
            findings += _config_findings(settings, topic, there)
    return missing, findings


async def survey(settings: Settings, create: bool) -> Topics:
    """Look at the topics; with `create`, create what is missing, unless something that exists is a problem.

    Errors   KafkaError where the brokers are away or refuse.
    """
    names = [topic.name for topic in wanted_topics(settings)]
    async with open_admin(settings) as admin:
        topics = Topics(await read_topics(admin, names), [], [], [])
        topics.missing, topics.findings = compare(settings, topics.found)
        while create and topics.missing and not topics.problems:
            unseen = await _unseen(admin, settings, topics.missing)
            if not unseen:
                topics.created = await _create(admin, settings, topics.missing)
                unseen = names
            topics.found = await _read_when_ready(admin, [*topics.found, *unseen], names)
            topics.missing, topics.findings = compare(settings, topics.found)
        return topics


async def ensure_topics(settings: Settings) -> Topics:
    """What a worker calls at its start: afterwards every topic exists and fits. Its warnings are for the log.

    Errors   KafkaError that names each topic, the value found, the value wanted, and what to do.
    """
    topics = await survey(settings, create=True)
    if topics.problems:
        raise as_error(topics)
    return topics


def as_error(topics: Topics) -> KafkaError:
    """All problems in one error."""
    return KafkaError(' '.join(finding.problem for finding in topics.problems),
                      '; '.join(dict.fromkeys(finding.do.rstrip('.') for finding in topics.problems)) + '.')


async def read_topics(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, Found]:
    """Those of the topics that exist. Asks for all topics of the cluster: asking for one by name may create it."""
    there = {topic['topic']: topic for topic in await admin.describe_topics()
             if topic['topic'] in names and topic['partitions']}
    configs = await _read_configs(admin, list(there))
    return {name: Found(len(there[name]['partitions']),
                        min(len(entry['replicas']) for entry in there[name]['partitions']), configs[name])
            for name in names if name in there}


async def _read_configs(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    configs = {}
    response: Any
    for response in await admin.describe_configs(resources):
        for error_code, _message, _kind, name, entries in response.resources:
            configs[name] = {} if error_code else {
                entry[0]: entry[1] for entry in entries if entry[0] in _CONFIGS}
    return configs


async def _unseen(admin: AIOKafkaAdminClient, settings: Settings, missing: list[Missing]) -> list[str]:
    """Those that exist after all: a broker learns of a new topic a little later than the controller, and what is
    created beside it would take the wrong number of partitions."""
    response: Any = await admin.create_topics(_new(settings, missing), validate_only=True)
    return [name for name, error_code, _ in response.topic_errors if for_code(error_code) is TopicAlreadyExistsError]


def _new(settings: Settings, missing: list[Missing]) -> list[NewTopic]:
    return [NewTopic(entry.wanted.name, entry.partitions, settings.replication, topic_configs=entry.wanted.config)
            for entry in missing]


async def _create(admin: AIOKafkaAdminClient, settings: Settings, missing: list[Missing]) -> list[str]:
    created = []
    response: Any = await admin.create_topics(_new(settings, missing))
    for name, error_code, message in response.topic_errors:
        error = for_code(error_code)
        if error is TopicAlreadyExistsError:
            continue            # another worker was faster
        if error_code:
            raise as_kafka_error(error(message), f'Creating the topic {name}')
        created.append(name)
    return created


async def _read_when_ready(admin: AIOKafkaAdminClient, awaited: list[str], names: list[str]) -> dict[str, Found]:
    """The topics `names`, once each partition of those that are awaited has a leader."""
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while True:
                described = {topic['topic']: topic for topic in await admin.describe_topics()}
                if all(_has_leaders(described.get(name)) for name in awaited):
                    return await read_topics(admin, names)
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise KafkaError(f'The topics {", ".join(awaited)} have no leaders after {_READY_TIMEOUT_S} s.',
                         'see whether all brokers are well.') from error


def _has_leaders(topic: dict | None) -> bool:
    return bool(topic) and not topic['error_code'] and bool(topic['partitions']) and all(
        entry['leader'] >= 0 and not entry['error_code'] for entry in topic['partitions'])


# ---- findings -------------------------------------------------------------------------------------------------------

def _partition_findings(settings: Settings, topic: Wanted, there: Found, inputs: int) -> list[Finding]:
    findings = []
    if topic.role == 'input' and there.partitions != inputs:
        findings.append(Finding(
            'problem', topic.name, 'the number of partitions', str(there.partitions),
            f'{inputs}, as the other input has',
            f'create {topic.name} anew with {inputs} partitions (adding partitions moves keys, which is harmless only '
            'while the topic is empty).'))
    if topic.role == 'changelog' and there.partitions != inputs:
        findings.append(Finding(
            'problem', topic.name, 'the number of partitions', str(there.partitions), f'{inputs}, as the inputs have',
            'give the inputs as many partitions as they had, or choose another `group`, which begins with no history.'))
    if there.replication < settings.replication:
        findings.append(Finding(
            'warning', topic.name, 'the replication factor', str(there.replication), str(settings.replication),
            'reassign its partitions (kafka-reassign-partitions.sh), or set `replication` to what is meant.'))
    return findings


def _config_findings(settings: Settings, topic: Wanted, there: Found) -> list[Finding]:
    if topic.role == 'input':
        return []
    if not there.config:
        return [Finding('warning', topic.name, 'the configuration', 'hidden from this client', 'readable',
                        'grant DescribeConfigs, or check the topic with kafka-configs.sh.')]
    findings = []

    def differs(level: Literal['warning', 'problem'], name: str, wanted: str, why: str) -> None:
        findings.append(Finding(level, topic.name, name, there.config.get(name, 'unknown'), f'{wanted} ({why})',
                                _alter(settings, topic.name, name, wanted)))

    policies = set(there.config.get('cleanup.policy', '').split(','))
    if topic.role == 'changelog' and policies != {'compact'}:
        differs('problem', 'cleanup.policy', 'compact', "or users' records would be deleted")
    elif topic.role == 'scores' and policies != {'compact'}:
        differs('warning', 'cleanup.policy', 'compact', "or a silent user's newest scores are deleted")
    elif topic.role not in ('changelog', 'scores') and policies != {'delete'}:
        differs('problem', 'cleanup.policy', 'delete', 'compaction would drop records that nothing replaces')
    if topic.role == 'changelog' and _number(there, 'min.compaction.lag.ms') < COMPACTION_LAG_MS:
        differs('warning', 'min.compaction.lag.ms', str(COMPACTION_LAG_MS),
                'or a record that a paused worker writes late may replace a newer one for good')
    if 'retention.ms' in topic.config:
        keep_ms = _number(there, 'retention.ms')
        if 0 <= keep_ms < int(topic.config['retention.ms']):
            differs('warning', 'retention.ms', topic.config['retention.ms'], 'alerts_retention_days')
    if 'max.message.bytes' in topic.config:
        wanted = topic.config['max.message.bytes']
        if _number(there, 'max.message.bytes') < int(wanted):
            level = 'warning' if topic.role == 'dead letters' else 'problem'
            differs(level, 'max.message.bytes', wanted, 'for the largest record')
    return findings


def _number(there: Found, name: str) -> int:
    """A number of a topic's configuration; 0 where it is unknown."""
    return int(there.config.get(name) or 0)


def _alter(settings: Settings, topic: str, name: str, wanted: str) -> str:
    return (f'run `kafka-configs.sh --bootstrap-server {settings.brokers} --alter --topic {topic} '
            f'--add-config {name}={wanted}`.')
