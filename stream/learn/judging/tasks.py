"""What to predict for every user as of a day of a recording, and what happened.

    default_cutoffs   days that leave enough events before and after them
    Cutoff            all users seen before a day, and the tasks that are settled for them
    Task, truth_of    a yes-or-no task, and its outcome
    spend_horizons    the horizons for which spend is predicted
    segments          groups of users for which scores may be better or worse
"""
from dataclasses import dataclass
from typing import Any

import numpy as np

from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import UsageError
from stream.learn.dataset import ACTIVE_DAYS, HORIZON_DAYS, SPEND, Examples, History, at_time

USERS_PER_SIDE_MIN = 10
CUTOFFS_MAX = 2
CUTOFF_DAYS = (273, 90, 30)         # before the last day: T so that such a horizon is settled
PAST_SHARE_MIN = 0.45               # of the recording, that must lie before T
CHURN_HORIZON = HORIZON_DAYS.index(90)
SPEND_HORIZONS = (SPEND, len(HORIZON_DAYS) - 1)


@dataclass(frozen=True)
class Task:
    """A yes-or-no task: a purchase within a horizon. `churn`: no purchase, for active users only."""

    horizon: int
    churn: bool = False

    @property
    def name(self) -> str:
        return f'{"churn" if self.churn else "purchase"}_{HORIZON_DAYS[self.horizon]}d'

    def words(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {'name': self.name, 'days': HORIZON_DAYS[self.horizon], 'churn': self.churn}


@dataclass(frozen=True)
class Cutoff:
    """A cut-off: the users seen before it, the tasks that can be judged, and those that cannot, with the reason."""

    at_ms: int
    asked: Examples
    tasks: list[Task]
    skipped: list[tuple[Task, str]]

    @staticmethod
    def of(history: History, at_ms: int, limits: WindowLimits) -> 'Cutoff':
        end_ms, shortest_ms = known_until(history), HORIZON_DAYS[0] * DAY_MS
        if not history.start_ms + shortest_ms < at_ms <= end_ms - shortest_ms:
            raise UsageError(f'Before {day_of(at_ms)} there is nothing to learn from, or nothing to foretell after it.',
                             do=f'name a day within {day_of(history.start_ms)} to {day_of(history.end_ms)}.')
        asked = at_time(history, range(len(history.user_ids)), at_ms, limits, end_ms)
        tasks, skipped = [], []
        for task in (*map(Task, range(len(HORIZON_DAYS))), Task(CHURN_HORIZON, churn=True)):
            truth = truth_of(asked, task)
            fewer = min(int((truth == 1).sum()), int((truth == 0).sum()))
            if at_ms + HORIZON_DAYS[task.horizon] * DAY_MS > end_ms:
                skipped.append((task, 'the recording ends before it is settled'))
            elif fewer < USERS_PER_SIDE_MIN:
                skipped.append((task, f'only {fewer} users on one side, {USERS_PER_SIDE_MIN} are asked for'))
            else:
                tasks.append(task)
        return Cutoff(at_ms, asked, tasks, skipped)


def truth_of(asked: Examples, task: Task) -> np.ndarray:
    """float64 [n], 1: it happened; NaN: not a task for this user."""
    bought = asked.labels.bought[:, task.horizon].astype(float)
    return np.where(asked.active, 1 - bought, np.nan) if task.churn else bought


def spend_horizons(asked: Examples) -> list[int]:
    """Horizons for which spend is judged: indices into HORIZON_DAYS, settled for all users."""
    return [horizon for horizon in SPEND_HORIZONS if not np.isnan(asked.labels.spent[:, horizon]).any()]


def segments(asked: Examples) -> dict[str, np.ndarray]:
    """Groups of users, bool [n] each."""
    orders, active = asked.snapshots.headers['orders'], asked.active
    return {'never ordered': orders == 0, 'ordered once': orders == 1,
            'ordered 2 to 4 times': (orders > 1) & (orders < 5), 'ordered 5 times or more': orders > 4,
            f'ordered in the last {ACTIVE_DAYS} days': active,
            f'ordered, but not in the last {ACTIVE_DAYS} days': (orders > 0) & ~active}


def default_cutoffs(history: History) -> list[int]:
    """Midnights (UTC) that settle a horizon and leave enough of the recording before them.

    Returns  at most CUTOFFS_MAX, those of the longest horizons
    Errors   UsageError where there is none
    """
    last_ms = history.end_ms // DAY_MS * DAY_MS
    past_ms = PAST_SHARE_MIN * (history.end_ms - history.start_ms)
    fitting = [last_ms - days * DAY_MS for days in CUTOFF_DAYS if last_ms - days * DAY_MS - history.start_ms >= past_ms]
    if not fitting:
        days = (history.end_ms - history.start_ms) / DAY_MS
        raise UsageError(f'{days:.0f} days are too few to learn from some and to foretell {CUTOFF_DAYS[-1]} others.',
                         do='use a longer recording, or name a day with --at.')
    return fitting[:CUTOFFS_MAX]


def known_until(history: History) -> int:
    """The end of the last day, ms: nothing is known after it."""
    return (history.end_ms // DAY_MS + 1) * DAY_MS


def day_of(at_ms: int) -> str:
    """As an ISO day, UTC."""
    return str(np.datetime64(at_ms, 'ms').astype('datetime64[D]'))
