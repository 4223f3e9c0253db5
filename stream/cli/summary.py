"""What `stream demo` and `stream replay` print at the end, on standard output."""
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stream.core.decide import Kind

if TYPE_CHECKING:
    from stream.replay.replay import Counts

TABLE_COLUMNS_MIN = 132     # of a terminal: with less, the table's reasons break after every third word
_SCORE_OF: dict[str, str] = {Kind.INTENT: 'purchase_intent', Kind.CHURN: 'churn'}
_TITLE = 'The newest alerts of each kind. Reasons: "+" raised the score, "-" lowered it.'
# What a message says, in the singular and in the plural: by its type and, where it has one, its state.
_ALERT_WORDS: dict[str, tuple[str, str]] = {
    f'{Kind.POWER}': ('new spend tier', 'new spend tiers'),
    f'{Kind.INTENT} raised': ('likely purchase', 'likely purchases'),
    f'{Kind.CHURN} raised': ('churn risk', 'churn risks'),
    f'{Kind.CHURN} cleared': ('churn risk ended', 'churn risks ended'),
}


class ReplayOutcome(msgspec.Struct):
    """What a replay leaves for its summary.

    alerts_shown  the newest messages of each kind, as they are published
    alerts_by     number of messages by type and, where it has one, state: `churn.alert raised`
    report        None: no report was written
    seconds       from the first event to the last, without reading times and writing the report
    """

    counts: 'Counts'
    alerts_shown: list[dict[str, Any]]
    alerts_by: Counter[str]
    refused_scores: int
    trained_on: str
    out: Path
    dead_letters: Path
    report: Path | None
    seconds: float


def print_alerts(alerts: list[dict[str, Any]]) -> None:
    """The alerts with their reasons: a table where the terminal is wide, else one record below the other.

    Without a terminal, the variable COLUMNS says how wide the output is; without that it has 80 columns.
    """
    console = _console()
    console.print(_table(alerts) if console.width >= TABLE_COLUMNS_MIN else _records(alerts, console.width))


def print_seen(shoppers: int, days: int, outcome: ReplayOutcome) -> None:
    """One sentence of what a demo simulated and what came of it."""
    by_kind = ', '.join(f'{count:,} {words[count != 1]}' for label, words in _ALERT_WORDS.items()
                        if (count := outcome.alerts_by[label]))
    _console().print(
        f'{shoppers:,} simulated shoppers over {days:,} days: {outcome.counts.read:,} events and '
        f'{outcome.counts.alerts:,} alerts{f" ({by_kind})" if by_kind else ""}.\n')


def print_summary(outcome: ReplayOutcome) -> None:
    """The account of the replay, and where its files are."""
    counts = outcome.counts
    account = [f'{_counted(counts.read, "row")} in {outcome.seconds:.1f} s: {counts.applied:,} applied, '
               f'{counts.duplicate:,} duplicate, {counts.late:,} late, {_counted(counts.dead, "dead letter")}. '
               f'{_counted(counts.users, "user")}, {_counted(counts.scored, "score")}, '
               f'{_counted(counts.alerts, "alert")}.']
    if outcome.refused_scores:
        account.append(f'{outcome.refused_scores:,} scores were refused (not numbers in range): check the model.')
    if 2 * counts.dead > counts.read:
        account.append('More than half of the rows are dead letters: check --format, and the reasons given there.')
    account.append(f'scored by a model trained on {outcome.trained_on}')
    files = [('alerts', outcome.out), ('dead letters', outcome.dead_letters), ('report', outcome.report)]
    console = _console()
    for line in account:
        console.print(line, soft_wrap=not console.is_terminal)      # whole lines for a script
    for name, path in files:
        if path is not None:
            console.print(f'{name}: {path}', soft_wrap=True)        # a broken path cannot be copied


def _counted(number: int, what: str) -> str:
    return f'{number:,} {what}{"s" * (number != 1)}'


def _console() -> Console:
    # User ids and file names are data: neither markup nor emoji codes in them mean anything.
    return Console(markup=False, emoji=False, highlight=False)


def _table(alerts: list[dict[str, Any]]) -> Table:
    table = Table(title=_TITLE, title_justify='left', show_lines=True)
    for column in ('when (UTC)', 'user', 'alert'):
        table.add_column(column, no_wrap=True)
    for column in ('score', 'tier'):
        table.add_column(column, justify='right')
    table.add_column('because', ratio=1)
    table.add_column('proposed')
    for value in alerts:
        table.add_row(_when(value), value['user_id'], _label(value), _score(value), _tier(value),
                      '\n'.join(_reasons(value)), value['action'] or '-')
    return table


def _records(alerts: list[dict[str, Any]], width: int) -> Text:
    text = Text(_TITLE + '\n')
    for value in alerts:
        facts = [f'score {_score(value)}', f'tier {_tier(value)}']
        if value['action']:
            facts.append(f'proposed: {value["action"]}')
        text.append(f'\n{_label(value)}: {value["user_id"]}, {_when(value)} UTC\n', style='bold')
        for line in (', '.join(facts), *_reasons(value)):
            text.append(fill(line, width, initial_indent='  ', subsequent_indent='    ') + '\n')
    return text


def _label(value: dict[str, Any]) -> str:
    return ' '.join(filter(None, (value['type'], value.get('state'))))


def _when(value: dict[str, Any]) -> str:
    return f'{datetime.fromtimestamp(value["as_of_ms"] / 1000, UTC):%Y-%m-%d %H:%M}'


def _score(value: dict[str, Any]) -> str:
    return f'{value["scores"][_SCORE_OF.get(value["type"], "purchase_power")]:.2f}'


def _tier(value: dict[str, Any]) -> str:
    tier = '-' if value['tier'] is None else str(value['tier'])
    previous = value.get('previous_tier')
    return tier if previous is None else f'{previous} to {tier}'


def _reasons(value: dict[str, Any]) -> list[str]:
    return [f'{"+" if reason["effect"] > 0 else "-"} {reason["text"]}' for reason in value['reasons'] or ()]
