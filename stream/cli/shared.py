"""What the commands share: options that mean the same everywhere, settings in effect, files that appear when they are
complete, progress, and words for a person."""
import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from stream.config import Settings, load_settings, unknown_variables
from stream.errors import UsageError
from stream.replay.formats import FORMATS, kafka_format
from stream.replay.rows import Format
from stream.replay.topic_records import Inputs

ConfigFile = Annotated[Path | None, typer.Option(
    '--config', metavar='FILE', help='Settings file in TOML (default: stream.toml, if there is one).')]
Overrides = Annotated[list[str] | None, typer.Option(
    '--set', metavar='NAME=VALUE', help='Override a setting of `stream config`, e.g. --set churn_raise=0.7. Lists and '
                                  'tables are JSON. Repeatable.')]
FormatName = Annotated[str, typer.Option(
    '--format', metavar='FORMAT', help='The format of the files. ' + ' '.join(
        f'[bold]{name}[/bold]: {entry.help}' for name, entry in FORMATS.items()))]
AsJson = Annotated[bool, typer.Option('--json', help='Print the counts as one line of JSON on standard output.')]

M_ARENA_MAX = -8        # of malloc.h
PROCESSES_MAX = 256

def collect_seldom() -> None:
    """Collect garbage rarely. A block creates thousands of objects that stay: a search at every 700 cost 6 %."""
    gc.set_threshold(100_000, 10, 10)


def few_arenas() -> None:
    """Let glibc's threads share two heaps: each of its own would keep what blocks of RocksDB leave, 40 MiB a thread."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):        # another C library has no such heaps
        libc.mallopt(M_ARENA_MAX, 2)


def say(text: str) -> None:
    """A line for a person, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def effective_settings(config: Path | None, **flags: Any) -> Settings:
    """The settings of file, environment and flags; warns of variables that look like settings and are none."""
    for name in unknown_variables():
        say(f'warning: {name} in the environment is not a setting; see `stream config` for the names.')
    return load_settings(config, **flags)


def format_of(name: str, settings: Settings) -> Format | str:
    """The format of that name; records of topics are told apart by the settings."""
    if name != 'kafka':
        return name
    return kafka_format(inputs_of(settings))


def amounts_in(format_name: str, settings: Settings) -> str:
    """The currency of a format's amounts: what the format says, else that of the settings."""
    entry = FORMATS.get(format_name)        # an unknown one is refused when it is read
    return entry.currency if entry and entry.currency else settings.currency


def inputs_of(settings: Settings) -> Inputs:
    """The input topics, and who chose the partitions of their records."""
    return Inputs((settings.clicks_topic, settings.carts_topic), settings.partitioner)


def parsed(overrides: list[str] | None, flag: str = '--set', names: str = 'see `stream config` for the names.',
           ) -> dict[str, Any]:
    """The values of `--set NAME=VALUE`, or of another flag; UsageError where one is not of that form.

    names   where a person finds them
    """
    values = {}
    for override in overrides or ():
        name, separator, text = override.partition('=')
        if not separator:
            raise UsageError(f'{flag} {override} is not NAME=VALUE.', names)
        try:
            values[name] = orjson.loads(text)
        except orjson.JSONDecodeError:
            values[name] = text     # a bare word
    return values


def processes_of(workers: str) -> int:
    """The number of processes that `--workers` asks for. Errors: UsageError if it is neither a number nor `auto`."""
    if workers == 'auto':
        # macOS cannot say which cores this process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        return min(cores, PROCESSES_MAX)
    if not (workers.isascii() and workers.isdigit() and 1 <= int(workers) <= PROCESSES_MAX):
        raise UsageError(f'--workers {workers} is not a number of processes.',
                         f'name a number from 1 to {PROCESSES_MAX}, or `auto` for one per core.')
    return int(workers)


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete."""
    part = path.with_name(path.name + '.part')
    try:
        with part.open('wb', buffering=1 << 20) as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def progress_bar() -> Progress:
    """Rows done, of how many, and how fast, on standard error; gone when it is done. Nothing without a terminal."""
    console = Console(stderr=True)
    return Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('rows'), _Rate(),
                    TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


class _Rate(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        return Text(f'{task.speed:,.0f}/s' if task.speed else '')
