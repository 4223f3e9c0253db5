"""Every setting, with its unit and its default.

A setting can come from a TOML file, from the environment (`STREAM_<NAME>`) or from the command line. The later one
wins. `stream config` prints the settings in effect.
"""
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from stream.core.decide import ActionRule, Occasion, Policy
from stream.core.events import EventRules
from stream.core.layout import DAY_MS, MINUTE_MS, NO_TIER, WindowLimits
from stream.core.partitioners import PartitionerName
from stream.core.rules import Publish, ReplayRules, StepRules
from stream.errors import UsageError

CONFIG_FILE = Path('stream.toml')
SHIPPED_MODEL = Path('triton_models/shopper/1')
_REPLAY = ReplayRules()
_EVENTS, _LIMITS, _POLICY = _REPLAY.events, _REPLAY.limits, _REPLAY.policy

Share = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[int, Field(ge=0, le=36_500 * DAY_MS)]
Days = Annotated[int, Field(ge=1, le=36_500)]
Currency = Annotated[str, Field(pattern='^[A-Z]{3}$')]
Name = Annotated[str, Field(pattern='^[A-Za-z0-9._-]{1,200}$')]
Address = Annotated[str, Field(pattern=r'^[^\s:]+:\d+$')]
Rate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Action(BaseModel, extra='forbid'):
    """Propose `action` on an occasion to shoppers with a tier from tier_min to tier_max. Tier -1 means: none yet."""

    occasion: Occasion
    action: str
    tier_min: int = NO_TIER
    tier_max: int = 100
    spend_min: float = Field(0.0, ge=0)


class Settings(BaseSettings):
    """All settings with their defaults. A name ends with its unit."""

    model_config = SettingsConfigDict(env_prefix='STREAM_', extra='forbid')

    model: Path = Field(SHIPPED_MODEL, description='folder of the model version to score with')
    scorer: Literal['embedded', 'triton', 'constant'] = Field(
        'embedded', description='embedded: onnxruntime in this process; triton: Triton Inference Server; '
                                'constant: the same scores for every user')
    scorer_threads: int = Field(1, ge=1, description='number of threads with which the embedded model scores a batch')
    batch_rows_max: int = Field(256, ge=1, le=256, description='maximum number of windows in one request to the model')
    triton: Address = Field('127.0.0.1:8001', description="host:port of Triton's gRPC service")
    triton_timeout_ms: Milliseconds = Field(10_000, description='time limit for scoring one batch, including retries')
    triton_in_flight_max: int = Field(16, ge=1, le=64, description='maximum number of requests in flight to Triton')
    fallback: Literal['hold', 'embedded'] = Field(
        'hold', description='while Triton is unavailable: hold the events, or score with an embedded copy of the model')
    publish: Publish = Field(
        'changes', description='changes: decisions only; all: also the scores of every scored user; '
                               'events: also one output per event, with the scores at the end of its step')
    state: Literal['memory', 'rocksdb'] = Field('memory', description="where a replay keeps the users' records")
    block_events_max: int = Field(
        _REPLAY.block_events_max, ge=1, le=100_000,
        description='maximum number of events in one step; a shopper is scored once, at the end of the step')
    block_span_minutes_max: int = Field(
        _REPLAY.block_span_ms_max // MINUTE_MS, ge=1, le=3 * 1440,
        description='maximum event time that one step of a replay spans; a smaller value scores shoppers more often '
                                               'and takes longer')

    brokers: str = Field(
        '127.0.0.1:9092', min_length=1, description='Kafka bootstrap servers: host:port, separated by commas')
    group: Name = Field('stream', description="consumer group; the changelog topic's name begins with it")
    instance_id: str = Field(
        '', description='name of this worker for static group membership, the same after each restart; no other worker '
                        'may have it, or both take the same partitions in turn; empty: none')
    clicks_topic: Name = Field('clicks', description='input topic')
    carts_topic: Name = Field('carts', description='input topic, with as many partitions as the other')
    alerts_topic: Name = Field('alerts', description='output topic of decisions; deleted by age, never compacted')
    scores_topic: Name = Field(
        'scores', description="output topic of each user's newest scores, compacted; not used if publish is `changes`")
    dead_letters_topic: Name = Field(
        'dead-letters', description='output topic of records that are not valid events, unchanged, with the reason')
    journal_topic: str = Field(
        '', description='topic with one record per step, so that a replay can repeat the same steps; empty: none')
    partitions: int = Field(8, ge=1, le=10_000, description='number of partitions of the topics that stream creates')
    replication: int = Field(1, ge=1, le=10, description='replication factor of the topics that stream creates')
    alerts_retention_days: Days = Field(
        7, description='retention of the topics of alerts, dead letters and the journal, if stream creates them')
    partitioner: PartitionerName = Field(
        'murmur2', description="how the producers of the inputs choose a partition (murmur2: Java, crc32: librdkafka's "
                               'consistent_random, fnv1a: librdkafka and Sarama); a record on another partition '
                               'becomes a dead letter; none: do not check')
    session_timeout_ms: Milliseconds = Field(
        10_000, description='time without a heartbeat after which Kafka removes a worker from the group')
    max_poll_interval_ms: Milliseconds = Field(
        300_000, description='time without a poll after which a worker leaves the group')
    commit_interval_ms: Milliseconds = Field(1_000, description='time between two commits of offsets')
    send_timeout_ms: int = Field(
        120_000, ge=1_000, le=36_500 * DAY_MS,
        description='time limit for Kafka to acknowledge a record; then the worker exits')
    drain_timeout_ms: Milliseconds = Field(
        20_000, description='time limit for finishing steps in flight when partitions are revoked or the worker stops')
    recovery_timeout_ms: Milliseconds = Field(
        1_800_000, description='time limit for restoring the state of a partition; then the worker exits')
    stuck_timeout_ms: Milliseconds = Field(
        60_000, description='time limit without a step while events wait and the scorer answers; then the worker exits')
    standbys: int = Field(
        0, ge=0, le=10, description='number of other workers that keep a copy of each partition\'s state')
    merge_wait_ms: Milliseconds = Field(
        500, description='how long events of one topic wait for earlier events of the other topic')
    clock: Literal['events', 'wall'] = Field(
        'events', description='what fires silence timers: event times only, or also wall-clock time once all events '
                              'have been read')
    clock_grace_ms: Milliseconds = Field(
        60_000, description='with `clock = wall`: how far the timers stay behind wall-clock time')
    clock_idle_ms_max: Milliseconds = Field(
        3_600_000, description='with `clock = wall`: wall-clock time counts only while the newest event is not '
                               'older than this')
    blocks_ahead_max: int = Field(
        2, ge=1, le=100, description='maximum number of blocks of a topic partition that wait in memory')
    events_in_flight_max: int = Field(
        16_000, ge=1, description='maximum number of events in unfinished steps, over all partitions; one step is '
                                  'always admitted')
    sweep_users_max: int = Field(
        500, ge=1, le=100_000, description='maximum number of silence timers fired in one step')
    state_dir: Path = Field(Path('state'), description="folder of the worker's RocksDB databases")
    users_cached_mib: int = Field(
        64, ge=0, description='memory for decoded users, over all partitions; steps in flight take more')
    rocksdb_cache_mib: int = Field(128, ge=8, description='block cache of RocksDB, over all partitions')
    rocksdb_write_buffers_mib: int = Field(128, ge=8, description='write buffers of RocksDB, over all partitions')
    admin_host: str = Field('127.0.0.1', description='address of the health pages and metrics')
    admin_port: int = Field(9108, ge=0, le=65_535, description='port of the health pages and metrics; 0: any free port')

    currency: Currency = Field(_EVENTS.currency, description='ISO 4217 code of all amounts')
    currency_rates: dict[Currency, Rate] = Field(
        default_factory=dict, description='value of one unit of another currency, in `currency`; an event in a '
                                          'currency without a rate becomes a dead letter')
    clock_ahead_ms_max: Milliseconds = Field(
        _EVENTS.clock_ahead_ms_max, description="how far an event's time may be ahead of its Kafka record's time")
    record_bytes_max: int = Field(
        _EVENTS.record_bytes_max, ge=64, description='maximum size of a record; a larger one becomes a dead letter')

    window_events_max: int = Field(
        _LIMITS.events_max, ge=1, le=65_535, description='maximum number of events kept per user')
    window_span_days: Days = Field(
        _LIMITS.span_ms // DAY_MS, description="maximum age of a kept event, counted from the user's newest event")
    silence_days: list[Days] = Field(
        default_factory=lambda: [delay_ms // DAY_MS for delay_ms in _LIMITS.silence_ms], max_length=255,
        description='a user without events is scored again after each of these numbers of days')

    tier_margin: Annotated[float, Field(ge=0, le=0.5)] = Field(
        _POLICY.tier_margin, description='the tier changes only if spend lies beyond the published tier with a '
                                         'probability of at least 0.5 plus this margin')
    power_move_min: Share = Field(
        _POLICY.power_move_min, description='minimum change of purchase power for a new tier')
    tier_events_min: int = Field(
        _POLICY.tier_events_min, ge=1,
        description='minimum number of events of a user before the first tier is published')
    intent_raise: Share = Field(
        _POLICY.intent_raise, description='an intent alert is raised at this purchase intent or above')
    intent_clear: Share = Field(
        _POLICY.intent_clear, description='purchase intent must fall to this before the next alert can be raised')
    churn_raise: Share = Field(_POLICY.churn_raise, description='a churn alert is raised at this churn score or above')
    churn_clear: Share = Field(
        _POLICY.churn_clear, description='a churn alert is cleared when the churn score falls to this')
    churn_orders_min: int = Field(
        _POLICY.churn_orders_min, ge=0, description='minimum number of orders of a shopper for a churn alert')
    power_cooldown_ms: Milliseconds = Field(
        _POLICY.power_cooldown_ms, description='minimum time between two tier changes of one user')
    intent_cooldown_ms: Milliseconds = Field(
        _POLICY.intent_cooldown_ms, description='minimum time between two intent alerts of one user')
    churn_cooldown_ms: Milliseconds = Field(
        _POLICY.churn_cooldown_ms, description='minimum time between two churn alerts of one user')
    power_ttl_ms: Milliseconds = Field(_POLICY.power_ttl_ms, description='time after which a tier change expires')
    intent_ttl_ms: Milliseconds = Field(_POLICY.intent_ttl_ms, description='time after which an intent alert expires')
    churn_ttl_ms: Milliseconds = Field(_POLICY.churn_ttl_ms, description='time after which a churn alert expires')
    reasons_rows_max: int = Field(
        _REPLAY.reasons_rows_max, ge=0, description='maximum number of model rows spent on the reasons of one step')
    actions: list[Action] = Field(
        default_factory=lambda: [Action(**msgspec.structs.asdict(rule)) for rule in _POLICY.actions],
        description='actions to propose; the first rule that matches is used')

    @model_validator(mode='after')
    def _thresholds_in_order(self) -> 'Settings':
        if self.intent_clear > self.intent_raise:
            raise ValueError('intent_clear is above intent_raise: an alert would be re-armed while it is raised')
        if self.churn_clear > self.churn_raise:
            raise ValueError('churn_clear is above churn_raise: an alert would be cleared while it is raised')
        if self.silence_days != sorted(set(self.silence_days)):
            raise ValueError('silence_days must ascend')
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def event_rules(self) -> EventRules:
        """The rules of the decoder."""
        return EventRules(self.currency, self.currency_rates, self.clock_ahead_ms_max, self.record_bytes_max)

    def window_limits(self) -> WindowLimits:
        """The limits of a window."""
        return WindowLimits(self.window_events_max, self.window_span_days * DAY_MS,
                            tuple(days * DAY_MS for days in self.silence_days))

    def policy(self) -> Policy:
        """The rules of decisions."""
        values = {name: getattr(self, name) for name in Policy.__struct_fields__ if name != 'actions'}
        return Policy(**values, actions=tuple(ActionRule(**action.model_dump()) for action in self.actions))

    def step_rules(self) -> StepRules:
        """The rules of the step driver."""
        return StepRules(limits=self.window_limits(), policy=self.policy(), publish=self.publish,
                         reasons_rows_max=self.reasons_rows_max)

    def replay_rules(self) -> ReplayRules:
        """All rules of a replay."""
        return ReplayRules(
            events=self.event_rules(), **msgspec.structs.asdict(self.step_rules()),
            block_events_max=self.block_events_max, block_span_ms_max=self.block_span_minutes_max * MINUTE_MS)


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """The settings in effect. A flag that is None was not given.

    config   TOML file; None: `stream.toml` in the working directory, if it exists
    Errors   UsageError that names each wrong setting.
    """
    if config and not config.is_file():
        what = f'{config} is not a file' if config.exists() else f'There is no settings file {config}'
        raise UsageError(f'{what}.', 'name an existing file with --config.')
    given = {name: value for name, value in flags.items() if value is not None}

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=config or CONFIG_FILE)

    try:
        return FromFile(**given)
    except ValidationError as error:
        wrong = '; '.join(_complaint(item) for item in error.errors())
        raise UsageError(
            f'Wrong settings: {wrong}.',
            'see `stream config` for the names. Write lists and tables as JSON, e.g. --set silence_days=[7,14].',
        ) from error
    except ValueError as error:     # the TOML file, or JSON in an environment variable, cannot be parsed
        raise UsageError(f'The settings cannot be read: {error}.',
                         f'correct {config or CONFIG_FILE}, or the variable STREAM_... in the environment.') from error


def _complaint(item: Any) -> str:
    """One of pydantic's errors as a clause."""
    name = '.'.join(map(str, item['loc'])) or 'settings'
    if item['type'] == 'extra_forbidden' and len(item['loc']) == 1:
        near = get_close_matches(name, Settings.model_fields, 1)
        return f'there is no setting {name}' + (f' (did you mean {near[0]}?)' if near else '')
    return f'{name}: {item["msg"]}'


def as_toml(settings: Settings) -> str:
    """The effective settings as TOML, each with its description; secrets are masked.

    Plain settings come first: in TOML whatever follows a table belongs to it.
    """
    values = settings.model_dump(mode='json')
    plain, tables = [], []
    for name, field in type(settings).model_fields.items():
        default = field.get_default(call_default_factory=True)
        note = ''
        if getattr(settings, name) != default:
            shown = type(settings).model_construct(**{name: default}).model_dump(mode='json', include={name})[name]
            note = f' (default: {msgspec.json.encode(shown).decode()})'
        text = f'# {field.description}{note}\n{tomli_w.dumps({name: values[name]})}'
        (tables if text.splitlines()[1].startswith('[') else plain).append(text)
    return '\n'.join(plain + tables)


def unknown_variables() -> list[str]:
    """Names in the environment that look like settings but are not, e.g. misspelled ones."""
    known = {f'STREAM_{name}'.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith('STREAM_') and name.upper() not in known)
