"""The figures of `stream compare` and `stream evaluate` as one HTML page."""
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from stream.learn.clean import in_words
from stream.learn.judging.backtest import SEEN, UNKNOWN
from stream.learn.judging.judge import (
    BOUGHT,
    COMMONEST,
    COUNTERS,
    LEAST_ERROR,
    LIKELIEST,
    MODEL,
    OWN,
    PAST_TIER,
    POPULAR,
    RECENT,
    REFERENCES,
    RULES,
    SASREC,
    SCRATCH,
    TOP,
    TRANSFERRED,
    TYPICAL,
    WINDOW,
)
from stream.page import Draw, render

# Okabe and Ito's colours (Color Universal Design, 2008), which stay apart under colour blindness.
_RIVAL_COLOURS = ('#E69F00', '#009E73', '#CC79A7', '#56B4E9')
_COLOURS = {MODEL: '#0072B2'} | dict(zip(REFERENCES, _RIVAL_COLOURS, strict=False)) | dict(
    zip(RULES, _RIVAL_COLOURS, strict=True))
_PART_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_START_COLOURS = {SCRATCH: '#D55E00', TRANSFERRED: '#0072B2'}
_CHANCE = '#888888'         # the line of whoever knows nothing
_WIDTH, _HEIGHT = 300, 250  # px of a plot

METRICS = {
    'auc': 'AUROC', 'pr_auc': 'Average precision', 'top_decile_lift': 'Lift of the top tenth', 'log_loss': 'Log loss',
    'brier': 'Brier score', 'ece': 'Calibration error', 'spearman': 'Rank correlation',
    'top_decile_share': 'Spend of the top tenth', 'mean_absolute_error': 'Mean error',
    'total_predicted_over_real': 'Total forecast / real', 'accuracy': 'Accuracy',
    'within_one_tier': 'At most one tier off', 'ndcg': f'NDCG at {TOP}', 'recall': f'Recall at {TOP}',
}
CONTENDERS = {
    MODEL: 'the window of events and the counters together, through the exported graph',
    TYPICAL: 'what half of those like this who buy spend no more than; 0 where a purchase is unlikely',
    LIKELIEST: 'whoever is likeliest to buy at all comes first',
    WINDOW: 'what the network that reads the events would rank like without the counters',
    COUNTERS: 'what the linear part on the counters would rank like without the events',
    'recency rule': 'whoever ordered last comes first',
    'past rate': 'orders per day so far',
    'past spend': 'all that was spent so far',
    'spend of 90 days': 'what was spent in the last 90 days',
    'BG/NBD': 'a law of buying until one day one stops, for orders',
    'BG/NBD + Gamma-Gamma': 'the same law for orders, and one for what an order is worth',
    'logistic regression': 'on the counters',
    'PCA + logistic': 'on the principal components of the counters',
    'LDA + logistic': 'on the direction that separates best',
    'LightGBM': 'boosted trees on the counters',
    'MLP regression': 'a network of one hidden layer on the counters; it only ranks',
    COMMONEST: 'each tier with the share that it has among them',
    PAST_TIER: 'the tier of what was spent in the last 90 days',
    POPULAR: 'what most users ever bought comes first, for everybody',
    RECENT: 'the same of the 30 days before',
    OWN: 'what the user dealt with most, lately above all',
    BOUGHT: 'what the user bought most often',
    SASREC: 'a network with attention over the sequence of what the user dealt with',
}


def comparison_page(figures: Mapping[str, Any]) -> str:
    """The page as text.

    figures  of `stream.learn.judging.compare.compare`, and `about`: sources (file names), format, currency; if it was
             asked for `transfer`, of `stream.learn.judging.transfer.transfer`
    Promise  the same figures give the same bytes (with the same release of matplotlib).
    """
    return _rendered('compare.html.j2', figures, REFERENCES, 'Best of the three')


def evaluation_page(figures: Mapping[str, Any]) -> str:
    """The page as text.

    figures  of `stream.learn.judging.backtest.backtest`, and `about`: sources (file names), format, currency, warnings
    Promise  the same figures give the same bytes (with the same release of matplotlib).
    """
    warnings = [*figures['about']['warnings'], *doubts(figures)]
    return _rendered('backtest.html.j2', figures, RULES, 'Best rule', served=figures['model'], warnings=warnings)


def doubts(figures: Mapping[str, Any]) -> list[str]:
    """Reasons why the figures may be too good, one sentence each."""
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


def _rendered(template: str, figures: Mapping[str, Any], rivals: Sequence[str], rival_title: str, **more: Any) -> str:
    """A page of judged cut-offs. `rivals`: the best of them is shown beside the model; `more`: for the template."""
    return render('stream.learn.judging', template, {
        'number': lambda value: f'{value:,}', 'day': day, 'share': partial(_plain, '{:.1%}'),
        'figure': partial(_plain, '{:,.3f}'), 'amount': partial(_plain, '{:,.2f}'),
    }, lambda draw: {
        'about': figures['about'], 'recording': figures['recording'], 'protocol': figures['protocol'],
        'verdicts': _verdicts(figures['cutoffs']), 'metrics': METRICS, 'contenders': CONTENDERS,
        'present': _present(figures['cutoffs']), 'references': rivals, 'rival_title': rival_title, 'model': MODEL,
        'legend': list(_COLOURS.items()), 'question': question, 'within': within,
        'least_error': LEAST_ERROR, 'interval': interval, 'difference': difference,
        'transfer': 'transfer' in figures and _transfer(draw, figures['transfer']),
        'starts': _START_COLOURS, 'window': WINDOW, 'counters': COUNTERS,
        'cleaning': in_words,
        'cutoffs': [_cutoff(draw, cutoff, figures['about']['currency']) for cutoff in figures['cutoffs']],
        **more,
    })


# Words

def on_terminal(task: Mapping[str, Any]) -> list[str]:
    """The contenders of the short table, the model first."""
    rivals = [name for name in REFERENCES if name in task['contenders']] or RULES
    shown = dict.fromkeys((MODEL, WINDOW, COUNTERS, *rivals, RULES[0]))
    return [name for name in shown if name in task['contenders']]


def question(task: Mapping[str, Any]) -> str:
    """What is asked of each user."""
    return f'buys {"nothing " if task["churn"] else ""}{within(task["days"])}'


def within(days: int) -> str:
    """A horizon; a long one in weeks too."""
    weeks = f' ({days // 7} weeks)' if days > 90 else ''
    return f'within {days} {"day" if days == 1 else "days"}{weeks}'


def interval(values: Sequence[float], places: int = 3) -> tuple[str, str]:
    """A figure, and the interval around it."""
    value, low, high = (_plain(f'{{:,.{places}f}}', value) for value in values)
    return value, f'{low} to {high}'


def difference(values: Sequence[float], places: int = 3) -> tuple[str, str]:
    """The same with signs. A value that is too small to show has no sign."""
    zero = f'{0:.{places}f}'
    value, low, high = (_plain(f'{{:+,.{places}f}}', value).replace('-', '−') for value in values)
    value, low, high = (zero if text[1:] == zero else text for text in (value, low, high))
    return value, f'{low} to {high}'


def _plain(form: str, value: float | None) -> str:
    return '–' if value is None or math.isnan(value) else form.format(value)


def day(at_ms: int) -> str:
    """As an ISO day, UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime('%Y-%m-%d')


def _verdicts(cutoffs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The number of questions by verdict."""
    counts = {'better': 0, 'no difference shown': 0, 'worse': 0}
    for cutoff in cutoffs:
        for task in cutoff['tasks']:
            if task['verdict']:
                counts[task['verdict']] += 1
    return counts


def _present(cutoffs: Sequence[Mapping[str, Any]]) -> set[str]:
    """The contenders that answered anything."""
    return {name for cutoff in cutoffs
            for judged in (*cutoff['tasks'], *cutoff['spend'], cutoff['tier'], *cutoff['ranking']) if judged
            for name in judged['contenders']}


# The sections

def _cutoff(draw: Draw, cutoff: Mapping[str, Any], currency: str) -> dict[str, Any]:
    return {
        **cutoff,
        'tasks': [{**task, 'plots': _task_plots(draw, task),
                   'measures': [metric for metric in METRICS if metric in task['contenders'][MODEL]['metrics']]}
                  for task in cutoff['tasks']],
        'spend': [{**spend, 'plot': draw.twice(
            partial(_spend_bins, bins=spend['bins'], currency=currency), _HEIGHT,
            f'Mean spend {within(spend["days"])}, by tenths of the forecast: forecast and real.')}
            for spend in cutoff['spend']],
        'training_plots': _training_plots(draw, cutoff['training'], cutoff['tasks']) if cutoff['training'] else [],
    }


def _task_plots(draw: Draw, task: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """(title, what it shows, plot) of each plot."""
    words, rate = question(task), task['base_rate']
    plots = []
    for name, title, meaning, axes, chance in (
            ('roc', 'ROC', 'The further up and left, the better.',
             ('false alarms among the others', 'found of those it came true for'), ([0, 1], [0, 1])),
            ('precision_recall', 'Precision and recall', 'The further up, the better; grey: calling anybody at random.',
             ('found of those it came true for', 'right among the called'), ([0, 1], [rate, rate])),
            ('gain', 'Gain', 'How many are found by calling only the highest scores; grey: at random.',
             ('called of all users', 'found of those it came true for'), ([0, 1], [0, 1])),
            ('lift', 'Lift', 'How many times as many are found as by calling at random.',
             ('called of all users', 'times as many'), ([0, 1], [1, 1]))):
        fill = partial(_curves, curves={who: task['curves'][who][name] for who in task['curves']}, labels=axes,
                       chance=chance, as_share=name != 'lift')
        plots.append((title, meaning, draw.once(fill, _WIDTH, _HEIGHT, f'{title}: {words}. {meaning}')))
    meaning = 'Each dot is a tenth of the users; on the grey line a chance means what it says.'
    plots.insert(2, ('Calibration', meaning, draw.once(
        partial(_reliability, by_name=task['calibration']), _WIDTH, _HEIGHT, f'Calibration: {words}. {meaning}')))
    return plots


def _training_plots(draw: Draw, training: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]],
                    ) -> list[tuple[str, Markup]]:
    own = [([epoch['train'] for epoch in part['epochs']], [epoch['validation'] for epoch in part['epochs']])
           for part in training]
    plots = [(f'{MODEL.capitalize()}: sum of its tasks’ losses', own)]
    learned = [task for task in tasks
               if not task['churn'] and all(task['name'] in part['network'] for part in training)]
    for task in learned[-1:]:       # the longest horizon that it learned is enough to see how it goes
        networks = [part['network'][task['name']] for part in training]
        plots.append((f'MLP regression, “{question(task)}”: squared error',
                      [(network['train'], network['validation']) for network in networks]))
    return [(title, draw.once(partial(_losses, parts=parts), 3 * _WIDTH // 2, _HEIGHT, title))
            for title, parts in plots]


def _transfer(draw: Draw, transfer: Mapping[str, Any]) -> dict[str, Any]:
    """The cross-shop curve: of each question a table of the shares that taught something, and a plot of each branch."""
    tasks = []
    for task in transfer['tasks']:
        rows = [(share, figures) for share, figures in zip(transfer['shares'], task['shares'], strict=True) if figures]
        plots = [(branch, draw.once(partial(_by_share, rows=rows, branch=branch), 3 * _WIDTH // 2, _HEIGHT,
                                    f'AUROC of {branch} by share of the users: {question(task)}.'))
                 for branch in (MODEL, WINDOW) if rows]
        tasks.append({**task, 'rows': rows, 'plots': plots})
    return {**transfer, 'tasks': tasks}


# The drawings

def _curves(figure: Figure, curves: Mapping[str, Any], labels: tuple[str, str], chance: tuple[list, list],
            as_share: bool) -> None:
    axes = figure.add_subplot()
    axes.plot(*chance, color=_CHANCE, linestyle='--', linewidth=1)
    for name, (x, y) in reversed(list(curves.items())):       # the model on top
        axes.plot(x, y, color=_COLOURS[name], linewidth=2 if name == MODEL else 1.3)
    _share_axis(axes, 'x')
    if as_share:
        _share_axis(axes, 'y')
    else:
        axes.set_ylim(0, None)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])


def _reliability(figure: Figure, by_name: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    axes = figure.add_subplot()
    top = max(max(row['score'], row['rate']) for rows in by_name.values() for row in rows) * 1.05
    axes.plot([0, top], [0, top], color=_CHANCE, linestyle='--', linewidth=1)
    for name, rows in reversed(list(by_name.items())):
        axes.plot([row['score'] for row in rows], [row['rate'] for row in rows], marker='o', markersize=4,
                  color=_COLOURS[name], linewidth=1.6 if name == MODEL else 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.05 else 1))
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel('chance that was given')
    axes.set_ylabel('share that came true')


def _spend_bins(figure: Figure, bins: Sequence[Mapping[str, float]], currency: str) -> None:
    axes = figure.add_subplot()
    places = range(1, len(bins) + 1)
    axes.bar([place - 0.2 for place in places], [row['forecast'] for row in bins], 0.38, color=_COLOURS[MODEL])
    axes.bar([place + 0.2 for place in places], [row['spent'] for row in bins], 0.38, color='#E69F00')
    axes.set_xticks(list(places))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
    axes.set_xlabel('tenths of the users, by forecast')
    axes.set_ylabel(f'mean spend, {currency}')


def _losses(figure: Figure, parts: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    axes = figure.add_subplot()
    for place, (train, validation) in enumerate(parts):
        colour = _PART_COLOURS[place % len(_PART_COLOURS)]
        axes.plot(range(1, len(train) + 1), train, color=colour, linestyle='--', linewidth=1.2)
        axes.plot(range(1, len(validation) + 1), validation, color=colour, linewidth=1.8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel('pass over the training moments')
    axes.set_ylabel('loss')


def _by_share(figure: Figure, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], branch: str) -> None:
    axes = figure.add_subplot()
    places = range(len(rows))
    for start, colour in _START_COLOURS.items():
        value, low, high = zip(*(row['starts'][start][branch] for _, row in rows), strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(places, value, color=colour, marker='o', markersize=4, linewidth=1.8)
    axes.plot(places, [row['starts'][SCRATCH][COUNTERS][0] for _, row in rows], color=_CHANCE, linestyle='--',
              linewidth=1.2)
    axes.set_xticks(list(places), [f'{share["share"]:.0%}' for share, _ in rows])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel('share of the users that taught')
    axes.set_ylabel('AUROC')


def _share_axis(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == 'x' else axes.yaxis
    axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
    (axes.set_xlim if which == 'x' else axes.set_ylim)(0, 1)
