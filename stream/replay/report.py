"""The report of a replay: one HTML page that opens from disk, without scripts or other files.

Every plot over time is drawn twice, for a wide and for a narrow screen, and the style sheet shows one of them: the text
of a plot that is scaled down cannot be read. Legends are HTML and include the totals, so that they wrap and a screen
reader can read them.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stream.core.decide import Kind
from stream.core.events import CART_TYPES, EventType, Reason
from stream.core.layout import DAY_MS
from stream.core.messages import ModelInfo
from stream.core.rules import Publish
from stream.page import INK, SCORE, WIDE, Draw, render
from stream.replay.account import Counts
from stream.replay.statistics import SCORE_BINS, Statistics

TIME_BINS_MAX = 140
USERS_AT_RISK_MAX = 20
_BIN_HOURS = (1, 24, 168, 672, 8736)    # 52 weeks are enough for all times that the decoder accepts
_MONDAY = 4 * 24                        # 1970-01-05, in hours since 1970
_AXIS_BINS_MIN = 7
_LOG_FROM = 100                 # if the tallest bar is so many times the median one, the axis is logarithmic
_SOURCES_SHOWN_MAX = 8
_SHA256_SHOWN = 12

# Qualitative colours that stay apart under colour blindness: Paul Tol's "muted" scheme for browsing, Okabe and Ito's
# (Color Universal Design, 2008) for the cart and for alerts.
_EVENT_COLOURS = {
    'view': '#88CCEE', 'click': '#332288', 'search': '#DDCC77', 'login': '#44AA99', 'favorite': '#CC6677',
    'follow': '#882255', 'share': '#AA4499', 'rating': '#999933', 'review': '#117733', 'other': '#BBBBBB',
    'add_to_cart': '#E69F00', 'remove_from_cart': '#999999', 'purchase': '#0072B2', 'refund': '#D55E00',
}
_CART_NAMES = tuple(kind.name.lower() for kind in EventType if kind in CART_TYPES)
_BROWSING_NAMES = tuple(name for name in _EVENT_COLOURS if name not in _CART_NAMES)
_ALERTS = {
    f'{Kind.INTENT} raised': ('purchase within 7 days is likely: raised', '#009E73'),
    f'{Kind.CHURN} raised': ('no purchase within 30 days is likely: raised', '#D55E00'),
    f'{Kind.CHURN} cleared': ('no purchase within 30 days is likely: cleared', '#56B4E9'),
    f'{Kind.POWER}': ('expected spend tier: first set, or changed', '#999999'),
}
_PUBLISH_WORDS: dict[Publish, str] = {
    'changes': 'decisions only',
    'all': 'decisions, and the scores of every shopper scored',
    'events': 'decisions, and the scores once per event',
}
REASON_WORDS = {
    Reason.NULL_VALUE: 'the record has no value',
    Reason.EMPTY_VALUE: 'the line is empty',
    Reason.TOO_LARGE: 'longer than the configured limit',
    Reason.INVALID_UTF8: 'not UTF-8 text',
    Reason.INVALID_JSON: 'not JSON, or cut short',
    Reason.TOO_DEEP: 'JSON nested too deeply',
    Reason.MISSING_FIELD: 'a required field is missing',
    Reason.INVALID_FIELD: 'a field has the wrong kind of value',
    Reason.TS_UNREADABLE: 'the time cannot be read',
    Reason.TS_NOT_POSITIVE: 'the time is zero or negative',
    Reason.TS_IN_SECONDS: 'the time looks like seconds; milliseconds are expected',
    Reason.TS_OUT_OF_RANGE: 'the time is after the year 2100',
    Reason.TS_AHEAD_OF_CLOCK: 'the time is later than that of its record',
    Reason.UNKNOWN_CURRENCY: 'there is no rate for the currency',
    Reason.NULL_KEY: 'the record has no key',
    Reason.KEY_MISMATCH: 'the key is not the user id',
    'short_row': 'columns are missing',
    'long_row': 'there are more columns than expected',
    'bad_csv': 'the row is not valid CSV',
    'bad_encoding': 'not UTF-8 text',
    'no_user': 'the row names no shopper',
    'bad_time': 'the time cannot be read',
    'bad_number': 'a number cannot be read',
    'unknown_type': 'the event type is not known',
    'unrenderable': 'the row cannot be written as an event',
}


@dataclass(frozen=True)
class ReportAbout:
    """What the page says about the replay in addition to its counts.

    sources            file names, without folders
    format             name of the recording's format
    currency           ISO 4217 code of all amounts
    first_ms, last_ms  event times of the earliest and the latest row, Unix ms; both 0: no row has a time
    trained_on         the model's training data, in words
    tier_names         lowest tier first; None: the model names none
    intent_raise, churn_raise, churn_clear   thresholds on scores in [0, 1]
    """

    sources: Sequence[str]
    format: str
    currency: str
    first_ms: int
    last_ms: int
    publish: Publish
    trained_on: str
    tier_names: tuple[str, ...] | None
    intent_raise: float
    churn_raise: float
    churn_clear: float


@dataclass(frozen=True)
class Series:
    """Counts over time: `edges` are hours since 1970, one more than counts; every bin is `bin_hours` hours."""

    edges: np.ndarray
    counts: dict[str, np.ndarray]
    bin_hours: int


def write_report(path: Path, statistics: Statistics, counts: Counts, model: ModelInfo, about: ReportAbout) -> None:
    """Write the page to `path`, replacing what was there.

    Promise  the same input gives the same bytes (with the same release of matplotlib).
    Errors   OSError if `path` cannot be written.
    """
    path.write_bytes(render_report(statistics, counts, model, about).encode())


def render_report(statistics: Statistics, counts: Counts, model: ModelInfo, about: ReportAbout) -> str:
    """The page as text."""
    tier_name = _tier_namer(about.tier_names)
    at_risk = statistics.users_at_risk()
    hours = [*statistics.events_per_hour, *statistics.alerts_per_hour]
    span = (min(hours), max(hours)) if hours else None
    return render('stream.replay', 'report.html.j2', {'number': _number}, lambda draw: {
        'about': about, 'counts': counts, 'model': model,
        'sources': about.sources[:_SOURCES_SHOWN_MAX], 'sources_more': max(0, len(about.sources) - _SOURCES_SHOWN_MAX),
        'short_sha256': model.sha256[:_SHA256_SHOWN],
        'span': _span(about.first_ms, about.last_ms),
        'publish_words': _PUBLISH_WORDS[about.publish],
        'events': _events_over_time(draw, statistics, span),
        'scores': _scores(draw, statistics, about),
        'tiers': _tiers(draw, statistics, len(about.tier_names or ()), tier_name),
        'alerts': _alerts_over_time(draw, statistics, span),
        'dead': [(reason, REASON_WORDS.get(reason, ''), number) for reason, number in
                 sorted(statistics.dead.items(), key=lambda item: (-item[1], item[0]))],
        'at_risk': [_at_risk(value, tier_name) for value in at_risk[:USERS_AT_RISK_MAX]],
        'at_risk_total': len(at_risk),
    })


def binned(per_hour: Mapping[int, Mapping[str, int]], first_hour: int, last_hour: int,
           names: Sequence[str]) -> Series:
    """Sum hourly counts into at most TIME_BINS_MAX bins, of as few hours as possible. Weeks begin on Mondays.

    per_hour  hour since 1970 -> name -> count; all hours are within [first_hour, last_hour]
    names     names to keep; those that never occur are left out
    """
    bin_hours = next(hours for hours in _BIN_HOURS if (last_hour - first_hour) // hours + 2 <= TIME_BINS_MAX)
    origin = _MONDAY if bin_hours > 24 else 0
    start = (first_hour - origin) // bin_hours * bin_hours + origin
    bins = (last_hour - start) // bin_hours + 1
    counts = {name: np.zeros(bins, np.int64) for name in names}
    for hour, row in per_hour.items():
        for name in counts.keys() & row.keys():
            counts[name][(hour - start) // bin_hours] += row[name]
    return Series(start + bin_hours * np.arange(bins + 1), {name: row for name, row in counts.items() if row.any()},
                  bin_hours)


# The sections


def _events_over_time(draw: Draw, statistics: Statistics, span: tuple[int, int] | None) -> list[dict[str, Any]]:
    if not statistics.events_per_hour or span is None:
        return []
    charts = []
    for title, names in (('Looking around', _BROWSING_NAMES), ('Cart and orders', _CART_NAMES)):
        series = binned(statistics.events_per_hour, *span, names)
        if series.counts:
            charts.append({'title': title, **_over_time(draw, series, _EVENT_COLOURS, f'{title}: events over time',
                                                        lambda name: name.replace('_', ' '))})
    return charts


def _alerts_over_time(draw: Draw, statistics: Statistics, span: tuple[int, int] | None) -> dict[str, Any] | None:
    if not statistics.alerts_per_hour or span is None:
        return None
    series = binned(statistics.alerts_per_hour, *span, tuple(_ALERTS))
    colours = {label: colour for label, (_, colour) in _ALERTS.items()}
    return _over_time(draw, series, colours, 'Alerts over time', lambda label: _ALERTS[label][0])


def _over_time(draw: Draw, series: Series, colours: Mapping[str, str], label: str,
               words: Callable[[str], str]) -> dict[str, Any]:
    step = {1: 'hour', 24: 'day', 168: 'week', 672: '4 weeks', 8736: '52 weeks'}[series.bin_hours]
    legend = [(words(name), colours[name], int(row.sum())) for name, row in series.counts.items()]
    spoken = f'{label}, per {step}. Totals: {", ".join(f"{name} {_number(total)}" for name, _, total in legend)}.'
    return {'plot': draw.twice(lambda figure: _stack(figure, series, colours, step), 250, spoken),
            'legend': legend, 'step': step, 'whole_bins': series.bin_hours <= 24}


def _scores(draw: Draw, statistics: Statistics, about: ReportAbout) -> list[dict[str, Any]]:
    charts = []
    for name, title, meaning, lines in (
        ('intent', 'Purchase intent', 'the chance of a purchase within 7 days',
         [(about.intent_raise, 'alert from', '-')]),
        ('churn', 'Churn', 'the chance of no purchase within 30 days',
         [(about.churn_raise, 'alert from', '-'), (about.churn_clear, 'cleared at', '--')]),
        ('power', 'Purchase power', 'the expected spend tier, from 0 (the lowest) to 1 (the highest)', []),
    ):
        histogram = statistics.score_histograms[name]
        if not histogram.any():
            continue
        log = bool(histogram.max() > _LOG_FROM * np.median(histogram[histogram > 0]))
        spoken = f'Distribution of {int(histogram.sum()):,} scores, {title}: {meaning}. ' + ' '.join(
            f'{words.capitalize()} {at:g}.' for at, words, _ in lines)

        def fill(figure: Figure, histogram=histogram, lines=lines, log=log) -> None:
            _histogram(figure, histogram, lines, log)

        charts.append({'title': title, 'meaning': meaning, 'log': log,
                       'plot': draw.once(fill, 300, 240, spoken.strip())})
    return charts


def _tiers(draw: Draw, statistics: Statistics, named: int, tier_name: Callable[[int], str]) -> Markup | None:
    if not statistics.tiers:
        return None
    tiers = max(named, *(tier + 1 for tier in statistics.tiers if tier is not None), 0)
    rows = [(tier_name(tier), statistics.tiers[tier], True) for tier in reversed(range(tiers))]
    if statistics.tiers[None]:
        rows.append(('no tier yet', statistics.tiers[None], False))
    spoken = 'Shoppers by expected spend tier at the end: ' + ', '.join(f'{name} {n:,}' for name, n, _ in rows) + '.'
    return draw.twice(lambda figure: _bars(figure, rows), 40 + 32 * len(rows), spoken)


def _at_risk(value: dict[str, Any], tier_name: Callable[[int], str]) -> dict[str, Any]:
    return {
        'user_id': value['user_id'],
        'churn': f'{value["scores"]["churn"]:.2f}',
        'spend': f'{value["scores"]["expected_spend_90d"]:,.2f}',
        'tier': 'none yet' if value['tier'] is None else tier_name(value['tier']),
        'as_of': _utc(value['as_of_ms']).strftime('%Y-%m-%d'),
        'reasons': None if value['reasons'] is None else [
            {'way': 'raised' if reason['effect'] > 0 else 'lowered', 'text': reason['text'],
             'by': f'{abs(reason["effect"]):.2f}'} for reason in value['reasons']],
        'action': 'none' if value['action'] is None else value['action'].replace('_', ' '),
    }


# The drawings


def _stack(figure: Figure, series: Series, colours: Mapping[str, str], step: str) -> None:
    axes = figure.add_subplot()
    edges = date2num(series.edges.astype('datetime64[h]'))
    floor = np.zeros(len(edges) - 1)
    for name, row in series.counts.items():
        axes.stairs(floor + row, edges, baseline=floor, fill=True, color=colours[name], linewidth=0)
        floor = floor + row
    spare = max(0, _AXIS_BINS_MIN - len(floor)) / 2 * (edges[1] - edges[0])
    axes.set_xlim(edges[0] - spare, edges[-1] + spare)
    axes.set_ylim(0, floor.max() * 1.05)
    narrow = figure.get_figwidth() * 72 < WIDE
    # With fewer ticks it finds no interval for some ranges, and warns.
    locator = AutoDateLocator(tz=UTC, minticks=2 if narrow else 3, maxticks=5 if narrow else 9)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC))
    _count_axis(axes, axes.yaxis)
    axes.set_ylabel(f'per {step}')


def _histogram(figure: Figure, histogram: np.ndarray, lines: Sequence[tuple[float, str, str]], log: bool) -> None:
    # Leave equal room for two lines of text above each plot, so that all three axes have the same height.
    figure.set_layout_engine('constrained', rect=(0, 0, 1, 0.86))
    axes = figure.add_subplot()
    floor = 0.5 if log else 0.0     # a log axis has no zero; one half is below any count
    axes.stairs(np.maximum(histogram, floor), np.linspace(0, 1, SCORE_BINS + 1), baseline=floor, fill=True,
                color=SCORE)
    axes.set_xlim(0, 1)
    if log:
        axes.set_yscale('log')
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
        axes.minorticks_off()
    else:
        _count_axis(axes, axes.yaxis)
    axes.set_ylim(floor, histogram.max() * (1.6 if log else 1.05))
    for place, (at, words, dashes) in enumerate(lines):
        axes.axvline(at, color=INK, linestyle=dashes, linewidth=1.4)
        left = at > 0.5
        axes.annotate(f'{words} {at:g}', (at, 1), (-3 if left else 3, 3 + 15 * (len(lines) - 1 - place)),
                      xycoords=axes.get_xaxis_transform(), textcoords='offset points',
                      ha='right' if left else 'left', va='bottom', fontsize=12).set_in_layout(False)
    axes.set_xlabel('score')
    axes.set_ylabel('times scored' + (' (log scale)' if log else ''))


def _bars(figure: Figure, rows: Sequence[tuple[str, int, bool]]) -> None:
    axes = figure.add_subplot()
    names = [name for name, _, _ in rows]
    places = np.arange(len(rows))
    numbers = np.array([number for _, number, _ in rows])
    bars = axes.barh(places, numbers, height=0.68, color=[SCORE if known else '#BBBBBB' for _, _, known in rows])
    axes.bar_label(bars, [_number(int(number)) for number in numbers], padding=5)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(False)
    axes.xaxis.set_visible(False)
    axes.spines['bottom'].set_visible(False)
    axes.set_xlim(0, numbers.max() * 1.18)


def _count_axis(axes: Axes, axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))


# Words


def _tier_namer(names: tuple[str, ...] | None) -> Callable[[int], str]:
    return lambda tier: names[tier] if names and tier < len(names) else f'tier {tier}'


def _span(first_ms: int, last_ms: int) -> str | None:
    if not last_ms:
        return None
    days = last_ms // DAY_MS - first_ms // DAY_MS + 1
    first, last = (_utc(at_ms).strftime('%Y-%m-%d %H:%M') for at_ms in (first_ms, last_ms))
    return f'{first} to {last} UTC ({days:,} {"day" if days == 1 else "days"})'


def _utc(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)


def _number(value: int) -> str:
    return f'{value:,}'
