"""The reference pages, generated from the code: settings, metrics, commands, events and messages.

    python -m tests.reference        writes every page; tests/test_reference.py fails while one is stale

Settings come from `stream.config`, metrics from `stream.metrics`, commands from the command line itself, exit codes
from `stream.errors`, events from `EventRecord`. What a message contains comes from the messages of tests/golden, which
the core makes; what each field means is written here, and a field without a meaning is an error.
"""
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main
from prometheus_client.metrics import MetricWrapperBase
from typer.core import TyperArgument, TyperGroup, TyperOption

from stream.cli.main import app
from stream.config import Settings
from stream.core.events import Reason, json_schema
from stream.core.partitioners import MISROUTED
from stream.errors import StreamError
from stream.metrics import Metrics

ROOT = Path(__file__).parents[1]
COMMAND = '.venv/bin/python -m tests.reference'
NOTE = f'<!-- Generated from the code. Do not edit; run: {COMMAND} -->\n'

# The first setting of each part of `stream.config.Settings`.
PARTS = {
    'model': 'Scoring',
    'publish': 'Output and steps',
    'brokers': 'Kafka',
    'merge_wait_ms': 'Time',
    'blocks_ahead_max': 'Memory and storage',
    'admin_host': 'Health and metrics',
    'currency': 'Events',
    'window_events_max': 'Windows and timers',
    'tier_margin': 'Decisions',
}
UNITS = {'_ms': 'milliseconds', '_ms_max': 'milliseconds', '_minutes_max': 'minutes', '_days': 'days', '_mib': 'MiB',
         '_bytes_max': 'bytes'}

# (type, meaning) of each field of a message.
FIELDS: dict[str, tuple[str, str]] = {
    'id': ('string', 'Identifies the message. The same decision always has the same id and the same bytes.'),
    'type': ('string', 'The kind of message; also the CloudEvents type.'),
    'user_id': ('string', 'The shopper; also the Kafka key.'),
    'as_of_ms': ('integer', 'The event time at which the scores are valid, in Unix milliseconds.'),
    'events_seen': ('integer', 'How many events of this shopper have been applied so far.'),
    'cause': ('object', 'What led to this message.'),
    'cause.clicks_offset': ('integer', "The first offset of the clicks topic that is not yet in the shopper's state. "
                                       'In a replay of a file: a row number.'),
    'cause.carts_offset': ('integer', 'The same for the carts topic.'),
    'cause.timer_ms': ('integer or null', 'When the silence timer that fired was due, in Unix milliseconds; `null` if '
                                          'an event led to the message.'),
    'model': ('object', 'The model that scored.'),
    'model.name': ('string', 'Its name in the model repository.'),
    'model.version': ('string', 'Its version.'),
    'model.sha256': ('string', 'The SHA-256 of its weights.'),
    'event_id': ('string', 'The event that this output answers. Only with `publish = events`.'),
    'state': ('string', '`raised` or `cleared`.'),
    'scores': ('object', 'The scores at `as_of_ms`.'),
    'scores.purchase_intent': ('number', 'Probability of a purchase within 7 days, rounded to 0.0001.'),
    'scores.purchase_power': ('number', 'The expected tier divided by the highest tier: 0 to 1.'),
    'scores.churn': ('number', 'Probability of no purchase within 30 days, rounded to 0.0001.'),
    'scores.expected_spend_90d': ('number', 'Expected spend in the next 90 days, in the configured currency.'),
    'tier_probabilities': ('array of numbers', 'Probability of each tier of spend, lowest tier first.'),
    'tier': ('integer or null', 'The median tier of spend in the next 90 days: 0 is nothing, the highest is top. '
                                '`null` until the shopper has `tier_events_min` events.'),
    'previous_tier': ('integer or null', 'The tier before this change; `null` if there was none.'),
    'reasons': ('array or null', 'Up to three things that moved the score most, strongest first. `null` for a first '
                                 'tier, or if the step had used up `reasons_rows_max`.'),
    'reasons[].name': ('string', 'An event type, or one of `silence`, `history`, `orders`, `activity`.'),
    'reasons[].text': ('string', 'The same in words.'),
    'reasons[].ts_ms': ('integer', 'When it happened. Only for events.'),
    'reasons[].amount': ('number', 'What it was worth. Only for events.'),
    'reasons[].effect': ('number', 'The score minus the score without this thing: positive raised the score.'),
    'action': ('string or null', 'What the `actions` setting proposes for this occasion; `null` if nothing fits.'),
    'expires_at_ms': ('integer', 'Do not act on the message after this time, in Unix milliseconds.'),
    'previous_id': ('string or null', "The id of the shopper's previous decision; `null` for the first."),
}

REASONS: dict[str, str] = {
    Reason.NULL_VALUE: 'The record has no value.',
    Reason.EMPTY_VALUE: 'The value has no bytes.',
    Reason.TOO_LARGE: 'The value is larger than `record_bytes_max`.',
    Reason.INVALID_UTF8: 'The value is not UTF-8.',
    Reason.INVALID_JSON: 'The value is not strict JSON.',
    Reason.TOO_DEEP: 'The value is nested too deeply to be read.',
    Reason.MISSING_FIELD: 'A required field is missing.',
    Reason.INVALID_FIELD: 'A field has the wrong type, or a value out of range.',
    Reason.TS_UNREADABLE: '`ts` is text, but not RFC 3339 with an offset.',
    Reason.TS_NOT_POSITIVE: '`ts` is zero or negative.',
    Reason.TS_IN_SECONDS: '`ts` is before 1973: it is probably in seconds. Send milliseconds.',
    Reason.TS_OUT_OF_RANGE: '`ts` is after 2100-01-01.',
    Reason.TS_AHEAD_OF_CLOCK: "`ts` is further ahead of the Kafka record's timestamp than `clock_ahead_ms_max`.",
    Reason.UNKNOWN_CURRENCY: '`currency` is not the configured one, and `currency_rates` has no rate for it.',
    Reason.NULL_KEY: 'The Kafka record has no key.',
    Reason.KEY_MISMATCH: 'The Kafka key is not the `user_id`.',
    MISROUTED: 'The record is on another partition than the `partitioner` setting gives for its key.',
}


def pages() -> dict[Path, str]:
    """The text of every page, by its path."""
    return {
        ROOT / 'deploy' / 'SETTINGS.md': settings_page(),
        ROOT / 'deploy' / 'METRICS.md': metrics_page(),
        ROOT / 'stream' / 'cli' / 'COMMANDS.md': commands_page(),
        ROOT / 'stream' / 'core' / 'MESSAGES.md': messages_page(),
    }


# ---- settings -------------------------------------------------------------------------------------------------------

def settings_page() -> str:
    """Every setting: its type or unit, default, environment variable and meaning."""
    properties = Settings.model_json_schema()['properties']
    if lost := PARTS.keys() - properties.keys():
        raise KeyError(f'PARTS names settings that do not exist: {", ".join(sorted(lost))}')
    lines = ['# Settings', '',
             'A setting is read from `stream.toml`, then from its environment variable, then from `--set NAME=VALUE` '
             'or its own flag. The later one wins. In the environment and with `--set`, lists and tables are JSON. '
             '`stream config` prints the settings in effect. A variable '
             '`STREAM_...` that is not a setting causes a warning.']
    for name, field in Settings.model_fields.items():
        if name in PARTS:
            lines += ['', f'## {PARTS[name]}', '', '| Setting | Type | Default | Meaning |', '|---|---|---|---|']
        default = field.get_default(call_default_factory=True)
        lines.append(_row(f'`{name}`<br>`STREAM_{name.upper()}`', _type(name, properties[name]), _default(default),
                          field.description or ''))
    return _page(lines)


def _type(name: str, schema: dict[str, Any]) -> str:
    if 'enum' in schema:
        return ', '.join(f'`{value}`' for value in schema['enum'])
    kind = schema.get('type', '')
    unit = next((UNITS[suffix] for suffix in sorted(UNITS, key=len, reverse=True) if name.endswith(suffix)), '')
    if kind in ('integer', 'number'):
        low, high = schema.get('minimum'), schema.get('maximum')
        bounds = (f'{low:,} to {high:,}' if low is not None and high is not None and high < 1e9
                  else f'at least {low:,}' if low else '')
        return ', '.join(filter(None, (unit or {'integer': 'integer', 'number': 'number'}[kind], bounds)))
    if kind == 'array':
        return f'list of {unit or "tables"}'
    return 'table' if kind == 'object' else 'path' if schema.get('format') == 'path' else 'text'


def _default(value: Any) -> str:
    if isinstance(value, (list, dict)):
        if value and not isinstance(value, dict) and hasattr(value[0], 'model_dump'):
            return 'see [deploy/README.md](README.md#actions)'
        return f'`{json.dumps(value)}`' if value else 'empty'
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f'{value:,}'
    return f'`{value}`' if value != '' else 'empty'


# ---- metrics --------------------------------------------------------------------------------------------------------

def metrics_page() -> str:
    """Every metric: its name, kind, labels and meaning."""
    lines = ['# Metrics', '',
             'The worker serves these at `/metrics` in the Prometheus format. No metric names a user, an event or a '
             'key.', '', '| Metric | Kind | Labels | Meaning |', '|---|---|---|---|']
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            family = next(iter(metric.describe()))
            labels = metric._labelnames         # the library tells them nowhere else before a series exists
            lines.append(_row(f'`{_series(family.name, family.type)}`', _kind(family.type),
                              ', '.join(f'`{label}`' for label in labels), family.documentation))
    lines += ['', 'The standard `process_*` metrics of the Prometheus client (CPU, memory, open files, start time) are '
              'served beside them.']
    return _page(lines)


def _series(name: str, kind: str) -> str:
    return f'{name}_total' if kind == 'counter' else f'{name}_info' if kind == 'info' else name


def _kind(kind: str) -> str:
    return {'stateset': 'state set'}.get(kind, kind)


# ---- commands -------------------------------------------------------------------------------------------------------

def commands_page() -> str:
    """Every command with its arguments and options, and the exit codes."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    used = Counter(_identity(option) for command in group.commands.values() for option in _options(command))
    shared = {identity for identity, count in used.items() if count >= 3}
    by_identity = {_identity(option): option for command in group.commands.values() for option in _options(command)}
    lines = ['# Commands', '', _words(group.help), '',
             '`stream` is `.venv/bin/stream`, or the command of the Docker image. `stream COMMAND --help` prints the '
             'same for one command.', '',
             '## Exit codes', '', '| Code | Meaning |', '|---|---|',
             *(_row(str(code), text) for code, text in exit_codes()), '',
             '## Options of several commands', '',
             *_option_table(option for identity, option in by_identity.items() if identity in shared)]
    for name, command in group.commands.items():
        arguments = [param for param in command.params if isinstance(param, TyperArgument)]
        usage = ' '.join(['stream', name, *(param.metavar or str(param.name).upper() for param in arguments),
                          '[OPTIONS]'])
        lines += ['', f'## stream {name}', '', f'    {usage}', '', _words(command.help)]
        own = [option for option in _options(command) if _identity(option) not in shared]
        others = [option.opts[0] for option in _options(command) if _identity(option) in shared]
        if arguments or own:
            lines += ['', *_option_table([*arguments, *own])]
        if others:
            lines += ['', f'Also: {", ".join(f"`{name}`" for name in others)}.']
    return _page(lines)


def exit_codes() -> Iterator[tuple[int, str]]:
    """Each exit code with its meaning."""
    yield 0, 'Done.'
    yield StreamError.exit_code, 'The file system (a path, its rights, or the disk), or an unexpected failure.'
    kinds = [kind for kind in StreamError.__subclasses__() if 'exit_code' in vars(kind)]
    for kind in sorted(kinds, key=lambda kind: kind.exit_code):
        yield kind.exit_code, re.sub(r'\s+', ' ', kind.__doc__ or '').strip()
    yield 130, 'Stopped by Ctrl-C.'
    yield 143, 'Stopped by SIGTERM. (`stream worker` stops cleanly at SIGTERM and exits with 0.)'


def _options(command: Any) -> list[TyperOption]:
    return [param for param in command.params if isinstance(param, TyperOption)]


def _identity(option: TyperOption) -> tuple[str, str, str]:
    return option.opts[0], option.help or '', str(option.default)


def _option_table(params: Iterable[TyperArgument | TyperOption]) -> list[str]:
    lines = ['| Option | Default | Meaning |', '|---|---|---|']
    for param in params:
        help_text = _words(getattr(param, 'help', '') or '')
        if isinstance(param, TyperArgument):
            lines.append(_row(f'`{param.metavar or str(param.name).upper()}`', 'required' if param.required else '',
                              help_text))
            continue
        name = '/'.join([*param.opts, *param.secondary_opts])
        takes = '' if getattr(param, 'is_flag', False) else f' {param.metavar or _value(param)}'
        lines.append(_row(f'`{name}{takes}`', 'required' if param.required else _option_default(param), help_text))
    return lines


def _value(option: TyperOption) -> str:
    return 'TEXT' if isinstance(option.default, str) else 'N'


def _option_default(option: TyperOption) -> str:
    value = option.default
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return f'`{(option.opts if value else option.secondary_opts)[0]}`' if option.secondary_opts else ''
    return '' if value is None or value == '' else f'`{value}`'


# ---- events and messages --------------------------------------------------------------------------------------------

def messages_page() -> str:
    """The fields of events and messages, and why a record becomes a dead letter."""
    lines = ['# Events and messages', '',
             '[The guide](README.md) explains how to read them.', '', '## Fields of an event', '',
             '| Field | Type | Required | Meaning |', '|---|---|---|---|']
    schema = json_schema()
    event = schema['$defs'][schema['$ref'].rsplit('/', 1)[1]]
    for name, field in event['properties'].items():
        shapes = [shape for shape in field.get('anyOf', [field]) if shape.get('type') != 'null']
        meaning = field.get('description') or next((shape['description'] for shape in shapes if 'description' in shape),
                                                   '')
        if not meaning:
            raise KeyError(f'EventRecord.{name} has no description')
        lines.append(_row(f'`{name}`', ' or '.join(map(_shape, shapes)), 'yes' if name in event['required'] else '',
                          meaning))
    messages = [json.loads(line) for line in (ROOT / 'tests/golden/messages.jsonl').read_text().splitlines()]
    holders: dict[str, list[str]] = {}
    for message in messages:
        for path in message_fields(message):
            if message['type'] not in holders.setdefault(path, []):
                holders[path].append(message['type'])
    kinds = list(dict.fromkeys(message['type'] for message in messages))
    if wrong := holders.keys() ^ FIELDS.keys():
        raise KeyError(f'FIELDS and the messages differ in: {", ".join(sorted(wrong))}')
    lines += ['', '## Fields of a message', '',
              'The column "In" names the messages that have a field. If it is empty, all messages have the field.', '',
              '| Field | Type | In | Meaning |', '|---|---|---|---|']
    for path in FIELDS:
        inside = [] if len(holders[path]) == len(kinds) or '.' in path else holders[path]
        lines.append(_row(f'`{path}`', FIELDS[path][0], ', '.join(f'`{kind}`' for kind in inside), FIELDS[path][1]))
    if wrong := REASONS.keys() ^ {*Reason, MISROUTED}:
        raise KeyError(f'REASONS and the code differ in: {", ".join(sorted(wrong))}')
    lines += ['', '## Reasons of dead letters', '', '| Reason | Meaning |', '|---|---|',
              *(_row(f'`{reason}`', text) for reason, text in REASONS.items())]
    return _page(lines)


def message_fields(message: dict[str, Any]) -> Iterator[str]:
    """The paths of a message's fields: `scores.churn`, `reasons[].text`."""
    for name, value in message.items():
        yield name
        if isinstance(value, dict):
            yield from (f'{name}.{inner}' for inner in value)
        elif isinstance(value, list):
            for entry in value:
                if isinstance(entry, dict):
                    yield from (f'{name}[].{inner}' for inner in entry)


def _shape(shape: dict[str, Any]) -> str:
    low, high = shape.get('minimum', shape.get('exclusiveMinimum')), shape.get('maximum')
    if 'maxLength' in shape:
        least = shape.get('minLength', 0)
        return f'string of {f"{least} to " if least != shape["maxLength"] else ""}{shape["maxLength"]} characters'
    bounds = '' if high is None else f' {"above " if "exclusiveMinimum" in shape else ""}{low:g} to {high:,.0f}'
    return f'{shape["type"]}{bounds}'


# ---- Markdown -------------------------------------------------------------------------------------------------------

def _row(*cells: str) -> str:
    return '| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in cells) + ' |'


def _words(text: str | None) -> str:
    """Help text as Markdown: rich's bold names become code, `<NAME>` stays visible."""
    plain = re.sub(r'\[bold\](.*?)\[/bold\]', r'`\1`', text or '')
    return re.sub(r'\s*\n\s*', ' ', plain).replace('<', '&lt;').strip()


def _page(lines: Sequence[str]) -> str:
    return NOTE + '\n'.join(lines).rstrip() + '\n'


def main() -> None:
    """Write every page that differs."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT), file=sys.stderr)


if __name__ == '__main__':
    main()
