"""Every metric of the worker: its name, type, unit and meaning.

Names follow Prometheus: counters end in `_total`, durations are seconds, sizes are bytes. No metric names a user:
labels are topics, partitions and small fixed sets. The engine updates metrics once per block or step, never per event.
Each `Metrics` has a registry of its own, so that a process, or a test, can have several.

When a partition is revoked, its series are removed (`revoked`). Otherwise a dashboard would go on showing its last lag.
"""
from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from stream.core.decide import Kind
from stream.core.events import Reason
from stream.core.layout import Fold
from stream.core.partitioners import MISROUTED

Stage = Literal['decode', 'score', 'changelog', 'outputs', 'write']
STAGES: tuple[Stage, ...] = ('decode', 'score', 'changelog', 'outputs', 'write')
BREAKER_STATES = ('closed', 'half_open', 'open')

# A stage takes between a millisecond (a small write) and the timeouts of the settings (Triton 10 s, a send 120 s).
_STAGE_BUCKETS_S = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 120)
# The delay of an output is that of the fetch, the block and the stages. After an outage it includes the outage.
_OUTPUT_BUCKETS_S = (.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 86_400)


class Metrics:
    """All metrics as attributes, and a method for each fact that changes several of them."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = at = registry or CollectorRegistry()

        # ---- events: applied + duplicate + late + dead letters account for every record that is read once -----------
        self.events_read = Counter(
            'stream_events_read_total', 'Input records read from Kafka, including redeliveries.', registry=at)
        self.events_applied = Counter(
            'stream_events_applied_total', 'Events added to a window.', registry=at)
        self.events_duplicate = Counter(
            'stream_events_duplicate_total', 'Events whose id was already in the window.', registry=at)
        self.events_late = Counter(
            'stream_events_late_total',
            'Events older than a full window, or older than the time it spans. They change nothing.', registry=at)
        self.events_redelivered = Counter(
            'stream_events_redelivered_total',
            'Events skipped because the state already contained them, e.g. after a restart.', registry=at)
        self.events_lost = Counter(
            'stream_events_lost_total', 'Input records that Kafka deleted before they were read.', registry=at)
        self.dead_letters = Counter(
            'stream_dead_letters_total', 'Records written to the dead-letter topic, by reason.', ['reason'],
            registry=at)
        self.messages = Counter(
            'stream_messages_total', 'Output messages acknowledged by Kafka, by CloudEvents type.', ['type'],
            registry=at)

        # ---- lanes --------------------------------------------------------------------------------------------------
        self.blocks = Counter(
            'stream_blocks_total', 'Blocks of records that lanes accepted.', registry=at)
        self.beats = Counter(
            'stream_beats_total', 'Beats: each takes one step of every lane that has something to do.', registry=at)
        self.steps = Counter(
            'stream_steps_total', 'Steps of all lanes: of events, or of silence timers.', registry=at)
        self.timers_fired = Counter(
            'stream_timers_fired_total', 'Silence timers fired.', registry=at)
        self.reseeks = Counter(
            'stream_reseeks_total', 'How often a partition was read again because a block was missing.',
            registry=at)
        self.stage_seconds = Histogram(
            'stream_stage_seconds', 'Time that one beat spends in a stage. For write: time of one write to the stores.',
            ['stage'], buckets=_STAGE_BUCKETS_S, registry=at)
        self.event_to_output_seconds = Histogram(
            'stream_event_to_output_seconds',
            "Time from the Kafka timestamp of a step's oldest event to the acknowledgement of the step's outputs.",
            buckets=_OUTPUT_BUCKETS_S, registry=at)
        self.in_flight_blocks = Gauge(
            'stream_in_flight_blocks', 'Blocks that were fetched and are not finished.', registry=at)
        self.lane_clock_seconds = Gauge(
            'stream_lane_clock_seconds', 'Event time (Unix) up to which the timers of a lane have fired.',
            ['partition'], registry=at)
        self.users = Gauge(
            'stream_users', "Users in a lane's state.", ['partition'], registry=at)

        # ---- scoring ------------------------------------------------------------------------------------------------
        self.scored_rows = Counter(
            'stream_scored_rows_total', 'Windows that got usable scores.', registry=at)
        self.refused_rows = Counter(
            'stream_refused_rows_total', 'Windows whose scores were not numbers in range. They cause no decision.',
            registry=at)
        self.scorer_retries = Counter(
            'stream_scorer_retries_total', 'Requests to the scorer that were sent again.', registry=at)
        self.scorer_holds = Counter(
            'stream_scorer_holds_total', 'How often events were held because the scorer did not answer.', registry=at)
        self.scorer_holding = Gauge(
            'stream_scorer_holding', '1 while events are held because the scorer does not answer.', registry=at)
        self.scorer_breaker = Enum(
            'stream_scorer_breaker', "State of the scorer's circuit breaker.", states=list(BREAKER_STATES),
            registry=at)

        # ---- the group ----------------------------------------------------------------------------------------------
        self.lag = Gauge(
            'stream_lag_events', 'Records of a topic partition that are not folded yet.',
            ['topic', 'partition'], registry=at)
        self.rebalances = Counter(
            'stream_rebalances_total', 'Assignments of partitions to this worker.', registry=at)
        self.commits = Counter(
            'stream_commits_total', 'Commits of offsets that Kafka accepted.', registry=at)
        self.commits_failed = Counter(
            'stream_commits_failed_total', 'Commits of offsets that failed. The next commit covers the same offsets.',
            registry=at)

        # ---- state --------------------------------------------------------------------------------------------------
        self.recovering_partitions = Gauge(
            'stream_recovering_partitions', 'Partitions whose state is being restored from the changelog.',
            registry=at)
        self.recovery_records = Counter(
            'stream_recovery_records_total', 'Changelog records applied to the state.', registry=at)
        self.recovery_left = Gauge(
            'stream_recovery_left_records', "Changelog records left until a partition's state is restored.",
            ['partition'], registry=at)
        self.standby_lag = Gauge(
            'stream_standby_lag_records', 'Changelog records that a standby copy is behind.', ['partition'],
            registry=at)

        self.build = Info(
            'stream_build', 'Version of this worker and its model.', registry=at)
        self.process = ProcessCollector(registry=at)        # CPU, memory and file handles of this process

        for reason in (*Reason, MISROUTED):     # from 0, so that the first dead letter is seen as an increase
            self.dead_letters.labels(reason)
        self._published = {kind: self.messages.labels(kind) for kind in Kind}
        self._outcomes = ((self.events_applied, Fold.APPLIED), (self.events_duplicate, Fold.DUPLICATE),
                          (self.events_late, Fold.LATE), (self.events_redelivered, Fold.SEEN))
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}

    def beat(self, blocks: int, events: int) -> None:
        """A beat has taken so many blocks with so many records."""
        self.beats.inc()
        self.blocks.inc(blocks)
        self.events_read.inc(events)

    def folded(self, counts: Sequence[Sequence[int]]) -> None:
        """Count the events of some steps by their outcome. The counts of a step are indexed by `Fold`."""
        for counter, what in self._outcomes:
            if number := sum([of_step[what] for of_step in counts]):
                counter.inc(number)

    def scored(self, rows: int, refused: int) -> None:
        """So many windows were scored; the scores of `refused` of them are unusable."""
        self.scored_rows.inc(rows - refused)
        if refused:
            self.refused_rows.inc(refused)

    def published(self, scores: int, decisions: Sequence[Kind]) -> None:
        """So many messages about scores are on their way, and messages about decisions of these kinds."""
        if scores:
            self._published[Kind.SCORES].inc(scores)
        for kind in decisions:
            self._published[kind].inc()

    def stage(self, stage: Stage, seconds: float) -> None:
        """A beat spent `seconds` in a stage."""
        self._stages[stage].observe(seconds)

    def built(self, version: str, model: str, model_version: str, sha256: str) -> None:
        """Set the version of the worker and its model."""
        self.build.info({'version': version, 'model': model, 'model_version': model_version, 'sha256': sha256})

    def revoked(self, topics: Sequence[str], partition: int) -> None:
        """Remove the series of a partition number: of its input topics, its lane and its state."""
        for topic in topics:
            self.lag.remove(topic, str(partition))
        for gauge in (self.lane_clock_seconds, self.users, self.recovery_left, self.standby_lag):
            gauge.remove(str(partition))

    def exposition(self, accept: str = '') -> tuple[bytes, str]:
        """All series in the format of Prometheus, and its content type.

        accept   the Accept header of the request; OpenMetrics is used if it asks for that
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
