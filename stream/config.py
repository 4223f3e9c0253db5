"""Every setting: its unit, its default, and where it may come from.

A setting is read from a TOML file, then from the environment (`STREAM_<NAME>`), then from the command line; the later
one wins. `stream config` prints what is in effect.
"""
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field, SecretStr, ValidationError, model_validator
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
    """Propose `action` on an occasion to shoppers whose tier lies in [tier_min, tier_max]; -1 is no tier yet."""

    occasion: Occasion
    action: str
    tier_min: int = NO_TIER
    tier_max: int = 100
    spend_min: float = Field(0.0, ge=0)


class Settings(BaseSettings):
    """All settings with their defaults; names end with their unit."""

    model_config = SettingsConfigDict(env_prefix='STREAM_', extra='forbid')

    model: Path = Field(SHIPPED_MODEL, description='folder of the model version that scores')
    scorer: Literal['embedded', 'triton', 'constant'] = Field(
        'embedded', description='embedded: onnxruntime in the process; triton: Triton Inference Server; '
                                'constant: the same scores for everybody')
    scorer_threads: int = Field(1, ge=1, description='threads of one embedded model run')
    batch_rows_max: int = Field(256, ge=1, le=256, description='windows in one request to the model')
    triton: Address = Field('127.0.0.1:8001', description="host:port of Triton's gRPC service")
    triton_timeout_ms: Milliseconds = Field(10_000, description='for one batch, with all retries')
    triton_in_flight_max: int = Field(16, ge=1, le=64, description='requests in flight to Triton at once')
    fallback: Literal['hold', 'embedded'] = Field(
        'hold', description='while Triton is away: hold the events, or score with the embedded copy of the same model')
    publish: Publish = Field(
        'changes', description='changes: decisions only; all: also the scores of every scored user; '
                               'events: also one output per event, with the scores at the end of its step')
    state: Literal['memory', 'rocksdb'] = Field('memory', description="where a replay keeps the users' records")
    block_events_max: int = Field(
        _REPLAY.block_events_max, ge=1, le=100_000,
        description='events folded and scored together: a shopper is scored at the end of such a step')
    block_span_minutes_max: int = Field(
        _REPLAY.block_span_ms_max // MINUTE_MS, ge=1, le=3 * 1440,
        description='time that a step of a replay may span; shorter ones score more states and take longer')

    brokers: str = Field('127.0.0.1:9092', min_length=1, description='Kafka bootstrap servers, host:port, by commas')
    group: Name = Field('stream', description="consumer group; also the first part of the changelog topic's name")
    instance_id: str = Field(
        '', description='static group membership: a name of this worker that outlives its restarts; empty: none')
    clicks_topic: Name = Field('clicks', description='input')
    carts_topic: Name = Field('carts', description='input, with as many partitions')
    alerts_topic: Name = Field('alerts', description='decisions; kept by time, never compacted')
    scores_topic: Name = Field(
        'scores', description="each scored user's newest scores, compacted; written where publish is not `changes`")
    dead_letters_topic: Name = Field('dead-letters', description='what could not be read, as it came, with the reason')
    journal_topic: str = Field(
        '', description='one record per step, so that a replay can make the same steps; empty: none is written')
    partitions: int = Field(8, ge=1, le=10_000, description='of topics that are created')
    replication: int = Field(1, ge=1, le=10, description='of topics that are created')
    alerts_retention_days: Days = Field(7, description='of topics that are created: alerts, dead letters, journal')
    partitioner: PartitionerName = Field(
        'murmur2', description="how the producers of the inputs choose a partition (murmur2: Java, crc32: librdkafka's "
                               'consistent_random, fnv1a: librdkafka and Sarama); a key elsewhere is a dead letter; '
                               'none: do not check')
    session_timeout_ms: Milliseconds = Field(10_000, description='after which the group gives up a silent worker')
    max_poll_interval_ms: Milliseconds = Field(300_000, description='after which a worker that does not poll leaves')
    commit_interval_ms: Milliseconds = Field(1_000, description='between two commits of offsets')
    send_timeout_ms: Milliseconds = Field(120_000, description='for a record to be acknowledged; then the worker exits')
    drain_timeout_ms: Milliseconds = Field(
        20_000, description='for steps in flight to end when partitions are taken away, or the worker stops')
    recovery_timeout_ms: Milliseconds = Field(
        1_800_000, description='for the state of a partition to be read back; then the worker exits')
    stuck_timeout_ms: Milliseconds = Field(
        60_000, description='without a step while events wait and the scorer answers; then the worker exits')
    standbys: int = Field(0, ge=0, le=10, description='workers that keep a copy of a partition ready, beside its owner')
    merge_wait_ms: Milliseconds = Field(
        500, description='how long events of one topic wait for earlier ones of the other that are on their way')
    clock: Literal['events', 'wall'] = Field(
        'events', description='what moves silence timers: the times of events alone, or also the time of day '
                              'while everything has been read')
    clock_grace_ms: Milliseconds = Field(
        60_000, description='how far the time of day stays behind with `clock = wall`')
    clock_idle_ms_max: Milliseconds = Field(
        3_600_000, description='with `clock = wall`: the time of day counts only while the newest event is not older')
    blocks_ahead_max: int = Field(2, ge=1, le=100, description='blocks of a topic partition that wait in memory')
    events_in_flight_max: int = Field(
        16_000, ge=1, description='events of steps under way, over all partitions; one run of events is always let in')
    sweep_users_max: int = Field(500, ge=1, le=100_000, description='silence timers fired in one step')
    state_dir: Path = Field(Path('state'), description="folder of the worker's RocksDB databases")
    users_cached_mib: int = Field(
        64, ge=0, description="users kept decoded, over all partitions and beyond steps in flight")
    rocksdb_cache_mib: int = Field(128, ge=8, description='block cache over all partitions')
    rocksdb_write_buffers_mib: int = Field(128, ge=8, description='write buffers over all partitions')
    admin_host: str = Field('127.0.0.1', description='where health and metrics are served')
    admin_port: int = Field(9108, ge=0, le=65_535, description='0: any free port')

    currency: Currency = Field(_EVENTS.currency, description='ISO 4217 code of all amounts')
    currency_rates: dict[Currency, Rate] = Field(
        default_factory=dict, description='units of `currency` for one unit of another; any other is refused')
    clock_ahead_ms_max: Milliseconds = Field(
        _EVENTS.clock_ahead_ms_max, description="how far an event's time may be ahead of its Kafka record's")
    record_bytes_max: int = Field(_EVENTS.record_bytes_max, ge=64, description='larger records are dead letters')

    window_events_max: int = Field(_LIMITS.events_max, ge=1, le=65_535, description='events kept per user')
    window_span_days: Days = Field(
        _LIMITS.span_ms // DAY_MS, description='no event older than this before the newest one is kept')
    silence_days: list[Days] = Field(
        default_factory=lambda: [delay_ms // DAY_MS for delay_ms in _LIMITS.silence_ms], max_length=255,
        description='days without an event after which a user is scored again')

    tier_margin: Annotated[float, Field(ge=0, le=0.5)] = Field(
        _POLICY.tier_margin, description='how much more than half of the probability must lie beyond the old tier')
    power_move_min: Share = Field(
        _POLICY.power_move_min, description='how far purchase power must have moved for a new tier')
    tier_events_min: int = Field(_POLICY.tier_events_min, ge=1, description='events before the first tier is published')
    intent_raise: Share = Field(_POLICY.intent_raise, description='purchase intent at which an alert is raised')
    intent_clear: Share = Field(_POLICY.intent_clear, description='purchase intent at which the alert is re-armed')
    churn_raise: Share = Field(_POLICY.churn_raise, description='churn at which an alert is raised')
    churn_clear: Share = Field(_POLICY.churn_clear, description='churn at which the alert is cleared')
    churn_orders_min: int = Field(
        _POLICY.churn_orders_min, ge=0, description='orders that a shopper must have had for a churn alert')
    power_cooldown_ms: Milliseconds = Field(
        _POLICY.power_cooldown_ms, description='between two tier changes of one user')
    intent_cooldown_ms: Milliseconds = Field(
        _POLICY.intent_cooldown_ms, description='between two intent alerts of one user')
    churn_cooldown_ms: Milliseconds = Field(
        _POLICY.churn_cooldown_ms, description='between two churn alerts of one user')
    power_ttl_ms: Milliseconds = Field(_POLICY.power_ttl_ms, description='after which a tier change expires')
    intent_ttl_ms: Milliseconds = Field(_POLICY.intent_ttl_ms, description='after which an intent alert expires')
    churn_ttl_ms: Milliseconds = Field(_POLICY.churn_ttl_ms, description='after which a churn alert expires')
    reasons_rows_max: int = Field(
        _REPLAY.reasons_rows_max, ge=0, description='model rows that the reasons of one step may cost')
    actions: list[Action] = Field(
        default_factory=lambda: [Action(**msgspec.structs.asdict(rule)) for rule in _POLICY.actions],
        description='proposed actions; the first rule that fits')

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
        """What the decoder needs."""
        return EventRules(self.currency, self.currency_rates, self.clock_ahead_ms_max, self.record_bytes_max)

    def window_limits(self) -> WindowLimits:
        """What the fold needs."""
        return WindowLimits(self.window_events_max, self.window_span_days * DAY_MS,
                            tuple(days * DAY_MS for days in self.silence_days))

    def policy(self) -> Policy:
        """What the decisions need."""
        values = {name: getattr(self, name) for name in Policy.__struct_fields__ if name != 'actions'}
        return Policy(**values, actions=tuple(ActionRule(**action.model_dump()) for action in self.actions))

    def step_rules(self) -> StepRules:
        """What the step driver needs."""
        return StepRules(limits=self.window_limits(), policy=self.policy(), publish=self.publish,
                         reasons_rows_max=self.reasons_rows_max)

    def replay_rules(self) -> ReplayRules:
        """What a replay needs."""
        return ReplayRules(
            events=self.event_rules(), **msgspec.structs.asdict(self.step_rules()),
            block_events_max=self.block_events_max, block_span_ms_max=self.block_span_minutes_max * MINUTE_MS)


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """The settings in effect. `flags` that are None were not given.

    config   TOML file; None: `stream.toml` of the working directory, if there is one
    Errors   UsageError that names each wrong setting.
    """
    if config and not config.is_file():
        what = f'{config} is no file' if config.exists() else f'There is no settings file {config}'
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
            'see `stream config` for the names; lists and tables are JSON, e.g. --set silence_days=[7,14].') from error
    except ValueError as error:     # the TOML file, or JSON in an environment variable, cannot be parsed
        raise UsageError(f'The settings cannot be read: {error}.',
                         f'correct {config or CONFIG_FILE}, or the variable STREAM_... in the environment.') from error


def _complaint(item: Any) -> str:
    """One of pydantic's errors, for a person."""
    name = '.'.join(map(str, item['loc'])) or 'settings'
    if item['type'] == 'extra_forbidden' and len(item['loc']) == 1:
        near = get_close_matches(name, Settings.model_fields, 1)
        return f'there is no setting {name}' + (f', did you mean {near[0]}?' if near else '')
    return f'{name}: {item["msg"]}'


def render(settings: Settings) -> str:
    """The effective settings as TOML with descriptions; secrets are masked."""
    lines = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        default = field.get_default(call_default_factory=True)
        note = '' if value == default else f' (default: {_toml(default)})'
        lines += [f'# {field.description}{note}', f'{name} = {_toml(value)}', '']
    return '\n'.join(lines)


def unknown_variables() -> list[str]:
    """Names in the environment that look like settings and are none, e.g. for a slip of the pen."""
    known = {f'STREAM_{name}'.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith('STREAM_') and name.upper() not in known)


def _toml(value: Any) -> str:
    match value:
        case SecretStr():
            return '"**********"'
        case bool():
            return str(value).lower()
        case BaseModel():
            return _toml(value.model_dump())
        case dict():
            return '{' + ', '.join(f'{key} = {_toml(entry)}' for key, entry in value.items()) + '}'
        case list() | tuple():
            return '[' + ', '.join(_toml(entry) for entry in value) + ']'
        case int() | float():
            return str(value)
        case _:
            return msgspec.json.encode(str(value)).decode()
