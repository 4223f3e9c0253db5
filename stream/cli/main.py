"""The command line. Each command is a thin shell: settings in, files in and out, a summary, an exit code."""
import asyncio
import errno
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import msgspec
import orjson
import typer

from stream.cli.kafka import app as kafka_commands
from stream.cli.learn import app as learn_commands
from stream.cli.shared import (
    AsJson,
    ConfigFile,
    FormatName,
    Overrides,
    amounts_in,
    collect_seldom,
    effective_settings,
    format_of,
    inputs_of,
    parsed,
    processes_of,
    progress_bar,
    say,
    written,
)
from stream.cli.summary import ReplayOutcome, print_alerts, print_seen, print_summary
from stream.cli.worker import app as worker_commands
from stream.config import Settings, as_toml
from stream.errors import INSTALL_REPORT, InputError, StreamError, UsageError, extra_module

if TYPE_CHECKING:
    from stream.replay.processes import ShardProcesses
    from stream.replay.topic_records import Inputs

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode='rich',
    help='Real-time shopper scoring: click and cart events in, purchase-power scores and churn alerts out.',
    epilog='Exit codes: 0 done, 1 file system, '
           '2 wrong command or setting, 3 unreadable input, 4 damaged state, 5 model, 6 Kafka, 130 stopped.')

Seed = Annotated[int, typer.Option(help='The same seed gives the same bytes.')]
Model = Annotated[Path | None, typer.Option(metavar='DIR', help='Folder of a model version (setting `model`).')]
WithReport = Annotated[bool, typer.Option('--report/--no-report', help='Write the HTML report.')]
Workers = Annotated[str, typer.Option(
    metavar='N|auto', help='Score in N processes, each with a part of the users. auto: one per core. The files are the '
                           'same as with one process. Each process takes about a second to start, and scores with one '
                           'thread. With --state-dir, each keeps its users in a folder of its own.')]
Publish = Annotated[str | None, typer.Option(
    metavar='changes|all|events', help='What is written (setting `publish`). changes: decisions only; all: also the '
                                       'scores of every scored user; events: also one output per event.')]


@app.command()
def demo(
    shoppers: Annotated[int, typer.Option(min=1, help='Simulated shoppers.')] = 300,
    days: Annotated[int, typer.Option(min=1, help='Days that are simulated.')] = 180,
    seed: Seed = 7,
    out: Annotated[Path, typer.Option(metavar='DIR', help='Folder for events, alerts and the report.')] = Path('demo'),
    report: WithReport = True,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Simulate shoppers, score their events with the shipped model, show alerts with reasons, and write a report."""
    settings = effective_settings(config, **parsed(overrides))
    if report:
        _check_report()
    out.mkdir(parents=True, exist_ok=True)
    events = out / 'events.jsonl'
    say(f'Simulating {shoppers:,} shoppers. Their events go to {events}.')
    _simulate(events, shoppers, days, seed, noise=0.002)
    say('Scoring their events.')
    outcome = _replay([events], 'events', out / 'alerts.jsonl', settings, report, state_dir=None)
    print_seen(shoppers, days, outcome)
    print_alerts(outcome.alerts_shown)
    print_summary(outcome)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(metavar='FILE', help='Where the events go (.jsonl).')],
    shoppers: Annotated[int, typer.Option(min=1, help='Simulated shoppers.')] = 1_000,
    days: Annotated[int, typer.Option(min=1, help='Days that are simulated.')] = 180,
    seed: Seed = 7,
    noise: Annotated[float, typer.Option(
        min=0, max=0.5, help='Share of rows that are repeated, delayed or broken, as in real feeds.')] = 0.0,
) -> None:
    """Write the events of simulated shoppers to FILE, and the truth about each shopper beside it (.truth.jsonl)."""
    events, truth = _simulate(out, shoppers, days, seed, noise)
    say(f'{events:,} events of {shoppers:,} simulated shoppers over {days} days: {out} (truth: {truth})')


@app.command()
def replay(
    files: Annotated[list[Path], typer.Argument(metavar='FILE...', help='Recorded files, also .gz and .zst.')],
    format_name: FormatName = 'events',
    journal: Annotated[Path | None, typer.Option(
        metavar='FILE', help="The recorded journal topic: repeat the steps of the live worker. Needs --format kafka.",
    )] = None,
    out: Annotated[Path, typer.Option(
        metavar='FILE', help='Messages, one per line. Beside it: dead letters (.dead.jsonl) and the report (.html).',
    )] = Path('alerts.jsonl'),
    publish: Publish = None,
    scorer: Annotated[str | None, typer.Option(metavar='embedded|constant', help='Setting `scorer`.')] = None,
    model: Model = None,
    state: Annotated[str | None, typer.Option(metavar='memory|rocksdb', help='Setting `state`.')] = None,
    state_dir: Annotated[Path | None, typer.Option(
        metavar='DIR', help='Keep the RocksDB state here (new or empty); without it, it is temporary.')] = None,
    workers: Workers = '1',
    report: WithReport = True,
    as_json: AsJson = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Score recorded events with the rules of the live worker, in event-time order. Needs no Kafka.

    The same files and settings always give the same output.
    """
    flags = {'publish': publish, 'scorer': scorer, 'model': model, 'state': 'rocksdb' if state_dir else state}
    settings = effective_settings(config, **parsed(overrides) | {k: v for k, v in flags.items() if v is not None})
    outcome = _replay(files, format_name, out, settings, report, state_dir, journal, processes_of(workers))
    if as_json:
        sys.stdout.write(orjson.dumps(msgspec.to_builtins(outcome.counts)).decode() + '\n')
    else:
        print_summary(outcome)


@app.command(name='journal')
def show_journal(
    file: Annotated[Path, typer.Argument(metavar='JOURNAL', help='The recorded journal topic.')],
    lane: Annotated[int | None, typer.Option(min=0, help='Only this lane (partition number).')] = None,
    users: Annotated[bool, typer.Option('--users', help='Name all users of an entry.')] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Print what the worker's lanes did: blocks, timers, changes of owner, and which steps were finished."""
    from stream.replay.journal_file import described, read_journal
    settings = effective_settings(config, **parsed(overrides))
    journal = read_journal(file)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `stream journal FILE | head` is no error
    for line in described(journal if lane is None else {lane: journal.get(lane, [])},
                          (settings.clicks_topic, settings.carts_topic), users):
        sys.stdout.write(line + '\n')


@app.command(name='config')
def show_config(
    config: ConfigFile = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option('--schema', help='Print the JSON Schema of an event instead.')] = False,
) -> None:
    """Print the settings in effect, as TOML that can be saved as stream.toml.

    Settings come from the file, then from STREAM_<NAME>, then from flags. The later one wins.
    """
    if schema:
        from stream.core.events import json_schema
        sys.stdout.write(orjson.dumps(json_schema(), option=orjson.OPT_INDENT_2).decode() + '\n')
    else:
        sys.stdout.write(as_toml(effective_settings(config, **parsed(overrides))))


app.add_typer(worker_commands)
app.add_typer(kafka_commands)
app.add_typer(learn_commands)


def main() -> None:
    """Entry point of the installed command."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(standalone_mode=True)
    except StreamError as error:
        say(f'stream: {error}')
        sys.exit(error.exit_code)
    except OSError as error:
        say(f'stream: {os_problem(error)}')
        sys.exit(StreamError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def os_problem(error: OSError) -> str:
    """What the system has refused, and what to do. Not every such error is about a file."""
    what = str(error.strerror or error)
    if error.filename is not None:
        what += f': {error.filename}'
    if error.errno in (errno.EMFILE, errno.ENFILE):
        do = 'raise the limit of open files (`ulimit -n`), or use fewer --workers.'
    elif error.errno in (errno.ENOMEM, errno.EAGAIN):
        do = 'give the process more memory and processes, or use fewer --workers.'
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        do = 'make room on the disk.'
    elif error.filename is not None:
        do = 'check the path, its rights and the disk.'
    else:
        do = 'check the disk and the limits of the process (`ulimit -a`).'
    return f'{what}. Do: {do}'


def _stop(number: int, _frame: object) -> NoReturn:
    say('stopped: no file was left half written')
    sys.exit(128 + number)      # on the way out, half-written files are removed


def _replay(
    files: list[Path], format_name: str, out: Path, settings: Settings, with_report: bool, state_dir: Path | None,
    journal: Path | None = None, workers: int = 1,
) -> ReplayOutcome:
    from stream.replay.journal_file import read_journal
    from stream.replay.journal_replay import JournalReplay
    from stream.replay.recorded_topics import RecordedTopics
    from stream.replay.recording import Recording
    from stream.replay.replay import Replay
    from stream.replay.sharded import ShardedReplay

    _check_target(out, 'Messages')
    if with_report:
        _check_report()     # first, so that nothing is replayed in vain
    collect_seldom()
    dead_letters, report = out.with_suffix('.dead.jsonl'), out.with_suffix('.html')
    if journal and format_name != 'kafka':
        raise UsageError('A journal can only be replayed with records of topics.',
                         'add --format kafka, and name a recording of the input topics.')
    if journal and workers > 1:
        raise UsageError('A journal is replayed by one process.', 'leave --workers out.')
    for path in (out, dead_letters, report):
        if path.is_dir() or path.resolve() in {file.resolve() for file in (*files, *filter(None, [journal]))}:
            raise UsageError(f'{path} is a folder, or one of the files to replay.', 'name another file with --out.')
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        if journal:
            recording = RecordedTopics(files, inputs_of(settings))
            stack.callback(recording.close)
        else:
            recording = Recording(files, format_of(format_name, settings))
        task = progress.add_task('reading times', total=None)
        recording.scan(lambda rows: progress.update(task, completed=rows))
        if isinstance(recording, Recording) and recording.records is not None and not recording.rows:
            raise InputError(f'There is no record of {settings.clicks_topic} or {settings.carts_topic} in '
                             f'{", ".join(path.name for path in files)}.', 'name a recording of the input topics '
                             '(`stream record`); a journal is named with --journal, beside it.')
        scorer = _scorer(settings)
        outputs = stack.enter_context(written(out))
        letters = stack.enter_context(written(dead_letters))
        rules = settings.replay_rules()
        if isinstance(recording, Recording) and workers > 1:
            shards = _shards(settings, state_dir, recording.records, workers, stack)
            run, seen = ShardedReplay(recording, shards, rules, outputs, letters), recording
        elif isinstance(recording, Recording):
            run = Replay(recording, _state(settings, state_dir, stack), scorer, rules, outputs, letters)
            seen = recording
        else:
            assert journal
            seen = run = JournalReplay(
                recording, read_journal(journal),
                lambda lane: _state(settings, state_dir / f'users-{lane}' if state_dir else None, stack),
                scorer, rules, outputs, letters)
        progress.reset(task, description='replaying', total=recording.rows)
        started = time.monotonic()
        def advance(rows: int) -> None:
            progress.advance(task, rows)

        counts = run.run(advance) if isinstance(run, ShardedReplay) else asyncio.run(run.run(advance))
        seconds = time.monotonic() - started
        if isinstance(run, JournalReplay):
            for gap in run.missing():
                say(f'warning: the journal goes further than the recording: {gap}.')
            if beyond := run.beyond():
                say(f"{beyond:,} records after the journal's end were not replayed.")
            if run.unfinished:
                say(f'{run.unfinished:,} events of steps that were cut short were not taken again before the journal '
                    'ends.')
            if run.passed_over:
                say(f'warning: {run.passed_over:,} events are in no block: the worker began after them or has skipped '
                    'them, or the journal lacks entries; `stream journal` shows the blocks.')
        if with_report:
            from stream.replay.report import ReportAbout, write_report
            progress.update(task, description='writing report')
            about = ReportAbout(
                sources=[path.name for path in files], format=format_name,
                currency=amounts_in(format_name, settings),
                first_ms=seen.first_ms, last_ms=seen.last_ms, publish=settings.publish,
                trained_on=scorer.trained_on,
                tier_names=scorer.tier_names, intent_raise=settings.intent_raise, churn_raise=settings.churn_raise,
                churn_clear=settings.churn_clear)
            write_report(report, run.account.statistics, counts, scorer.model, about)
    account = run.account
    return ReplayOutcome(
        counts, account.statistics.alerts_shown, sum(account.statistics.alerts_per_hour.values(), Counter()),
        account.refused_scores, scorer.trained_on, out, dead_letters, report if with_report else None, seconds)


def _check_report() -> None:
    extra_module('stream.replay.report', 'The HTML report', f'add --no-report, or {INSTALL_REPORT}')


def _scorer(settings: Settings) -> Any:
    from stream.scoring.make import make_scorer
    return make_scorer(settings, lambda line: say(f'warning: {line}'), off_loop=False)


def _shards(
    settings: Settings, state_dir: Path | None, records: 'Inputs | None', workers: int, stack: ExitStack,
) -> 'ShardProcesses':
    """Processes that each hold some of the users."""
    from stream.replay.processes import ShardProcesses
    from stream.replay.shard import ShardRecipe
    from stream.scoring.make import make_scorer
    from stream.state.replay_state import check_unused, state_of_shard
    if settings.state == 'memory':
        state_dir = None
    elif state_dir is None:
        state_dir = _temporary_folder(stack)
    else:
        check_unused(state_dir)
    # A copy that can be sent to a process: the class of `settings` remembers the file that it was read from.
    one_thread = Settings.model_construct(None, **(dict(settings) | {'scorer_threads': 1}))
    return stack.enter_context(ShardProcesses(workers, ShardRecipe(
        partial(make_scorer, one_thread, None, off_loop=False), partial(state_of_shard, state_dir, workers),
        settings.replay_rules(), records)))


def _temporary_folder(stack: ExitStack) -> Path:
    folder = Path(tempfile.mkdtemp(prefix='stream-replay-'))
    stack.callback(shutil.rmtree, folder)
    return folder


def _state(settings: Settings, state_dir: Path | None, stack: ExitStack) -> Any:
    from stream.state.replay_state import MemoryState, RocksState
    if settings.state == 'memory':
        return MemoryState()
    state = RocksState(_temporary_folder(stack) if state_dir is None else state_dir)
    stack.callback(state.close)
    return state


def _simulate(out: Path, shoppers: int, days: int, seed: int, noise: float) -> tuple[int, Path]:
    """How many events were written to `out`, and the file beside it that says what is true of each shopper."""
    from stream.simulator.shop import SimulatorOptions, simulate, write
    _check_target(out, 'Events')
    truth = out.with_suffix('.truth.jsonl')
    simulation = simulate(SimulatorOptions(shoppers=shoppers, days=days, seed=seed, noise=noise))
    write(simulation, out, truth)
    return simulation.events, truth


def _check_target(out: Path, what: str) -> None:
    if out.suffix != '.jsonl' or not out.parent.is_dir():
        raise UsageError(f'{what} cannot be written to {out}.', 'name a .jsonl file in an existing folder.')
