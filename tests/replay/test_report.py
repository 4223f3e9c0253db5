import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from stream.core.decide import Kind
from stream.core.events import Reason
from stream.core.layout import DAY_MS
from stream.core.messages import ModelInfo
from stream.core.outbox import Message
from stream.replay.replay import Counts
from stream.replay.report import (
    REASON_WORDS,
    TIME_BINS_MAX,
    ReportAbout,
    binned,
    render_report,
    write_report,
)
from stream.replay.statistics import Statistics
from tests.outline import Outline

DAY = 20_089        # 2025-01-01
HOUR = DAY * 24
MODEL = ModelInfo('shopper', '3', 'abcdef0123456789' * 4)
ABOUT = ReportAbout(['january.jsonl', 'february.jsonl'], 'events', 'EUR', DAY * DAY_MS, (DAY + 40) * DAY_MS, 'changes',
                    '9 shoppers', ('low', 'middle', 'high'), 0.65, 0.85, 0.55)
COUNTS = Counts(read=12_345, applied=12_000, duplicate=203, late=101, dead=41, users=777, scored=5_050, alerts=62)
SECTIONS = ['Where every row went', 'Events over time', 'Scores', 'Expected spend tiers at the end', 'Alerts over time',
            'Shoppers most at risk', 'Dead letters']
NASTY = '''<script>alert("1")</script>'&amp;'''


def alert(user_id='u7', **changes) -> Message:
    content = {
        'type': 'churn.alert', 'state': 'raised', 'user_id': user_id, 'as_of_ms': (DAY + 9) * DAY_MS,
        'expires_at_ms': (DAY + 16) * DAY_MS,
        'scores': {'churn': 0.9123, 'expected_spend_90d': 1234.5}, 'tier': 2, 'action': 'service_call',
        'reasons': [{'name': 'silence', 'text': 'nothing for 31 days', 'effect': 0.4},
                    {'name': 'orders', 'text': '4 orders', 'effect': -0.25}],
    } | changes
    return Message(Kind(content['type']), b'ab' * 16, user_id.encode(), content['as_of_ms'], b'', content)


def full() -> Statistics:
    statistics = Statistics()
    for day in range(41):
        statistics.events_per_hour[HOUR + 24 * day] = Counter(view=200 + day, purchase=3)
    rng = np.random.default_rng(2)
    for name in statistics.score_histograms:
        statistics.score_histograms[name] += rng.integers(1, 90, 50)
    statistics.add_decisions([alert(), alert('u8', type='purchase_intent.alert'), alert('u9', tier=None, action=None,
                                                                                    reasons=[])])
    for tier in (-1, 0, 0, 2):
        statistics.add_final_tier(tier)
    statistics.dead.update({'ts_in_seconds': 29, 'invalid_json': 12})
    return statistics


def page(statistics: Statistics, counts=COUNTS, about=ABOUT) -> str:
    return render_report(statistics, counts, MODEL, about)


@cache
def full_page() -> str:
    return page(full())


# ---- what is on the page --------------------------------------------------------------------------------------------


def test_every_section_is_there_in_order():
    outline = Outline(full_page())
    assert outline.open == []
    assert [text for level, text in outline.headings if level == 2] == SECTIONS
    levels = [level for level, _ in outline.headings]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))


def test_what_was_replayed_and_by_which_model():
    text = Outline(full_page()).text
    for words in ('january.jsonl, february.jsonl (format events)', '2025-01-01 00:00 to 2025-02-10 00:00 UTC (41 days)',
                  'model shopper, version 3', 'abcdef012345…', 'decisions only'):
        assert words in text


def test_many_sources_do_not_fill_the_full_page():
    text = Outline(page(Statistics(), about=replace(ABOUT, sources=[f'{at}.csv' for at in range(100)]))).text
    assert '7.csv and 92 more' in text
    assert '8.csv' not in text


def test_the_numbers_are_the_counts():
    outline = Outline(full_page())
    assert '12,345 = 12,000 + 203 + 101 + 41' in outline.text
    figures = re.findall(r'<dt>(\w+)</dt><dd class="figure">([\d,]+)</dd>', full_page())
    assert {name.lower(): int(number.replace(',', '')) for name, number in figures} == {
        'read': 12_345, 'applied': 12_000, 'duplicate': 203, 'late': 101, 'dead': 41, 'users': 777, 'scored': 5_050,
        'alerts': 62}


def test_totals_of_the_plots_are_the_sums():
    statistics, text = full(), Outline(full_page()).text
    views = sum(row['view'] for row in statistics.events_per_hour.values())
    assert f'view {views:,} ' in text
    assert 'purchase 123 ' in text
    assert 'no purchase within 30 days is likely: raised 2 ' in text
    assert 'purchase within 7 days is likely: raised 1 ' in text


def test_tiers_carry_their_names_and_numbers_and_empty_ones_are_shown():
    labels = [attributes.get('aria-label', '') for _, attributes in Outline(full_page()).tags]
    label = next(label for label in labels if 'tier at the end' in label)
    assert label.endswith('high 1, middle 0, low 2, no tier yet 1.')


@pytest.mark.parametrize(('tiers', 'words'), [
    ({2: 1, 0: 2, None: 1}, 'tier 2 1, tier 1 0, tier 0 2, no tier yet 1.'), ({None: 5}, 'at the end: no tier yet 5.')])
def test_tiers_without_names(tiers, words):
    statistics = Statistics()
    statistics.tiers.update(tiers)
    assert words in page(statistics, about=replace(ABOUT, tier_names=None))


def test_thresholds_are_drawn():
    html = full_page()
    for words in ('alert from 0.65', 'alert from 0.85', 'cleared at 0.55'):
        assert f'>{words}</text>' in html


def test_a_shopper_at_risk_in_words():
    cells = _cells(full_page())
    assert ('u7 0.91 1,234.50 high 2025-01-10 ▲ raised by 0.40: nothing for 31 days▼ lowered by 0.25: 4 orders '
            'service call') in cells
    assert 'All shoppers whose churn alert' in cells
    assert 'u9 0.91 1,234.50 none yet 2025-01-10 nothing stands out none' in cells


def test_reasons_that_were_not_worked_out_say_so():
    statistics = Statistics()
    statistics.add_decisions([alert(reasons=None)])
    assert 'not computed' in page(statistics)


def test_more_shoppers_at_risk_than_fit():
    statistics = Statistics()
    statistics.add_decisions([alert(f'u{number}') for number in range(1_500)])
    assert 'The 20 of 1,500 shoppers whose churn alert' in Outline(page(statistics)).text


def test_every_reason_has_words():
    assert set(Reason) <= REASON_WORDS.keys()
    assert 'ts_in_seconds the time looks like seconds; milliseconds are expected 29' in _cells(full_page())


def test_nothing_dead_no_section():
    assert 'Dead letters' not in page(Statistics())


def test_an_empty_replay_says_so_in_sentences():
    about = replace(ABOUT, sources=['empty.jsonl'], first_ms=0, last_ms=0, tier_names=None)
    html = page(Statistics(), Counts(), about)
    outline = Outline(html)
    assert 'class="plot' not in html
    for words in ('no row has a readable time', '0 = 0 + 0 + 0 + 0', 'no valid event', 'No shopper was scored',
                  'There are no shoppers', 'There were no alerts', 'No churn alert was open at the end'):
        assert words in outline.text
    assert [text for level, text in outline.headings if level == 2] == SECTIONS[:-1]


@pytest.mark.parametrize('hours', [1, 2, 30, 220, 9_600, 1_080_000])
def test_any_span_can_be_drawn(hours):
    statistics = Statistics()
    for hour in {0, hours - 1}:
        statistics.events_per_hour[29_000 + hour] = Counter(view=1)
        statistics.alerts_per_hour[29_000 + hour] = Counter({'churn.alert raised': 1})
    assert f'view {len({0, hours - 1})} ' in Outline(page(statistics)).text


def test_a_spike_puts_the_counts_on_a_log_axis():
    statistics = Statistics()
    for name, tallest in (('intent', 1_000_000), ('churn', 50)):
        statistics.score_histograms[name] += np.array([tallest] + [5] * 49)
    assert page(statistics).count('times scored (log scale)') == 1


# ---- safe, self-contained, the same each time -----------------------------------------------------------------------


def test_what_users_and_files_are_called_is_text():
    statistics = full()
    statistics.add_decisions([alert(NASTY, action=NASTY, reasons=[{'name': 'x', 'text': NASTY, 'effect': 0.5}])])
    statistics.dead[NASTY] = 1
    about = replace(ABOUT, sources=[NASTY], tier_names=(NASTY, '$x^2$', NASTY), format=NASTY, currency=NASTY)
    html = page(statistics, about=about)
    assert '<script' not in html
    outline = Outline(html)
    assert outline.open == []
    assert outline.text.count(NASTY) >= 8
    assert '>$x^2$</text>' in html
    assert any(NASTY in attributes.get('data-label', '') for _, attributes in outline.tags)


def test_nothing_is_fetched_and_nothing_runs():
    html = full_page()
    tags = Outline(html).tags
    assert not {'script', 'link', 'img', 'iframe', 'object', 'image'} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith('on')]
    assert all(attributes.get(name, '#').startswith('#') for _, attributes in tags for name in
               ('href', 'xlink:href', 'src'))
    policy = next(attributes for _, attributes in tags if attributes.get('http-equiv') == 'Content-Security-Policy')
    assert policy['content'] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not re.search(r'@import|url\((?!#)', html)


def test_plots_speak_and_their_ids_are_unique():
    tags = Outline(full_page()).tags
    plots = [attributes for tag, attributes in tags if tag == 'svg' and 'plot' in attributes.get('class', '')]
    assert len(plots) == 2 * 4 + 3
    assert all(plot['role'] == 'img' and plot['aria-label'] for plot in plots)
    ids = [attributes['id'] for _, attributes in tags if 'id' in attributes]
    assert len(ids) == len(set(ids))
    used = [target for _, attributes in tags for name in ('xlink:href', 'clip-path')
            for target in re.findall(r'#([^)]+)', attributes.get(name, ''))]
    assert used
    assert set(used) <= set(ids)


def test_the_same_replay_gives_the_same_bytes(tmp_path):
    path = tmp_path / 'report.html'
    path.write_text('what was there before')
    write_report(path, full(), COUNTS, MODEL, ABOUT)
    assert path.read_bytes() == full_page().encode()


def test_the_order_in_which_things_were_counted_does_not_show():
    statistics = full()
    per_hour = statistics.events_per_hour
    for counted in (statistics.dead, statistics.tiers, per_hour, *per_hour.values()):
        items = list(counted.items())[::-1]
        counted.clear()
        counted.update(dict(items))
    assert page(statistics) == full_page()


# ---- bins over time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('span_hours', 'bin_hours'), [
    (1, 1), (TIME_BINS_MAX - 1, 1), (TIME_BINS_MAX, 24), (24 * (TIME_BINS_MAX - 1), 24), (24 * TIME_BINS_MAX, 168),
    (24 * 1_200, 672), (24 * 46_000, 8736)])
def test_longer_spans_get_longer_bins(span_hours, bin_hours):
    last = HOUR + span_hours - 1
    some = range(HOUR, last + 1, max(1, span_hours // 5_000))
    hours = {at: Counter(view=1 + at % 3, purchase=1) for at in some}
    series = binned(hours, HOUR, last, ('view', 'purchase', 'refund'))
    assert series.bin_hours == bin_hours
    assert len(series.edges) - 1 <= TIME_BINS_MAX
    assert set(np.diff(series.edges)) == {bin_hours}
    assert series.edges[0] <= HOUR < series.edges[0] + bin_hours
    assert series.edges[-1] > last >= series.edges[-2]
    assert list(series.counts) == ['view', 'purchase']
    expected = [sum(hours[at]['view'] for at in some if start <= at < end) for start, end in pairwise(series.edges)]
    assert series.counts['view'].tolist() == expected


def test_weeks_begin_on_mondays_and_days_at_midnight():
    series = binned({HOUR: Counter(view=1)}, HOUR, HOUR + 24 * 300, ('view',))
    assert np.array(series.edges[:1], 'datetime64[h]').astype(object)[0].weekday() == 0
    series = binned({HOUR + 5: Counter(view=1)}, HOUR + 5, HOUR + 24 * 10, ('view',))
    assert series.edges[0] == HOUR


def _cells(html: str) -> str:
    """The text of the tables with a blank between cells."""
    return ' '.join(re.sub('<[^>]+>', '', re.sub('</t[hd]>', ' ', html)).split())
