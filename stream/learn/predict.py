"""Score every user of a recording as of a time with an exported model: one JSON line per user.

It is the worker's own path: the core folds the events before the time, features are made of the windows, and the
exported graph runs. Needs no torch; events at or after the time do not count.
"""
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import orjson

from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import ModelError
from stream.learn.dataset import Examples, History, at_time
from stream.learn.inference import score
from stream.learn.ranking.next_items import Names, Texts, rankings, verified
from stream.scoring.artefact import load_artefact

CHURN_DAYS = (30, 90)
PURCHASE_DAYS = (1, 7, 30, 90)
STALE_DAYS = 7  # a time so long after the newest event is probably a wrong time, or a wrong file
_TOLD = 5       # unknown candidates by name


def predict(history: History, at_ms: int, version_dir: Path, limits: WindowLimits, items: int = 0,
            texts: Texts | None = None, candidates: Sequence[str] | None = None,
            say: Callable[[str], None] = lambda words: None) -> Iterator[bytes]:
    """JSON lines in the order of the user ids; what the model does not predict is null.

    items       so many of the items, and of the categories, that are bought next are named; `texts` knows their names
    candidates  ids of the items that are ranked; None: all that the recording names
    say         is told how many of the candidates no event names, and where the newest event is long before the time
    Errors   UsageError where nobody was seen before, or no event names any candidate; ModelError where the model is not
             what its manifest says, lacks a horizon, or does not rank what it should.
    """
    history = history.before(at_ms)
    if (days := (at_ms - history.end_ms) // DAY_MS) > STALE_DAYS:
        say(f'warning: the newest event before that time is {days:,} days older: what came since is not known.')
    artefact = load_artefact(version_dir)
    manifest = artefact.manifest
    if missing := set(PURCHASE_DAYS) - set(manifest.horizon_days):
        raise ModelError(f'The model in {version_dir} does not tell purchases within {sorted(missing)} days.',
                         do='train and export one with this version.')
    place = {days: manifest.horizon_days.index(days) for days in PURCHASE_DAYS}
    order = sorted(range(len(history.user_ids)), key=history.user_ids.__getitem__)
    people = at_time(history, order, at_ms, limits, at_ms)
    answers = score(artefact.weights, people.inputs, manifest.rows_max)
    purchase = answers['purchase'].astype(float)
    tiers = answers['tier_probabilities'].astype(float)
    spend = answers['expected_spend'][:, 0].astype(float)
    typical = answers['typical_spend'][:, 0].astype(float) if 'typical_spend' in answers else None
    money = manifest.priced and history.priced
    ranked = _ranked(history, people, version_dir, items, texts, candidates, say) if items and texts else repeat({})
    for row, (user, active, following) in enumerate(zip(people.user.tolist(), people.active.tolist(), ranked,
                                                        strict=False)):
        line = {'user_id': history.user_ids[user], 'as_of_ms': at_ms, 'active': active}
        line |= {f'purchase_{days}d': _rounded(purchase[row, place[days]]) for days in PURCHASE_DAYS}
        line |= {f'churn_{days}d': _rounded(1 - purchase[row, place[days]]) for days in CHURN_DAYS}
        line |= {'tier': int(tiers[row].argmax()), 'tier_probabilities': [_rounded(share) for share in tiers[row]],
                 'expected_spend_90d': round(float(spend[row]), 2) if money else None,
                 'typical_spend_90d': round(float(typical[row]), 2) if money and typical is not None else None}
        yield orjson.dumps(line | following)


def _ranked(history: History, people: Examples, version_dir: Path, count: int, texts: Texts,
            candidates: Sequence[str] | None, say: Callable[[str], None]) -> Iterator[dict]:
    """`next_items` and `next_categories` of each row, best first, as far as the model ranks them."""
    names: dict[str, Names] = {}
    everybody = range(len(history.user_ids))
    for chances in rankings(verified(version_dir), history, people):
        found = {}
        if candidates is not None and 'item' not in chances:
            raise ModelError(f'The model in {version_dir} ranks no items.', do='leave the candidates out.')
        for column, key in (('item', 'next_items'), ('category', 'next_categories')):
            if column in chances:
                if column not in names:
                    names[column] = Names(history, everybody, column, candidates if column == 'item' else None)
                    if unknown := names[column].unknown:
                        some = ', '.join(unknown[:_TOLD]) + (', ...' if len(unknown) > _TOLD else '')
                        say(f'warning: {len(unknown):,} of {len(candidates or ()):,} candidates are in no event before '
                            f'that time and are left out: {some}')
                best, chance = names[column].best(chances[column], count)
                found[key] = [{'id': text, 'chance': _rounded(share)}
                              for text, share in zip(texts.of(column, best), chance, strict=True)]
        yield found


def _rounded(probability: float) -> float:
    return round(float(probability), 6)
