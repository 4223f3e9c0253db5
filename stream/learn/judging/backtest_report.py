"""The figures of a backtest (stream.learn.judging.backtest) as one HTML page: the comparison's, with other words."""
from collections.abc import Mapping, Sequence
from typing import Any

from stream.learn.judging.backtest import SEEN, UNKNOWN
from stream.learn.judging.compare_report import day, rendered
from stream.learn.judging.judge import RULES


def render_report(figures: Mapping[str, Any]) -> str:
    """The page as text.

    figures  of `stream.learn.judging.backtest.backtest`, and `about`: sources (file names), format, currency, warnings
    Promise  the same figures give the same bytes (with the same release of matplotlib).
    """
    warnings = [*figures['about']['warnings'], *doubts(figures)]
    return rendered('backtest.html.j2', figures, RULES, 'Best rule', served=figures['model'], warnings=warnings)


def doubts(figures: Mapping[str, Any]) -> list[str]:
    """Why figures may be too good, a sentence each."""
    model, found = figures['model'], []
    if seen := _days(figures['cutoffs'], SEEN):
        found.append(f'The model has learned from days up to {day(model["known_until_ms"])}, after {seen}: if they '
                     'were days of this shop, it knows answers, and its figures are too good.')
    if _days(figures['cutoffs'], UNKNOWN):
        found.append('Up to when the model has learned is not known: if it was from this recording, its figures are '
                     'too good.')
    return found


def _days(cutoffs: Sequence[Mapping[str, Any]], learned: str) -> str:
    return ', '.join(day(cutoff['at_ms']) for cutoff in cutoffs if cutoff['learned'] == learned)
