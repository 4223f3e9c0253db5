"""The model card: a checkpoint's numbers in words and tables. Nothing in it is typed by hand."""
import hashlib
from datetime import UTC, datetime

from stream.core.features import COUNTERS, SLOT_NUMBERS
from stream.core.layout import DAY_MS
from stream.learn.backbones import describe
from stream.learn.checkpoint import Checkpoint
from stream.learn.clean import in_words
from stream.learn.compress import attentions
from stream.learn.dataset import CHURN, HORIZON_DAYS, INTENT, NEXT_DAYS, REFUND_DAYS, SPEND_DAYS
from stream.learn.judging.judge import MODEL, TOP
from stream.learn.model import ShopperModel
from stream.scoring.artefact import Precision

NAME = 'shopper'        # of a model that is given none
_REFUND = (f'| `refund` | the risk head: probability of a refund or a cancelled order within {REFUND_DAYS} days; a '
           'hint for service, never for a credit decision; its quality is not measured below |\n')
_NEXT = '### What is bought next\n\n'
_COLUMNS = {'item': 'items', 'category': 'categories'}


def card(kept: Checkpoint, name: str, version: int, difference: float, graph: bytes,
         precision: Precision = 'fp32') -> str:
    """The card as Markdown. `graph`: the exported file, which differs from torch by at most `difference`."""
    digest, size = hashlib.sha256(graph).hexdigest(), len(graph)
    config, metrics = kept.config, kept.metrics
    data, test, edges = config['data'], metrics['test'], config['tiers']['edges']
    best = metrics['epochs'][metrics['best_epoch'] - 1]
    parameters = sum(parameter.numel() for parameter in kept.model.parameters())
    unit = config['currency'] if config['priced'] else 'counted in lines, as no purchase had a price'
    bounds = ['nothing', *(f'{low:.2f} to {high:.2f}' for low, high in zip([0, *edges], edges, strict=False)),
              f'{edges[-1] if edges else 0:.2f} and more']
    return f'''# {name}, version {version}

Scores a shopper from the newest events and lifetime counters: will this person buy soon, how much, or not any more?

| output | meaning |
|---|---|
| `purchase_intent` | probability of a purchase within {HORIZON_DAYS[INTENT]} days |
| `tier_probabilities` | tier of spend (purchases less refunds) in the next {SPEND_DAYS} days, {unit}: \
{'; '.join(f'{tier} = {bound}' for tier, bound in zip(config['tiers']['names'], bounds, strict=True))} |
| `expected_spend` | spend in the next {SPEND_DAYS} days, {unit} |
| `churn` | probability of no purchase within {HORIZON_DAYS[CHURN]} days |
| `row_id_out` | the row id that came in |
| `purchase` | probabilities of a purchase within {', '.join(map(str, HORIZON_DAYS))} days |
| `typical_spend` | the median spend of such users, if they buy in the next {SPEND_DAYS} days; 0 if a purchase is less \
likely than not |
{_REFUND if kept.model.refund else ''}
Inputs: `categories` int32 [rows, slots, 3], `numbers` float32 [rows, slots, {SLOT_NUMBERS}], `counters` float32 \
[rows, {COUNTERS}], `row_id` int64 [rows, 1], as `stream.core.features` builds them. A padded slot contains only zeros.

- Graph: {_backbone(kept)} and a linear branch over the counters, mixed at the logit and calibrated; \
{parameters:,} parameters, {size / 1e6:.1f} MB.
- `{version}/model.onnx`: SHA-256 `{digest}`; \
differs from torch by at most {difference:.0e} on windows of the test split.{_precision(precision)}{_taught(config)}
- `warmup`: a window of each length from the test split, which Triton runs before it says that the model is ready.
{_ranking(kept, name)}- Licence: Apache-2.0{_licence(config)}.
- Made by: `{config['command']}`, then `{_exported(name, version, precision)}` (seed {config['seed']}, \
{metrics['seconds']:,} s on {metrics.get('device', 'one CPU core')}).

## Data

{config['source']}: {data['events']:,} events of {data['users']:,} users, \
{_day(data['start_ms'])} to {_day(data['known_until_ms'])}, {data['refused']:,} records refused.
Examples are of two kinds: every shopper at daily cut-offs, and shoppers at moments when the worker scores, after events
and at silence timers. Whether a moment becomes an example does not depend on later events. The worker's own code builds
the inputs. A label is used only if its period has ended.{_cleaning(config['removed'])}

| split | users | moments | time |
|---|---|---|---|
| train, and validation for the best pass | {data['train_users']:,} | {data['train_moments']:,} | \
before {_day(data['cut_ms'])}, labels too |
| test | {data['test_users']:,} | {data['test_moments']:,} | from {_day(data['cut_ms'])} |

No user is in both. {_kept(config)} Training: best of {len(metrics['epochs'])} passes by validation loss, pass \
{metrics['best_epoch']} (training {best['train']:.3f}, validation {best['validation']:.3f}).
{_searched(metrics['trials'])}

## How good it is

Measured on the test split, with 95 % bootstrap intervals over users in brackets.

- More is better for AUC, PR-AUC, lift, accuracy, Spearman and top decile. Lift compares the tenth of the examples with
  the highest scores with all examples: it divides their shares of positives. Top decile is this tenth's share of all
  spend.
- Less is better for log loss, Brier score, ECE (expected calibration error) and mean error.

Baselines: the recency rule ranks shoppers by the time since the last order, newest first. Logistic regression sees the
same counters as the model. "Spend of 90 days" predicts the spend of the previous 90 days. "Most common tier" and
"median of training" predict one value, taken from the training split, for everybody. Active means: bought within the
previous 90 days.

{_comparison(test)}
Figures on which the model does not beat a baseline: {_defeats(test)}
{_unjudged(test)}
Shares in the test split: {'; '.join(f'{task} {rate:.1%}' for task, rate in test['base_rates'].items())}.
{_ceiling(metrics['ceiling'])}
### Calibration

The moments are sorted by score and cut into ten bins of equal size. Each column shows the mean score of a bin, and the
share that really came true.

{_calibration(test)}
### Segments

{_segments(test)}
{_next(kept)}## Limits

- {_origin(config['source'])}
- Base rates drift with the seasons. The model has those of the newest complete labels in training.
- The scores say what is likely, not why, and not what a coupon would change.
- Items and categories are hashed. A shop with other names, prices or another currency needs its own training.
- Serve with the same window limits as in training: {config['window']['events_max']} events, \
{config['window']['span_ms'] // DAY_MS} days.
- Expected spend never exceeds the largest one seen in training.
- Not for decisions with legal or similarly serious effects on people.
'''


def _exported(name: str, version: int, precision: Precision) -> str:
    """The command that exports it so."""
    flags = [f' --name {name}' if name != NAME else '', f' --version {version}' if version != 1 else '',
             ' --int8' if precision == 'int8' else '']
    return f'stream export DIR{"".join(flags)} --into triton_models'


def _backbone(kept: Checkpoint) -> str:
    told = describe(kept.model.backbone)
    learning = kept.config['learning']['backbone']
    if told.encoder:
        text = (f'backbone `events`, an encoder on event tokens ({told.encoder.layers} '
                f'layer{"s" * (told.encoder.layers > 1)}, {told.encoder.hidden} units, '
                f'{_heads(kept.model)}, causal, a query last)')
    else:
        text = (f'backbone `{told.name}` from `{learning["source"]}`, tuning `{learning["tuning"]}`, on the window '
                f'written as text ({kept.model.backbone.width} units, at most {told.tokens_max} tokens)')
    if told.catalogue_columns:
        text += f', the items of the catalogue `{learning["catalogue"]}` ({told.catalogue_columns} columns)'
    return text


def _ranking(kept: Checkpoint, name: str) -> str:
    if kept.recommender is None:
        return ''
    columns = ' and '.join(_COLUMNS[column] for column in kept.recommender.columns)
    return (f'- Beside it `{name}_next` ranks the {columns} that a shopper buys within {NEXT_DAYS} days. It '
            'can also rank given candidates.\n')


def _next(kept: Checkpoint) -> str:
    """How good the ranking beside it is."""
    if kept.recommender is None:
        return ''
    if not (figures := kept.metrics['ranking']):
        return (f"{_NEXT}How good the ranking is was not measured: too few of the test's users buy within {NEXT_DAYS} "
                'days that are settled.\n\n')
    asked = _day(kept.config['data']['cut_ms'])
    parts = [f"""{_NEXT}As of {asked}, {TOP} items or categories are ranked for each test user who buys some within
{NEXT_DAYS} days. NDCG (normalised discounted cumulative gain) rewards a hit more, the higher it is ranked. Recall is
the share of all bought items that are among the {TOP}. More is better for both. "Own past" ranks what the user dealt
with most; newer events count more.
"""]
    for column, judged in figures.items():
        users = f'{_COLUMNS[column]}, {judged["rows"]:,} users'
        parts += [f'| {users} | NDCG at {TOP} | recall at {TOP} | our NDCG minus it |', '|---' * 4 + '|']
        parts += [f'| {name} | {_number(numbers["metrics"]["ndcg"])} | {_number(numbers["metrics"]["recall"])} | '
                  f'{_number(numbers["model_less"].get("ndcg"))} |' for name, numbers in judged['contenders'].items()]
        parts.append('')
    return '\n'.join(parts) + '\n'


def _licence(config: dict) -> str:
    source = config['learning']['backbone']['source']
    return f'; the weights of `{source}`, which it started from, have one of their own' if source else ''


def _heads(model: ShopperModel) -> str:
    """How many attention heads each layer still has after pruning."""
    heads = [layer.self.num_attention_heads for layer in attentions(model).values()]
    return f'{" and ".join(map(str, heads))} heads' if len(set(heads)) > 1 else f'{heads[0]} heads'


def _precision(precision: Precision) -> str:
    if precision == 'fp32':
        return ''
    return """
- Large weights and their inputs have 8 bits, with static ranges from training windows. The figures below are those of
  the same model in fp32. The scores of this one differ from them by no more than said above. It is for CPUs: TensorRT
  does not accept it."""


def _taught(config: dict) -> str:
    distil = config['learning']['distil']
    if not distil['teachers']:
        return ''
    return f"""
- Distilled from {distil['teachers']} larger models, whose probabilities have {distil['weight']:.0%} of the loss."""


def _cleaning(removed: list[dict]) -> str:
    if not removed:
        return ''
    return ('\nThe examples to learn from were cleaned, but not the inputs at a moment, and not the test. Removed: '
            + '; '.join(map(in_words, removed)) + '.')


def _searched(trials: list[dict]) -> str:
    """The trials of the search and their results."""
    if not trials:
        return ''
    names = list(trials[0]['settings'])
    lines = [f'\n### Sizes and rates\n\nFound by {len(trials)} trials, judged on the validation users. The first trial '
             'has the given settings. The test split was not used.\n',
             '| trial | ' + ' | '.join(name.replace('_', ' ') for name in names) + ' | passes | validation loss |',
             '|---' * (len(names) + 3) + '|']
    for number, trial in enumerate(trials, 1):
        loss = 'given up' if trial['validation'] is None else f'{trial["validation"]:.4f}'
        lines.append(f'| {number}{" (kept)" if trial["kept"] else ""} | ' + ' | '.join(
            f'{trial["settings"][name]:.3g}' if isinstance(trial['settings'][name], float)
            else f'{trial["settings"][name]}' for name in names) + f' | {trial["passes"]} | {loss} |')
    return '\n'.join(lines) + '\n'


def _kept(config: dict) -> str:
    if config['refit']:
        return (f'The kept model was then trained in the same way on all users and days ({config["data"]["moments"]:,} '
                'moments): the figures below are those of the first model, which had not seen the test.')
    return 'The model that was judged is the one that is kept.'


def _ceiling(ceiling: dict) -> str:
    """The best possible AUC, for a simulated shop."""
    if not ceiling:
        return ''
    lines = ['\n### The ceiling\n', "AUC on some of the test's moments. The posterior is the exact probability, "
             "calculated from the simulator's own rules and the observed events. No model can know more. A "
             'figure above it is luck, because the moments are few.\n',
             '| | moments | recency rule | model | posterior | share of the gap that the model closes |',
             '|---' * 6 + '|']
    lines += [f'| {task} | {row["moments"]:,} | {row["recency rule"]:.3f} | {row["model"]:.3f} | '
              f'{row["posterior"]:.3f} | {row["share"]:.0%} |' for task, row in ceiling.items()]
    return '\n'.join(lines) + '\n'


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime('%Y-%m-%d')


def _origin(source: str) -> str:
    if 'simulated' in source:
        return ('Trained and tested on simulated shoppers: these figures say nothing about real shoppers. Train on '
                'your own recordings before you rely on it.')
    return 'Trained on one recording: other shops and later years differ.'


_LESS_IS_BETTER = {'log_loss', 'brier', 'ece', 'mean_absolute_error'}
_TITLES = {'auc': 'AUC', 'pr_auc': 'PR-AUC', 'log_loss': 'log loss', 'brier': 'Brier score', 'ece': 'ECE',
           'accuracy': 'accuracy', 'within_one_tier': 'within one tier', 'top_decile_lift': 'lift',
           'spearman': 'Spearman', 'top_decile_share': 'top decile', 'mean_absolute_error': 'mean error',
           'total_predicted_over_real': 'predicted / real'}


def _comparison(test: dict) -> str:
    lines = []
    for task, contenders in test['tasks'].items():
        columns = list(contenders[MODEL]['metrics'])
        lines += [f'| {task} | ' + ' | '.join(_TITLES[metric] for metric in columns) + ' |',
                  '|---' * (len(columns) + 1) + '|']
        lines += [f'| {name} | ' + ' | '.join(_number(numbers['metrics'].get(metric)) for metric in columns) + ' |'
                  for name, numbers in contenders.items()]
        lines.append('')
    return '\n'.join(lines)


def _number(interval: list[float | None] | None) -> str:
    numbers = [number for number in interval or () if number is not None]
    if len(numbers) < 3:        # not a number of this contender, or too few rows to compute it
        return ''
    digits = 0 if abs(numbers[0]) >= 100 else 3
    value, low, high = (f'{number:.{digits}f}' for number in numbers)
    return f'{value} ({low} .. {high})'


def _defeats(test: dict) -> str:
    """Every baseline's number that is as good as the model's or better, and whether the bootstrap tells them apart."""
    found = []
    for task, contenders in test['tasks'].items():
        for name, numbers in contenders.items():
            for metric, difference in numbers['model_less'].items():
                if None in difference or metric == 'total_predicted_over_real':
                    continue
                sign = -1 if metric in _LESS_IS_BETTER else 1
                value, low, high = (sign * number for number in difference)
                if value <= 0:
                    clear = 'clearly' if max(low, high) < 0 else 'within the noise'
                    found.append(f'{task}, {_TITLES[metric]}: {name} ({clear})')
    return '; '.join(found) + '.' if found else 'none.'


def _unjudged(test: dict) -> str:
    """Outputs of the model whose quality was not measured."""
    asked = [f'purchase within {days} d' for days in HORIZON_DAYS] + [
        f'churn within {days} d, active' for days in (HORIZON_DAYS[CHURN], SPEND_DAYS)] + [
        f'{what} in {SPEND_DAYS} d' for what in ('tier of spend', 'spend', 'typical spend')]
    missing = [task for task in asked if task not in test['tasks']]
    if not missing:
        return ''
    return ('\nNot measured, so trust it less; the test split has too few complete labels for it: '
            f'{"; ".join(missing)}.\n')


def _calibration(test: dict) -> str:
    lines = ['| | ' + ' | '.join(str(place + 1) for place in range(10)) + ' |', '|---' * 11 + '|']
    for task, bins in test['calibration'].items():
        if not bins:
            continue
        for what in ('score', 'rate'):
            lines.append(f'| {task} {what} | ' + ' | '.join(f'{row[what]:.3f}' for row in bins) + ' |')
    return '\n'.join(lines) + '\n'


def _segments(test: dict) -> str:
    lines = ['| moments | number | bought in 7 d | AUC | ECE | bought in 30 d | AUC | ECE |', '|---' * 8 + '|']
    for name, row in test['segments'].items():
        numbers = [row.get(key) for key in ('intent_rate', 'intent_auc', 'intent_ece', 'purchase_rate', 'purchase_auc',
                                            'purchase_ece')]
        lines.append(f'| {name} | {row["rows"]:,} | ' + ' | '.join(
            '' if number is None else f'{number:.3f}' for number in numbers) + ' |')
    return '\n'.join(lines) + '\n'
