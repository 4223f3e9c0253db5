"""The commands that talk to Kafka: topics, check, publish and record."""
import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stream.cli.shared import (
    AsJson,
    ConfigFile,
    FormatName,
    Overrides,
    collect_seldom,
    effective_settings,
    format_of,
    parsed,
    progress_bar,
    say,
    written,
)
from stream.config import load_settings
from stream.errors import UsageError

if TYPE_CHECKING:
    from stream.engine.preflight import CheckResult
    from stream.replay.record import Recorded


app = typer.Typer()


@app.command()
def topics(
    dry_run: Annotated[bool, typer.Option('--dry-run', help='Show the topics and create none.')] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Show the worker's topics, create those that are missing, and report those that do not match the settings."""
    from stream.kafka.topics import as_error, survey, topic_specs
    settings = effective_settings(config, **parsed(overrides))
    found = asyncio.run(survey(settings, create=not dry_run))
    if as_json:
        _print_json(found)
    else:
        table = Table()
        for column in ('topic', 'role', 'partitions', 'replicas', 'cleanup', 'retention', 'state'):
            table.add_column(column, justify='right' if column in ('partitions', 'replicas') else 'left')
        missing = {entry.spec.name: entry for entry in found.missing}
        for topic in topic_specs(settings):
            if topic.name in missing:
                table.add_row(topic.name, topic.role, str(missing[topic.name].partitions), str(settings.replication),
                              topic.config.get('cleanup.policy', "the brokers'"), _days(topic.config), 'missing')
                continue
            there = found.found[topic.name]
            levels = {finding.level for finding in found.findings if finding.topic == topic.name}
            state = next((level for level in ('problem', 'warning') if level in levels),
                         'created' if topic.name in found.created else 'ok')
            table.add_row(topic.name, topic.role, str(there.partitions), str(there.replication),
                          there.config.get('cleanup.policy', 'hidden'), _days(there.config), state)
        Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    for finding in found.warnings:
        say(f'warning: {finding.problem} Do: {finding.do}')
    if found.problems:
        raise as_error(found)


@app.command()
def check(
    as_json: Annotated[bool, typer.Option('--json', help='Print the results as JSON, one per line.')] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Check settings, brokers, topics, partitioner, group, model, Triton and this machine, and say what to do.

    Changes nothing. The exit code is that of the first problem.
    """
    from stream.engine.preflight import problem, run_checks

    async def run() -> int:
        exit_code = 0
        try:
            settings = load_settings(config, **parsed(overrides))
        except UsageError as error:
            show(problem('settings', error))
            return error.exit_code
        async for result in run_checks(settings):
            show(result)
            exit_code = exit_code or result.exit_code
        return exit_code

    def show(result: 'CheckResult') -> None:
        if as_json:
            _print_json(result)
        else:
            text = Text.assemble((f'{result.outcome:8}', _COLOURS[result.outcome]), f'{result.check:12}', result.text)
            console.print(text.append(f' Do: {result.do}') if result.do else text)

    console = Console(highlight=False, soft_wrap=True)
    sys.exit(asyncio.run(run()))


_COLOURS = {'ok': 'green', 'warning': 'yellow', 'problem': 'bold red'}


@app.command()
def publish(
    files: Annotated[list[Path], typer.Argument(metavar='FILE...', help='Recorded files; also .gz and .zst.')],
    format_name: FormatName = 'events',
    rate: Annotated[float, typer.Option(
        min=0, metavar='EVENTS_PER_S', help='Rows per second; 0: as fast as the brokers accept them.')] = 0,
    shift_to_now: Annotated[bool, typer.Option(
        '--shift-to-now', help='Move all times by the same amount, so that the newest event happens now.')] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar='N', help='Stop after this number of rows.')] = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Send recorded events to the input topics, in event-time order, with the user as key.

    A row that is not an event is sent unchanged, so that the worker makes it a dead letter.
    """
    from stream.replay.publish import PublishOptions
    from stream.replay.publish import publish as send
    from stream.replay.recording import Recording
    settings = effective_settings(config, **parsed(overrides))
    collect_seldom()
    with progress_bar() as progress:
        recording = Recording(files, format_of(format_name, settings))
        task = progress.add_task('reading times', total=None)
        recording.scan(lambda rows: progress.update(task, completed=rows))
        total = recording.rows if limit is None else min(limit, recording.rows)
        progress.reset(task, description='publishing', total=total)
        sent = asyncio.run(send(recording, settings, PublishOptions(rate, shift_to_now, limit),
                                lambda rows: progress.advance(task, rows)))
    for warning in sent.warnings:
        say(f'warning: {warning}')
    if as_json:
        _print_json(sent)
        return
    more = [f'{count:,} {what}' for count, what in (
        (sent.no_events, 'rows that are not events'), (sent.too_large, 'rows too large for Kafka, not sent'),
        (sent.ahead, 'rows with a time in the future')) if count]
    say(f'{sent.rows:,} rows in {sent.seconds:.1f} s ({sent.rows / max(sent.seconds, 1e-3):,.0f}/s): '
        + ', '.join([f'{sent.clicks:,} to {settings.clicks_topic}', f'{sent.carts:,} to {settings.carts_topic}', *more])
        + (f'. Times moved by {sent.shift_ms / 86_400_000:.1f} days.' if sent.shift_ms else '.'))


@app.command()
def record(
    topic: Annotated[list[str] | None, typer.Argument(
        metavar='[TOPIC]...', help='Topics to record (default: the input topics).')] = None,
    out: Annotated[Path, typer.Option(
        metavar='FILE', help='File to write: .jsonl, .jsonl.gz or .jsonl.zst.')] = Path('recorded.jsonl.zst'),
    follow: Annotated[bool, typer.Option(
        '--follow/--until-now', help='Record until stopped (Ctrl-C), or up to the present end of the topics.')] = False,
    start: Annotated[str, typer.Option(
        '--from', metavar='beginning|OFFSET|TIME', help='Where to start: at the oldest record, at an offset in '
                                                        'every partition, or at a record time.',
    )] = 'beginning',
    as_json: AsJson = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Record topics in a file that `stream replay --format kafka` reads."""
    from stream.replay.compression import compressed
    from stream.replay.record import check_target
    from stream.replay.record import record as read
    settings = effective_settings(config, **parsed(overrides))
    check_target(out)
    names = topic or [settings.clicks_topic, settings.carts_topic]

    async def run() -> 'Recorded':
        stop = asyncio.Event() if follow else None
        if stop:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            say(f'recording {", ".join(names)} until stopped (Ctrl-C)')
        return await read(settings, names, stream.write, start, stop,
                          lambda done, total: progress.update(task, completed=done, total=total))

    with progress_bar() as progress, written(out) as file, compressed(file, out) as stream:
        task = progress.add_task('recording', total=None)
        account = asyncio.run(run())
    if as_json:
        _print_json(account)
        return
    total = sum(account.records.values())
    say(f'{total:,} records in {account.seconds:.1f} s: '
        + ', '.join(f'{count:,} of {name}' for name, count in account.records.items())
        + (f'; {account.missing:,} offsets without a committed record' if account.missing else '') + f'. {out}')


def _print_json(value: object) -> None:
    sys.stdout.write(orjson.dumps(msgspec.to_builtins(value)).decode() + '\n')


def _days(config: dict[str, str]) -> str:
    """The retention of a topic whose records are deleted by time, in words."""
    text = config.get('retention.ms', '')
    if 'delete' not in config.get('cleanup.policy', '') or not text:
        return '-'
    return 'forever' if text == '-1' else f'{int(text) / 86_400_000:g} days'
