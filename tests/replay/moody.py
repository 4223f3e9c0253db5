"""Scorers whose scores depend on the user's window and not on the batch. They can be made in another process."""
from collections.abc import Sequence

import numpy as np

from stream.core.events import EventType
from stream.core.features import COUNTER_NAMES, Batch
from stream.core.scores import Outputs
from stream.errors import ModelError
from stream.scoring.constant import ConstantScorer


class MoodyScorer(ConstantScorer):
    """Carts in the window make a purchase likely, purchases raise the tier, and silence makes churn likely."""

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        outputs = await super().score(batches)
        for batch, output in zip(batches, outputs, strict=True):
            kinds = batch.categories[:, :, 0]
            carts = (kinds == EventType.ADD_TO_CART).sum(axis=1, keepdims=True)
            orders = (kinds == EventType.PURCHASE).sum(axis=1)
            output.purchase_intent = np.minimum(carts * 0.375, 1.0).astype(np.float32)
            tiers = np.zeros_like(output.tier_probabilities)
            tiers[np.arange(len(batch)), np.minimum(orders, tiers.shape[1] - 1)] = 1.0
            output.tier_probabilities = tiers
            silent_days = np.expm1(batch.counters[:, [COUNTER_NAMES.index('days_since_last_seen')]])
            output.churn = np.clip(silent_days / 7, 0, 1).astype(np.float32)
        return outputs


class MissingScorer(ConstantScorer):
    """A model that cannot answer."""

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        raise ModelError('The model is missing.', 'find it.')


class BrokenScorer(ConstantScorer):
    """A scorer with a defect."""

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        raise ZeroDivisionError('a defect')
