"""The worker's topics: created if they are missing, checked if they exist.

    topic           partitions         cleanup.policy   also
    clicks, carts   the same count     the shop's own   compacted inputs are allowed
    changelog       as the inputs      compact          min.compaction.lag.ms, max.message.bytes for the largest record
    alerts          any                only delete      retention.ms; compaction by user would keep one kind only
    scores          any                compact          only if `publish` is not `changes`
    dead letters    any                only delete      a null value is kept; compaction would delete it
    journal         any                only delete      only if the setting names it

`compare` is pure: it takes the topics that exist and gives the differences from what the settings ask for. A problem
stops a worker before it reads anything. A warning does not. No existing topic is changed, since others may use it.
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

COMPACTION_LAG_MS = HOUR_MS             # longer than any pause of a worker that is still alive
CHANGELOG_SEGMENT_BYTES = 100 << 20     # the newest segment is never compacted, and recovery reads all of it
BROKER_RECORD_BYTES_MAX = 1_048_588     # the brokers' own default of max.message.bytes
DEAD_LETTER_MORE_BYTES = 64 << 10       # a dead letter's key and headers, in addition to the original record
_RECORD_BYTES_CEILING = 64 << 20        # a request may have 100 MiB (socket.request.max.bytes)
_ID_BYTES = 8
_DECISION_BYTES_MAX, _DECISIONS_MAX = 8_192, 3      # a message with all its reasons; kinds of decisions in one step
_SCORES_MESSAGE_BYTES_MAX = 4_096                   # two ids of 256 characters, each as long as JSON can make them
_READY_TIMEOUT_S = 30
_CONFIGS = ('cleanup.policy', 'retention.ms', 'max.message.bytes', 'min.compaction.lag.ms', 'message.timestamp.type',
            'message.timestamp.after.max.ms')
_NAME = re.compile(r'[A-Za-z0-9._-]{1,249}')

Role = Literal['input', 'alerts', 'scores', 'dead letters', 'journal', 'changelog']


class TopicSpec(msgspec.Struct, frozen=True):
    """A topic as the settings ask for it. `config` is its configuration when it is created."""

    name: str
    role: Role
    config: dict[str, str]


class Found(msgspec.Struct, frozen=True):
    """A topic as it is. `config` has the entries that matter here; it is empty if this client may not read it."""

    partitions: int
    replication: int
    config: dict[str, str]


class Missing(msgspec.Struct, frozen=True):
    """A topic that does not exist, and the number of partitions to create it with."""

    spec: TopicSpec = msgspec.field(name='wanted')      # the key in `stream topics --json`
    partitions: int


class Finding(msgspec.Struct, frozen=True):
    """One difference: `what` of `topic` is `found`, but should be `target`."""

    level: Literal['warning', 'problem']
    topic: str
    what: str
    found: str
    target: str = msgspec.field(name='wanted')          # the key in `stream topics --json`
    do: str

    @property
    def problem(self) -> str:
        """The difference as a sentence, without what to do."""
        return f'The topic {self.topic}: {self.what} is {self.found}, should be {self.target}.'


class Topics(msgspec.Struct):
    """The worker's topics: those that exist, those that are missing, and differences from the settings.

    found     topics that exist, by name; also those that were just created
    created   names of the topics that were just created
    missing   topics that do not exist; none after creation
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
        """Number of partitions of a topic. Errors: KafkaError if it does not exist."""
        if name not in self.found:
            raise KafkaError(f'There is no topic {name}.',
                             "check the name. `stream topics` creates the worker's own topics.")
        return self.found[name].partitions


def changelog_topic(settings: Settings) -> str:
    """Name of the topic that keeps the newest record of every user."""
    return f'{settings.group}-users-changelog'


def changelog_record_bytes_max(settings: Settings) -> int:
    """An upper bound of a user's record in bytes, and the least max.message.bytes of the changelog.

    The largest record has a full window, all day buckets, and an outbox with the messages of one step. The bound is at
    least 1 MiB, so that several records share a batch.
    """
    record = HEADER.size + DAYS_KEPT * DAY.size + settings.window_events_max * (_ID_BYTES + ROW.size)
    scores = {'changes': 0, 'all': 1, 'events': settings.block_events_max}[settings.publish]
    outbox = _DECISIONS_MAX * _DECISION_BYTES_MAX + scores * _SCORES_MESSAGE_BYTES_MAX
    return min(max(record + outbox, BROKER_RECORD_BYTES_MAX), _RECORD_BYTES_CEILING)


def topic_specs(settings: Settings, input_bytes_max: int = BROKER_RECORD_BYTES_MAX) -> list[TopicSpec]:
    """The topics of a worker with these settings.

    input_bytes_max   max.message.bytes of the inputs; a dead letter holds a whole input record
    Errors            UsageError if two topics have the same name, or a name is not allowed.
    """
    kept = {'cleanup.policy': 'delete', 'retention.ms': str(settings.alerts_retention_days * DAY_MS)}
    large = {'max.message.bytes': str(changelog_record_bytes_max(settings))}
    topics = [
        TopicSpec(settings.clicks_topic, 'input', {}),
        TopicSpec(settings.carts_topic, 'input', {}),
        TopicSpec(settings.alerts_topic, 'alerts', kept),
        TopicSpec(settings.dead_letters_topic, 'dead letters', kept | {
            'max.message.bytes': str(input_bytes_max + DEAD_LETTER_MORE_BYTES)}),
        TopicSpec(changelog_topic(settings), 'changelog', large | {
            'cleanup.policy': 'compact', 'min.compaction.lag.ms': str(COMPACTION_LAG_MS),
            'segment.bytes': str(CHANGELOG_SEGMENT_BYTES)}),
    ]
    if settings.publish != 'changes':
        topics.append(TopicSpec(settings.scores_topic, 'scores', {'cleanup.policy': 'compact'}))
    if settings.journal_topic:
        topics.append(TopicSpec(settings.journal_topic, 'journal', kept | large))
    names = [topic.name for topic in topics]
    for name in names:
        if not _NAME.fullmatch(name) or name in ('.', '..'):
            raise UsageError(f'{name!r} cannot be the name of a topic.',
                             'use at most 249 letters, digits, dots, underscores and hyphens.')
        if names.count(name) > 1:
            raise UsageError(f'Two settings name the topic {name}.', 'give each of them a topic of its own.')
    return topics


def compare(settings: Settings, found: Mapping[str, Found]) -> tuple[list[Missing], list[Finding]]:
    """Compare the topics in `found`, by name, with the settings: missing topics, and differences."""
    there = [found[name] for name in (settings.clicks_topic, settings.carts_topic) if name in found]
    inputs = max([topic.partitions for topic in there], default=settings.partitions)
    bytes_max = max([_number(topic, 'max.message.bytes') for topic in there], default=0)
    missing, findings = [], []
    for topic in topic_specs(settings, bytes_max or BROKER_RECORD_BYTES_MAX):
        there = found.get(topic.name)
        if there is None:
            missing.append(Missing(topic, inputs if topic.role in ('input', 'changelog') else settings.partitions))
        else:
            findings += _partition_findings(settings, topic, there, inputs)
            findings += _config_findings(settings, topic, there)
    return missing, findings


async def survey(settings: Settings, create: bool) -> Topics:
    """Compare the topics with the settings. With `create`, create missing topics, unless there is a problem.

    Errors   KafkaError if the brokers do not answer, or refuse.
    """
    names = [topic.name for topic in topic_specs(settings)]
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
    """Create the topics that are missing; called when a worker starts. The result's warnings are for the log.

    Errors   KafkaError for all problems: each topic, its value, the value that it should have, and what to do.
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
    """The topics that exist, of those named. Lists all topics of the cluster: asking for one by name may create it."""
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
    """Names of missing topics that exist after all: a broker learns of a new topic later than the controller.

    Topics created without knowing of them would get the wrong number of partitions.
    """
    response: Any = await admin.create_topics(_new(settings, missing), validate_only=True)
    return [name for name, error_code, _ in response.topic_errors if for_code(error_code) is TopicAlreadyExistsError]


def _new(settings: Settings, missing: list[Missing]) -> list[NewTopic]:
    return [NewTopic(entry.spec.name, entry.partitions, settings.replication, topic_configs=entry.spec.config)
            for entry in missing]


async def _create(admin: AIOKafkaAdminClient, settings: Settings, missing: list[Missing]) -> list[str]:
    created = []
    response: Any = await admin.create_topics(_new(settings, missing))
    for name, error_code, message in response.topic_errors:
        error = for_code(error_code)
        if error is TopicAlreadyExistsError:
            continue            # another worker created it first
        if error_code:
            raise as_kafka_error(error(message), f'Creating the topic {name}')
        created.append(name)
    return created


async def _read_when_ready(admin: AIOKafkaAdminClient, awaited: list[str], names: list[str]) -> dict[str, Found]:
    """The topics `names`, as soon as every partition of the awaited topics has a leader."""
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while True:
                described = {topic['topic']: topic for topic in await admin.describe_topics()}
                if all(_has_leaders(described.get(name)) for name in awaited):
                    return await read_topics(admin, names)
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise KafkaError(f'The topics {", ".join(awaited)} have no leaders after {_READY_TIMEOUT_S} s.',
                         'check that all brokers are healthy.') from error


def _has_leaders(topic: dict | None) -> bool:
    return bool(topic) and not topic['error_code'] and bool(topic['partitions']) and all(
        entry['leader'] >= 0 and not entry['error_code'] for entry in topic['partitions'])


# ---- findings -------------------------------------------------------------------------------------------------------

def _partition_findings(settings: Settings, topic: TopicSpec, there: Found, inputs: int) -> list[Finding]:
    findings = []
    if topic.role == 'input' and there.partitions != inputs:
        findings.append(Finding(
            'problem', topic.name, 'the number of partitions', str(there.partitions),
            f'{inputs}, as the other input has',
            f'create {topic.name} again with {inputs} partitions. Adding partitions moves keys, so add them only while '
            'the topic is empty.'))
    if topic.role == 'changelog' and there.partitions != inputs:
        findings.append(Finding(
            'problem', topic.name, 'the number of partitions', str(there.partitions), f'{inputs}, as the inputs have',
            'give the inputs as many partitions as before, or choose another `group`, which starts without history.'))
    if there.replication < settings.replication:
        findings.append(Finding(
            'warning', topic.name, 'the replication factor', str(there.replication), str(settings.replication),
            'reassign its partitions (kafka-reassign-partitions.sh), or correct the setting `replication`.'))
    return findings


def _config_findings(settings: Settings, topic: TopicSpec, there: Found) -> list[Finding]:
    if topic.role == 'input':
        return []
    if not there.config:
        return [Finding('warning', topic.name, 'the configuration', 'hidden from this client', 'readable',
                        'grant DescribeConfigs, or check the topic with kafka-configs.sh.')]
    findings = []

    def differs(level: Literal['warning', 'problem'], name: str, target: str, why: str) -> None:
        findings.append(Finding(level, topic.name, name, there.config.get(name, 'unknown'), f'{target} ({why})',
                                _alter(settings, topic.name, name, target)))

    policies = set(there.config.get('cleanup.policy', '').split(','))
    if topic.role == 'changelog' and policies != {'compact'}:
        differs('problem', 'cleanup.policy', 'compact', "or users' records would be deleted")
    elif topic.role == 'scores' and policies != {'compact'}:
        differs('warning', 'cleanup.policy', 'compact', "or a silent user's newest scores are deleted")
    elif topic.role not in ('changelog', 'scores') and policies != {'delete'}:
        differs('problem', 'cleanup.policy', 'delete', 'compaction would drop records that nothing replaces')
    if topic.role == 'changelog' and _number(there, 'min.compaction.lag.ms') < COMPACTION_LAG_MS:
        differs('warning', 'min.compaction.lag.ms', str(COMPACTION_LAG_MS),
                'or a record that a paused worker writes late could replace a newer one')
    if 'retention.ms' in topic.config:
        keep_ms = _number(there, 'retention.ms')
        if 0 <= keep_ms < int(topic.config['retention.ms']):
            differs('warning', 'retention.ms', topic.config['retention.ms'], 'alerts_retention_days')
    if 'max.message.bytes' in topic.config:
        target = topic.config['max.message.bytes']
        if _number(there, 'max.message.bytes') < int(target):
            level = 'warning' if topic.role == 'dead letters' else 'problem'
            differs(level, 'max.message.bytes', target, 'for the largest record')
    return findings


def _number(there: Found, name: str) -> int:
    """A number of a topic's configuration; 0 if unknown."""
    return int(there.config.get(name) or 0)


def _alter(settings: Settings, topic: str, name: str, value: str) -> str:
    return (f'run `kafka-configs.sh --bootstrap-server {settings.brokers} --alter --topic {topic} '
            f'--add-config {name}={value}`.')
