"""The commands that talk to Kafka. Thin shells, as in `stream.cli`, on the same command line."""
import asyncio
import sys
from typing import Annotated

import msgspec
import orjson
import typer
from rich.console import Console
from rich.table import Table

from stream.cli_shared import AsJson, ConfigFile, Overrides, effective_settings, parsed, say

app = typer.Typer()


@app.command()
def topics(
    dry_run: Annotated[bool, typer.Option('--dry-run', help='Only show what there is and what is missing.')] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Show the topics of the worker, create those that are missing, and say what does not fit."""
    from stream.engine.topics import as_error, survey, wanted_topics
    settings = effective_settings(config, **parsed(overrides))
    found = asyncio.run(survey(settings, create=not dry_run))
    if as_json:
        sys.stdout.write(orjson.dumps(msgspec.to_builtins(found)).decode() + '\n')
    else:
        table = Table()
        for column in ('topic', 'role', 'partitions', 'replicas', 'cleanup', 'retention', 'state'):
            table.add_column(column, justify='right' if column in ('partitions', 'replicas') else 'left')
        missing = {entry.wanted.name: entry for entry in found.missing}
        for topic in wanted_topics(settings):
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


def _days(config: dict[str, str]) -> str:
    """The retention of a topic that is deleted by time, for a person."""
    text = config.get('retention.ms', '')
    if 'delete' not in config.get('cleanup.policy', '') or not text:
        return '-'
    return 'for ever' if text == '-1' else f'{int(text) / 86_400_000:g} days'
