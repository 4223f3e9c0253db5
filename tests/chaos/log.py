"""The input of the auditor: topics by role, databases of stopped workers, and observations of a run."""
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from rocksdict import AccessType, Options, Rdict

Topic = Literal['clicks', 'carts', 'alerts', 'scores', 'dead_letters', 'changelog']
SOURCES: tuple[Topic, Topic] = ('clicks', 'carts')
READ_TIMEOUT_MS = 30_000


class Record(NamedTuple):
    """One Kafka record. Units: `timestamp_ms` of the record itself."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Log(Protocol):
    """The topics of one group, each with `partitions` partitions. `names`: role -> name of the topic."""

    partitions: int
    names: Mapping[Topic, str]

    def read(self, topic: Topic, partition: int) -> AsyncIterator[Record]:
        """Every committed record of a topic partition, from its beginning to its current end."""
        ...


class Store(Protocol):
    """The database of one partition of a stopped worker."""

    name: str
    partition: int
    owner: bool         # whether the worker owned the partition at the end; otherwise it is an older copy

    def records(self) -> Iterable[tuple[bytes, bytes]]: ...

    def due(self) -> Iterable[bytes]: ...


@dataclass(frozen=True)
class Sample:
    """Committed offsets, and the ends of the topics, which were read right after them.

    at_s        since the start of the run
    committed   (source topic, partition) -> next fetch position; absent: none
    ends        (topic, partition) -> end offset
    """

    at_s: float
    committed: dict[tuple[Topic, int], int]
    ends: dict[tuple[Topic, int], int]


@dataclass
class Fault:
    """A fault that fired.

    consumed   events before the committed offsets at that moment
    left       events of the whole run behind them
    """

    name: str
    at_s: float
    consumed: int
    left: int


@dataclass(frozen=True)
class Bound:
    """The largest value seen of something with a limit."""

    name: str
    seen: float
    cap: float
    unit: str


@dataclass
class Run:
    """What a run observed in addition to the log. With an empty one, only the log is checked.

    planned         number of planned faults; None: this was not a chaos run
    between_min     least events consumed between two faults
    settled_s       from the last fault (or the last event, if later) until all was read; None: it never was
    settle_s_max    its limit
    stuck_s_max     longest time that events may wait without an offset moving, while workers run
    clean           no worker was killed and no broker failed, so no duplicate may occur
    problems        other problems, as (check, text)
    """

    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    planned: int | None = None
    between_min: int = 1_000
    settled_s: float | None = 0.0
    settle_s_max: float = 120.0
    stuck_s_max: float = 60.0
    clean: bool = False
    bounds: list[Bound] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


class KafkaLog:
    """The topics on a broker. `names`: topic role to topic name."""

    def __init__(self, brokers: str, names: dict[Topic, str], partitions: int) -> None:
        self.partitions = partitions
        self._brokers = brokers
        self.names = names

    async def read(self, topic: Topic, partition: int) -> AsyncIterator[Record]:
        name = self.names[topic]
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._brokers, enable_auto_commit=False, isolation_level='read_committed',
            auto_offset_reset='earliest', max_partition_fetch_bytes=8 << 20, fetch_max_wait_ms=100)
        await consumer.start()
        try:
            place = TopicPartition(name, partition)
            consumer.assign([place])
            end = (await consumer.end_offsets([place]))[place]
            await consumer.seek_to_beginning(place)
            while await consumer.position(place) < end:
                got = await consumer.getmany(timeout_ms=READ_TIMEOUT_MS)
                if not got and await consumer.position(place) < end:
                    raise TimeoutError(f'{name}-{partition}: nothing read below {end} for {READ_TIMEOUT_MS} ms')
                for record in got.get(place, ()):
                    if record.offset < end:
                        yield Record(record.offset, record.timestamp, record.key, record.value, tuple(record.headers))
        finally:
            await consumer.stop()


@dataclass(frozen=True)
class RocksStore:
    """A RocksDB directory, opened for reading only."""

    path: str
    partition: int
    owner: bool

    @property
    def name(self) -> str:
        return self.path

    def records(self) -> Iterable[tuple[bytes, bytes]]:
        yield from self._items(None)

    def due(self) -> Iterable[bytes]:
        for key, _ in self._items('due'):
            yield key

    def _items(self, family: str | None) -> Iterable[tuple[bytes, bytes]]:
        database = Rdict(self.path, Options(raw_mode=True), column_families={'due': Options(raw_mode=True)},
                         access_type=AccessType.read_only())
        try:
            column = database.get_column_family(family) if family else database
            yield from column.items()  # type: ignore[misc]
            if family:
                column.close()
        finally:
            database.close()
