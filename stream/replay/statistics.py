"""The statistics of a replay for its report, added up block by block.

Memory grows with the number of hours and of users at risk, not with the number of events.
"""
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stream.core.decide import Kind
from stream.core.events import TYPE_NAMES, Event
from stream.core.layout import HOUR_MS, NO_TIER
from stream.core.outbox import Message
from stream.core.scores import STEPS_PER_UNIT, Scores

SCORE_BINS = 50
ALERTS_SHOWN_PER_LABEL = 2
_HOUR_TYPE = 256        # an hour and a type code in one integer


class Statistics:
    """Sums over a replay.

    events_per_hour   hours since 1970 -> type name -> number of valid events
    alerts_per_hour   hours since 1970 -> label (the message's type, and its state if it has one) -> number of messages
    score_histograms  intent, churn, power -> counts in SCORE_BINS equal bins over [0, 1]
    tiers             last tier, None for no tier -> number of users
    dead              reason -> number of dead letters
    alerts_shown      the newest messages of each label, at most ALERTS_SHOWN_PER_LABEL each
    """

    def __init__(self) -> None:
        self.events_per_hour: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.alerts_per_hour: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.score_histograms = {name: np.zeros(SCORE_BINS, np.int64) for name in ('intent', 'churn', 'power')}
        self.tiers: Counter[int | None] = Counter()
        self.dead: Counter[str] = Counter()
        self.alerts_shown: list[dict[str, Any]] = []
        self.clock_ms = 0       # newest event time so far
        self._at_risk: dict[str, dict[str, Any]] = {}

    def add_events(self, events: Sequence[Event]) -> None:
        """Count valid events by hour and type, and move the clock."""
        if not events:
            return
        ts_ms = np.array([event.ts_ms for event in events])
        types = np.array([event.type for event in events])
        self.clock_ms = max(self.clock_ms, int(ts_ms.max()))
        for key, count in zip(*np.unique(ts_ms // HOUR_MS * _HOUR_TYPE + types, return_counts=True), strict=True):
            hour, code = divmod(int(key), _HOUR_TYPE)
            self.events_per_hour[hour][TYPE_NAMES[code]] += int(count)

    def add_scores(self, scores: Scores) -> None:
        """Add usable scores to the histograms."""
        for name, histogram in self.score_histograms.items():
            values = getattr(scores, name)[scores.usable]
            # Compute bins in whole grid steps, so a score on an edge falls into the bin above. 1.0 is in the last bin.
            bins = np.minimum(np.rint(values * STEPS_PER_UNIT).astype(np.int64) * SCORE_BINS // STEPS_PER_UNIT,
                              SCORE_BINS - 1)
            histogram += np.bincount(bins, minlength=SCORE_BINS)

    def add_decisions(self, messages: Sequence[Message]) -> None:
        """Count decisions by hour and label, and keep track of the users at risk."""
        self.add_contents(message.content for message in messages if message.content is not None)

    def add_contents(self, contents: Iterable[dict[str, Any]]) -> None:
        """The same, of what the messages say."""
        for value in contents:
            label = ' '.join(filter(None, (value['type'], value.get('state'))))
            self.alerts_per_hour[value['as_of_ms'] // HOUR_MS][label] += 1
            if value['type'] == Kind.CHURN:
                if value['state'] == 'raised':
                    self._at_risk[value['user_id']] = value
                else:
                    self._at_risk.pop(value['user_id'], None)
            self._show(value)

    def add_final_tier(self, tier: int) -> None:
        """Count one user's last tier."""
        self.tiers[None if tier == NO_TIER else tier] += 1

    def users_at_risk(self) -> list[dict[str, Any]]:
        """Churn alerts that are still raised at the end and have not expired, the largest spend at risk first.

        The spend at risk is the churn probability times the expected spend. An expired alert is about a shopper who has
        long been lost.
        """
        standing = [value for value in self._at_risk.values() if value['expires_at_ms'] > self.clock_ms]
        return sorted(standing, key=lambda value: (-_spend_at_risk(value), value['user_id']))

    def _show(self, value: dict[str, Any]) -> None:
        """Keep the newest alerts of each label, so that a short table shows some of each."""
        label = (value['type'], value.get('state'))
        same = [at for at, shown in enumerate(self.alerts_shown) if (shown['type'], shown.get('state')) == label]
        if len(same) == ALERTS_SHOWN_PER_LABEL:
            del self.alerts_shown[same[0]]
        self.alerts_shown.append(value)


def _spend_at_risk(value: dict[str, Any]) -> float:
    return value['scores']['churn'] * value['scores']['expected_spend_90d']
