"""The value of another shop's model here: the learning curve of `stream compare --pretrained-on`.

    1 shares   1, 5, 10 and 100 % of the training users of a fold; several draws where the users are few
    2 starts   the same fit on the same users, once from scratch, once from the other shop's backbone
    3 scores   the fold's users as of the cut-off, whom neither fit has seen
    4 figures  the mean AUROC over folds and draws, with intervals from resamples of the users and of the draws

The counters branch starts from scratch in both and learns the same: only the window branch can gain. With few users an
epoch has few steps, so there are more epochs: otherwise a start from scratch would have too few steps.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from stream.core.layout import DAY_MS
from stream.errors import UsageError
from stream.learn.dataset import Examples, History, at_time, part_of
from stream.learn.fit import FitOptions, check_fit, fit, window_logits
from stream.learn.judging.compare import CompareOptions, fold_of, runner
from stream.learn.judging.judge import COUNTERS, MODEL, SCRATCH, TRANSFERRED, WINDOW
from stream.learn.judging.quality import auc, interval
from stream.learn.judging.tasks import Cutoff, Task, day_of, known_until, truth_of

SHARES = (0.01, 0.05, 0.1, 1.0)
_DRAWS_MAX = 3
_DRAWN_USERS = 200          # as many draws of a share as bring so many users together, at most _DRAWS_MAX
_MORE_EPOCHS_MAX = 4
_SMALL_BATCH_ROWS = 32


@dataclass(frozen=True)
class ShareScores:
    """Scores of the n users of a part, by models that learned from a share of the other users.

    user    int64 [n], as in the comparison
    users   that taught, on average over the draws
    scores  by start, then MODEL or WINDOW: float [draws, n, horizons]; COUNTERS, which both share, by SCRATCH
    failed  why a draw could teach nothing, for each that could not
    """

    user: np.ndarray
    users: float
    scores: dict[str, dict[str, np.ndarray]]
    failed: list[str]


def transfer(history: History, at_ms: int, source: Path, options: CompareOptions, say: Callable[[str], None]) -> dict:
    """The curve as of a cut-off, ready for JSON.

    source   a checkpoint of another shop
    Errors   ModelError where it is none, or its encoder has other sizes.
    Promise  on one machine the same options give the same figures.
    """
    cutoff = Cutoff.of(history, at_ms, options.limits)
    jobs = [(history, at_ms, part, share, source, options) for share in SHARES for part in range(options.folds)]
    with runner(min(options.processes, len(jobs))) as run:
        scored: dict[float, list[ShareScores]] = {share: [] for share in SHARES}
        for (_, _, part, share, *_), scores in zip(jobs, run(score_share, jobs), strict=True):
            scored[share].append(scores)
            say(f'{day_of(at_ms)}, {share:.0%} of the users, part {part + 1} of {options.folds}: {scores.users:.0f} '
                f'users taught {len(scores.user):,} others, from scratch and from {source.name}')
        asked = [(task, [(scores, truth_of(cutoff.asked, task)[np.searchsorted(cutoff.asked.user, scores.user)])
                         for scores in scored[share]], options) for task in cutoff.tasks for share in SHARES]
        judged = list(run(judge_share, asked))
    by_task = [judged[at:at + len(SHARES)] for at in range(0, len(judged), len(SHARES))]
    return {
        'source': source.name, 'at_ms': at_ms,
        'shares': [{'share': share, 'users': float(np.mean([scores.users for scores in scored[share]])),
                    'failed': sorted({reason for scores in scored[share] for reason in scores.failed})}
                   for share in SHARES],
        'tasks': [task.words() | {'shares': shares} for task, shares in zip(cutoff.tasks, by_task, strict=True)],
    }


def check_source(source: Path, options: CompareOptions) -> None:
    """Check that the models can start from this checkpoint. Errors: as in `transfer`."""
    check_fit(replace(options.fit, start_from=str(source)))


# ---- 1 shares -------------------------------------------------------------------------------------------------------

def draws_of(users: int) -> int:
    """How often to draw this many users: more often if they are few."""
    return min(_DRAWS_MAX, math.ceil(_DRAWN_USERS / users))


def drawn(user_ids: Sequence[str], users: Sequence[int], share: float, draw: int, options: FitOptions) -> list[int]:
    """A share of the training users and of the validation users, at least one of each."""
    validates = np.array([part_of(user_ids[user], (options.validation_share,), options.seed) == 0 for user in users])
    rng = np.random.default_rng([options.seed, draw])
    chosen = [rng.permutation(np.array(users)[group])[:max(1, round(share * group.sum()))]
              for group in (validates, ~validates)]
    return sorted(np.concatenate(chosen).tolist())


def few_users(options: FitOptions, users: int, days: float) -> FitOptions:
    """The fit with more epochs of smaller batches, if so many users and days give less than an epoch."""
    moments = users * (min(options.examples.cutoffs_per_user, days) + options.examples.moments_per_user)
    more = min(_MORE_EPOCHS_MAX, round(options.rows_per_epoch / moments))
    if more <= 1:
        return options
    return replace(options, epochs=more * options.epochs, patience=more * options.patience,
                   batch_rows=min(options.batch_rows, _SMALL_BATCH_ROWS))


# ---- 2 starts, 3 scores ---------------------------------------------------------------------------------------------

def score_share(history: History, at_ms: int, part: int, share: float, source: Path, options: CompareOptions,
                ) -> ShareScores:
    """Train on a share of the users of the other folds, on events before the cut-off; score the users of this fold."""
    with threadpool_limits(1):
        known = history.before(at_ms)
        learners = [user for user, user_id in enumerate(known.user_ids) if fold_of(user_id, options) != part]
        held_out = [user for user, user_id in enumerate(history.user_ids) if fold_of(user_id, options) == part]
        test = at_time(history, held_out, at_ms, options.limits, known_until(history))
        base = replace(options.fit, seed=options.seed)
        found: dict[str, dict[str, list[np.ndarray]]] = {SCRATCH: {MODEL: [], WINDOW: [], COUNTERS: []},
                                                         TRANSFERRED: {MODEL: [], WINDOW: []}}
        counts, failed = [], []
        for draw in range(draws_of(max(1, round(share * len(learners))))):
            users = drawn(known.user_ids, learners, share, draw, base)
            counts.append(len(users))
            few = few_users(base, len(users), (at_ms - known.start_ms) / DAY_MS)
            try:
                fitted = {start: _scores(known, users, at_ms, start_options, test, options)
                          for start, start_options in ((SCRATCH, few),
                                                       (TRANSFERRED, replace(few, start_from=str(source))))}
            except UsageError as error:     # of few users nobody may buy
                failed.append(error.problem)
                continue
            for start, by_branch in found.items():
                for branch, draws in by_branch.items():
                    draws.append(fitted[start][branch])
        return ShareScores(test.user, float(np.mean(counts)),
                           {start: {branch: np.array(draws) for branch, draws in by_branch.items()}
                            for start, by_branch in found.items()}, failed)


def _scores(known: History, users: list[int], at_ms: int, options: FitOptions, test: Examples,
            comparing: CompareOptions) -> dict[str, np.ndarray]:
    """By MODEL, WINDOW and COUNTERS, float [n, horizons]: chances of a purchase, and how each branch alone ranks."""
    fitted = fit(known, users, at_ms, options, comparing.limits, Console(file=StringIO()), ranked=False)
    model = fitted.model
    with torch.no_grad():
        window = window_logits(model, test, np.arange(len(test)))
        counters = model.counters(torch.from_numpy(test.inputs.counters))
        mixed = model.mixed(window, counters)
        told = model.told_from
        return {MODEL: model.probabilities(mixed[:, :model.calibration_scale.numel()])[:, :len(told)].numpy(),
                WINDOW: window[:, told].numpy(), COUNTERS: counters[:, told].numpy()}


# ---- 4 figures ------------------------------------------------------------------------------------------------------

def judge_share(task: Task, parts: Sequence[tuple[ShareScores, np.ndarray]], options: CompareOptions,
                ) -> dict[str, Any] | None:
    """AUROC of a question by start and branch, and the gain from starting with the other shop's model, with intervals.

    parts   scores of each part, and what came to be of its users: float [n], 1 or 0; NaN: not asked of them
    Returns None where a part has no scores.
    """
    if any(not len(scores.scores[SCRATCH][MODEL]) for scores, _ in parts):
        return None
    figures = {(start, branch): np.empty(options.resamples + 1)
               for start, by_branch in parts[0][0].scores.items() for branch in by_branch}
    rng = np.random.default_rng(options.seed)
    for sample in range(options.resamples + 1):
        chosen = [_resampled(scores, truth, rng if sample else None) for scores, truth in parts]
        for (start, branch), values in figures.items():
            values[sample] = np.nanmean([
                auc(_sign(scores.scores[start][branch][draw, rows, task.horizon], task), truth[rows])
                for (scores, truth), (rows, draws) in zip(parts, chosen, strict=True) for draw in draws])
    less = {branch: interval(figures[TRANSFERRED, branch] - figures[SCRATCH, branch]) for branch in (MODEL, WINDOW)}
    return {'starts': {start: {branch: interval(figures[start, branch]) for branch in by_branch}
                       for start, by_branch in parts[0][0].scores.items()},
            'transferred_less_scratch': less}


def _sign(scores: np.ndarray, task: Task) -> np.ndarray:
    """The scores of the task: churn is the opposite of a purchase."""
    return -scores if task.churn else scores


def _resampled(scores: ShareScores, truth: np.ndarray, rng: np.random.Generator | None,
               ) -> tuple[np.ndarray, np.ndarray]:
    """The rows and draws to use: all of them, or as many drawn with replacement."""
    asked, draws = np.flatnonzero(~np.isnan(truth)), len(scores.scores[SCRATCH][MODEL])
    if rng is None:
        return asked, np.arange(draws)
    return rng.choice(asked, len(asked)), rng.integers(draws, size=draws)
