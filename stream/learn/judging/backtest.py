"""Judge an exported model on a recording, as of cut-offs, beside rules that need no training.

    1 cut-offs   times of the recording: events before a cut-off are known, later ones are to be predicted
    2 scoring    all users seen before the cut-off, through the exported graph, as it is served
    3 figures    stream.learn.judging.judge

Nothing is trained and torch is not needed. The model must not have been trained on what it is asked about: a cut-off
that is earlier than the manifest's training time is marked. `stream compare` trains a model per cut-off instead, on
other users.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stream.core.layout import WindowLimits
from stream.errors import ModelError
from stream.learn.dataset import ACTIVE_DAYS, HORIZON_DAYS, SPEND_DAYS, History, tier_of
from stream.learn.inference import score
from stream.learn.judging.judge import (
    MODEL,
    PAST_TIER,
    RULES,
    Predictions,
    judge_chances,
    judge_spend,
    judge_tiers,
    spend_forecasts,
)
from stream.learn.judging.simple_rules import Table, past_tier, purchase_rules, spend_rules
from stream.learn.judging.tasks import Cutoff, Task, day_of, segments, spend_horizons, truth_of
from stream.scoring.artefact import Artefact, Manifest, load_artefact

SEEN, UNSEEN, UNKNOWN = 'learned from later days', 'learned from earlier days', 'not known'


@dataclass(frozen=True)
class BacktestOptions:
    """How to judge.

    threshold  probability that counts as positive
    resamples  bootstrap resamples
    """

    seed: int = 7
    threshold: float = 0.5
    resamples: int = 300
    limits: WindowLimits = field(default_factory=WindowLimits)


def backtest(history: History, cutoffs_ms: Sequence[int], version_dir: Path, options: BacktestOptions,
             say: Callable[[str], None]) -> dict:
    """All figures, ready for JSON.

    say      prints a line when a cut-off is done
    Errors   UsageError where a cut-off leaves no events before or after it; ModelError where the model does not match
             its manifest, or predicts none of the horizons.
    """
    artefact = load_artefact(version_dir)
    manifest = artefact.manifest
    if not set(manifest.horizon_days) & set(HORIZON_DAYS):
        raise ModelError(f'The model in {version_dir} tells purchases within {list(manifest.horizon_days)} days.',
                         do='train and export one with this version.')
    cutoffs = []
    for at_ms in cutoffs_ms:
        cutoffs.append(_judged(Cutoff.of(history, at_ms, options.limits), artefact, history.priced, options))
        say(f'{day_of(at_ms)}: {cutoffs[-1]["users"]:,} users, {len(cutoffs[-1]["tasks"])} questions')
    return {
        'model': {'name': manifest.name, 'version': manifest.version, 'sha256': artefact.info.sha256,
                  'trained_on': manifest.trained_on, 'known_until_ms': manifest.known_until_ms or None},
        'recording': {'events': len(history), 'users': len(history.user_ids), 'refused': history.refused,
                      'first_ms': history.start_ms, 'last_ms': history.end_ms, 'priced': history.priced},
        'protocol': {'seed': options.seed, 'resamples': options.resamples, 'active_days': ACTIVE_DAYS,
                     'threshold': options.threshold},
        'cutoffs': cutoffs,
    }


def learned(manifest: Manifest, at_ms: int) -> str:
    """Whether the model was trained on days after the cut-off: SEEN, UNSEEN or UNKNOWN."""
    if not manifest.known_until_ms:
        return UNKNOWN
    return SEEN if manifest.known_until_ms > at_ms else UNSEEN


def _judged(cutoff: Cutoff, artefact: Artefact, priced: bool, options: BacktestOptions) -> dict:
    manifest, asked = artefact.manifest, cutoff.asked
    served, table = score(artefact.weights, asked.inputs, manifest.rows_max), Table.of_examples(asked)
    drawn = options.resamples, options.seed
    money = priced and manifest.priced
    place = {days: column for column, days in enumerate(manifest.horizon_days)}
    kinds = segments(asked)

    def answered(task: Task) -> dict:
        truth = truth_of(asked, task)
        rows = ~np.isnan(truth)
        by_name = {MODEL: Predictions(served['purchase'][:, place[HORIZON_DAYS[task.horizon]]].astype(float), True)}
        for name, rule in purchase_rules().items():
            if priced or name not in spend_rules():
                by_name[name] = Predictions(rule.fit(table, task.horizon).predict(table), False)
        by_name = {name: Predictions(scored.scores[rows], scored.is_chance) for name, scored in by_name.items()}
        if task.churn:
            by_name = {name: scored.complement() for name, scored in by_name.items()}
        return judge_chances(by_name, truth[rows], {words: chosen[rows] for words, chosen in kinds.items()
                                                    if chosen[rows].any()}, *drawn, RULES, options.threshold)

    told = [task for task in cutoff.tasks if HORIZON_DAYS[task.horizon] in place]
    skipped = cutoff.skipped + [(task, 'the model does not tell it') for task in cutoff.tasks if task not in told]
    horizons = [horizon for horizon in spend_horizons(asked)
                if money and {HORIZON_DAYS[horizon], SPEND_DAYS} <= place.keys()]

    def spent(horizon: int) -> dict:
        days = HORIZON_DAYS[horizon]
        return {'days': days} | judge_spend(spend_forecasts(served, days, manifest.horizon_days) | {
            name: rule.fit(table, horizon).predict(table) for name, rule in spend_rules().items()},
            asked.labels.spent[:, horizon].astype(float), *drawn)

    def tier() -> dict | None:
        if not money or np.isnan(asked.labels.spend).any():
            return None
        edges = np.array(manifest.tier_edges[1:])
        return judge_tiers({MODEL: Predictions(served['tier_probabilities'].astype(float), True),
                            PAST_TIER: Predictions(past_tier(table, edges), False)},
                           tier_of(asked.labels.spend, edges), *drawn)

    return {
        'at_ms': cutoff.at_ms, 'users': len(asked), 'active': int(asked.active.sum()),
        'learned': learned(manifest, cutoff.at_ms),
        'tasks': [task.words() | answered(task) for task in told],
        'spend': [spent(horizon) for horizon in horizons],
        'tier': tier(),
        'skipped': [task.words() | {'reason': reason} for task, reason in skipped], 'left_out': [], 'ranking': [],
        'training': [],
    }
