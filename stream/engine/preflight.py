"""The checks before a worker starts: settings, brokers, topics, partitioner, group, model, Triton, state, port.

A check gives one or more results: ok, warning or problem, with one sentence and what to do. Checks that need the
brokers are skipped if no broker answers. Nothing is changed: no topic is created, no group is joined, no record is
written.
"""
import asyncio
import http.client
import shutil
import socket
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from stream.config import Settings, unknown_variables
from stream.core.partitioners import Detection, detect, keys_needed
from stream.errors import KafkaError, ModelError, StreamError, UsageError
from stream.kafka.clients import client_arguments, open_admin, open_consumer
from stream.kafka.topics import Topics, survey
from stream.scoring.artefact import MANIFEST, load_artefact, sha256
from stream.scoring.make import make_scorer, mismatches, shipped

SAMPLE_RECORDS = 2_000          # of each input, the newest ones
SAMPLE_SECONDS_MAX = 10.0
CONNECT_SECONDS_MAX = 3.0
FREE_BYTES_MIN = 1 << 30

Outcome = Literal['ok', 'warning', 'problem']


class CheckResult(msgspec.Struct, frozen=True):
    """One result of a check. `exit_code` is 0 unless the outcome is a problem."""

    check: str
    outcome: Outcome
    text: str
    do: str = ''
    exit_code: int = 0


def ok(check: str, text: str) -> CheckResult:
    return CheckResult(check, 'ok', text)


def warning(check: str, text: str, do: str) -> CheckResult:
    return CheckResult(check, 'warning', text, do)


def problem(check: str, error: StreamError) -> CheckResult:
    return CheckResult(check, 'problem', error.problem, error.do, error.exit_code)


async def run_checks(settings: Settings) -> AsyncIterator[CheckResult]:
    """Run all checks. Each result comes as soon as it is known."""
    async for result in _results('settings', _settings(settings)):
        yield result
    reached = False
    async for result in _results('brokers', _brokers(settings)):
        reached = reached or result.outcome != 'problem'
        yield result
    if reached:
        for name, results in (('topics', _topics(settings)), ('partitioner', _partitioner(settings)),
                            ('group', _group(settings))):
            async for result in _results(name, results):
                yield result
    for name, results in (('model', _model(settings)), ('triton', _triton(settings)), ('state', _state(settings)),
                        ('admin port', _admin_port(settings))):
        async for result in _results(name, results):
            yield result


async def _results(name: str, results: AsyncIterator[CheckResult]) -> AsyncIterator[CheckResult]:
    try:
        async for result in results:
            yield result
    except StreamError as error:
        yield problem(name, error)


# ---- settings -------------------------------------------------------------------------------------------------------

async def _settings(settings: Settings) -> AsyncIterator[CheckResult]:
    client_arguments(settings)
    found = [warning('settings', f'{name} in the environment is not a setting.', 'see `stream config` for the names.')
             for name in unknown_variables()]
    if settings.scorer == 'constant':
        found.append(warning('settings', 'scorer = constant gives every user the same scores.',
                             'set scorer to triton or embedded.'))
    if settings.session_timeout_ms >= settings.max_poll_interval_ms:
        found.append(warning(
            'settings', f'session_timeout_ms ({settings.session_timeout_ms}) is not below max_poll_interval_ms '
            f'({settings.max_poll_interval_ms}).', 'set the first to seconds, the second to minutes.'))
    for result in found:
        yield result
    if not found:
        yield ok('settings', 'All settings are consistent.')


# ---- Kafka ----------------------------------------------------------------------------------------------------------

async def _brokers(settings: Settings) -> AsyncIterator[CheckResult]:
    async with open_admin(settings) as admin:
        brokers = (await admin.describe_cluster())['brokers']
    addresses = [f'{broker["host"]}:{broker["port"]}' for broker in brokers]
    away = [address for broker, address in zip(brokers, addresses, strict=True)
            if not await _connects(broker['host'], broker['port'])]
    if away and len(away) == len(addresses):
        raise KafkaError(f'{settings.brokers} answers, but the addresses that it advertises cannot be reached from '
                         f'here: {", ".join(away)}.', 'correct advertised.listeners of the brokers.')
    for address in away:
        yield warning('brokers', f'The broker {address} cannot be reached.',
                      'start it, or correct its advertised.listeners.')
    yield ok('brokers', f'{len(addresses) - len(away)} of {len(addresses)} reached: {", ".join(addresses)}.')


async def _connects(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def _topics(settings: Settings) -> AsyncIterator[CheckResult]:
    topics = await survey(settings, create=False)
    for finding in topics.findings:
        if finding.level == 'problem':
            yield problem('topics', KafkaError(finding.problem, finding.do))
        else:
            yield warning('topics', finding.problem, finding.do)
    for entry in topics.missing:
        yield warning('topics', f'There is no topic {entry.spec.name} yet.',
                      'run `stream topics`, or let the first worker create it.')
    if not topics.findings and not topics.missing:
        yield ok('topics', ', '.join(f'{name} ({there.partitions})' for name, there in topics.found.items()) + '.')


async def _partitioner(settings: Settings) -> AsyncIterator[CheckResult]:
    topics = await survey(settings, create=False)
    for name in (settings.clicks_topic, settings.carts_topic):
        if name in topics.found:
            keys, keyless = await _sample(settings, topics, name)
            partitions = topics.partitions(name)
            if keyless:
                yield warning(
                    'partitioner', f'{keyless} of the newest {len(keys) + keyless} records of {name} have no key. They '
                    'become dead letters.', 'let the producers send the user_id as key.')
            yield partitioner_result(settings, name, detect(keys, partitions), partitions)


def partitioner_result(settings: Settings, topic: str, found: Detection, partitions: int) -> CheckResult:
    """Compare the partitioner that a sample of keys was written with to the setting `partitioner`."""
    name = 'partitioner'
    what = f'{found.keys} keys of {topic}'
    if found.verdict is None:
        needed = keys_needed(partitions)
        return ok(name, f'{what} are too few to tell; {needed} are needed.' if needed else
                  f'{topic} has one partition, so every partitioner agrees.')
    if settings.partitioner == 'none':
        if found.verdict == 'none':
            return ok(name, f'{what} follow no known partitioner, and the setting does not check any.')
        return warning(name, f'{what} follow {found.verdict}, but the setting does not check it.',
                       f'set partitioner = "{found.verdict}", so that records on a wrong partition are noticed.')
    share = found.shares[settings.partitioner]
    if share == 1:
        return ok(name, f'{what} are on the partitions that {settings.partitioner} chooses.')
    elsewhere = f'{100 * (1 - share):.1f} % of {what} are on partitions that {settings.partitioner} would not choose'
    if found.verdict == settings.partitioner:
        return warning(
            name, f'{elsewhere}. Their records become dead letters.',
            'find the producer that uses another partitioner, or whether the number of partitions was raised since.')
    if found.verdict == 'none':
        do = ('find out how the producers choose a partition, or whether the number of partitions was raised since; '
              'set partitioner = "none" if each user stays on one partition nevertheless.')
    else:
        do = f'set partitioner = "{found.verdict}", which fits {100 * found.shares[found.verdict]:.1f} % of them.'
    return problem(name, UsageError(f'{elsewhere}.', do))


async def _sample(settings: Settings, topics: Topics, topic: str) -> tuple[list[tuple[bytes, int]], int]:
    """Keys of the newest records with their partitions, and the number of records without a key."""
    partitions = topics.partitions(topic)
    places = [TopicPartition(topic, number) for number in range(partitions)]
    keys: list[tuple[bytes, int]] = []
    keyless = 0
    async with open_consumer(settings, 'check') as consumer:
        consumer.assign(places)
        first, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
        for place in places:
            consumer.seek(place, max(first[place], ends[place] - max(1, SAMPLE_RECORDS // partitions)))
        give_up = time.monotonic() + SAMPLE_SECONDS_MAX
        reading = [place for place in places if first[place] < ends[place]]
        while reading and time.monotonic() < give_up:
            for place, records in (await consumer.getmany(*reading, timeout_ms=200)).items():
                for record in records:
                    if record.key is None:
                        keyless += 1
                    else:
                        keys.append((record.key, place.partition))
            reading = await _unfinished(consumer, reading, ends)
    return keys, keyless


async def _unfinished(
    consumer: AIOKafkaConsumer, reading: list[TopicPartition], ends: Mapping[TopicPartition, int],
) -> list[TopicPartition]:
    return [place for place in reading if await consumer.position(place) < ends[place]]


async def _group(settings: Settings) -> AsyncIterator[CheckResult]:
    async with open_admin(settings) as admin:
        # Asking for a group that never existed would make the brokers create their offsets topic.
        known = settings.group in [name for name, *_ in await admin.list_consumer_groups()]
        protocol, members = await _described(admin, settings.group) if known else ('', [])
        committed = await admin.list_consumer_group_offsets(settings.group) if known else {}
    ours = client_arguments(settings)['client_id']
    others = sorted({client for client in members if client != ours})
    if others or protocol not in ('', 'consumer'):
        who = f'clients {", ".join(others)}' if others else f'a group of the type {protocol}'
        yield problem('group', UsageError(f'The group {settings.group} is in use by {who}.',
                                          'set `group` to a name that nothing else uses.'))
        return
    foreign = sorted({place.topic for place in committed} - {settings.clicks_topic, settings.carts_topic})
    if foreign:
        yield warning('group', f'The group {settings.group} has committed offsets of {", ".join(foreign)}, which this '
                      'worker does not read.', 'set `group` to a name that nothing else uses.')
    if members:
        workers = 'worker is' if len(members) == 1 else 'workers are'
        yield ok('group', f'{settings.group}: {len(members)} {workers} running.')
    else:
        history = ' It has committed offsets.' if committed else ''
        yield ok('group', f'{settings.group}: no worker is running.{history}')


async def _described(admin: AIOKafkaAdminClient, group: str) -> tuple[str, list[str]]:
    """The group's protocol type, and the client ids of its members."""
    responses: list[Any] = await admin.describe_consumer_groups([group])
    for response in responses:
        for _error, name, _state, protocol, _assignor, members, *_ in response.groups:
            if name == group:
                return protocol, [client_id for _member_id, client_id, *_ in members]
    return '', []


# ---- model and Triton -----------------------------------------------------------------------------------------------

async def _model(settings: Settings) -> AsyncIterator[CheckResult]:
    if settings.scorer == 'constant':
        return
    folder = shipped(settings.model)
    artefact = load_artefact(folder)
    make_scorer(settings, lambda _: None)       # loads the weights too, if this process scores
    for text in mismatches(artefact.manifest, settings):
        yield warning('model', f'{text[0].upper()}{text[1:]}.',
                      'train a model on such events, or change the settings to those of its training.')
    listed = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Listed).repository_files
    for name, digest in listed.items():
        path = folder.parent / name
        if not path.resolve().is_relative_to(folder.parent.resolve()) or not path.is_file():
            yield problem('model', ModelError(f'{path} is missing.', 'restore the folder from the exported one.'))
        elif sha256(path) != digest:
            yield warning('model', f'{path} is not the file that was exported: its SHA-256 differs.',
                          'restore it, unless it was changed on purpose.')
    yield ok('model', f'{artefact.info.name} version {artefact.info.version}, SHA-256 {artefact.info.sha256[:12]}..., '
             f'trained on {artefact.manifest.trained_on}.')


class _Listed(msgspec.Struct):
    repository_files: dict[str, str] = {}


async def _triton(settings: Settings) -> AsyncIterator[CheckResult]:
    if settings.scorer != 'triton':
        return
    from stream.scoring.triton import TritonScorer
    scorer = TritonScorer(settings.triton, shipped(settings.model), settings.batch_rows_max)
    try:
        await scorer.open()
    finally:
        await scorer.close()
    if not scorer.served_sha256:
        yield warning('triton', f'{settings.triton} does not tell the SHA-256 of its weights.',
                      "serve the exported config.pbtxt, which has the model's SHA-256.")
    yield ok('triton', f'{settings.triton} has {scorer.model.name} version {scorer.model.version} ready.')


# ---- this machine ---------------------------------------------------------------------------------------------------

async def _state(settings: Settings) -> AsyncIterator[CheckResult]:
    folder = settings.state_dir
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise UsageError(f'{folder} cannot be written: {error.strerror} ({there}).',
                         'set state_dir to a folder that this user may write to.') from error
    if free < FREE_BYTES_MIN:
        yield warning('state', f'{there} has {free >> 20} MiB free.', 'make room, or set state_dir to another disk.')
    else:
        yield ok('state', f'{folder} can be written; {free >> 30} GiB are free.')


async def _admin_port(settings: Settings) -> AsyncIterator[CheckResult]:
    host, port = settings.admin_host, settings.admin_port
    address = f'{host}:{port}'
    if port == 0:
        yield ok('admin port', 'any free port.')
        return
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        if await asyncio.to_thread(_serves_metrics, address):
            yield ok('admin port', f'{address} is used by a running worker. Another worker on this machine needs '
                     'another port.')
            return
        raise UsageError(f'{address} cannot be used: {error.strerror or error}.',
                         'set admin_host to an address of this machine and admin_port to a free port, or to 0.'
                         ) from error
    yield ok('admin port', f'{address} is free.')


def _serves_metrics(address: str) -> bool:
    try:
        with urllib.request.urlopen(f'http://{address}/metrics', timeout=CONNECT_SECONDS_MAX) as answer:
            return b'stream_' in answer.read(1 << 20)
    except (OSError, ValueError, http.client.HTTPException):
        return False
