"""Computes published scores again from the records that they were made from.

The one part of the audit that uses the product's own code: features and a scorer. It finds what the reference cannot
see: rows that changed places, another model, scores of another moment.
"""
from collections.abc import Iterable, Sequence

from stream.core.driver import Touched
from stream.core.features import batches, features
from stream.core.messages import Origin
from stream.core.scorer import Scorer
from stream.core.scores import collect
from stream.core.step_scorer import snapshot
from stream.core.user import decode

GRID_STEPS = 3      # floating point differs in the last bits with the batch, so a score may fall on the next step
SPEND_SHARE = 1e-3
ROWS_AT_ONCE = 1_000


async def wrong_scores(announced: Sequence[tuple[bytes, dict]], scorer: Scorer) -> Iterable[str]:
    """Reports wrong scores of messages.

    announced   records as they were when a message was written, and the message
    """
    problems = []
    for at in range(0, len(announced), ROWS_AT_ONCE):
        part = announced[at:at + ROWS_AT_ONCE]
        inputs = features(snapshot([Touched(decode(message['user_id'], record), Origin(message['as_of_ms'], 0), [])
                                    for record, message in part]))
        cut = list(batches(inputs, scorer.rows_max))
        scores = collect(cut, await scorer.score(cut), len(part))
        for row, (_, message) in enumerate(part):
            published, where = message['scores'], f'{message["user_id"]} {message["type"]} {message["id"]}'
            if message['model']['sha256'] != scorer.model.sha256:
                problems.append(f'{where}: scored by {message["model"]}, not by {scorer.model}')
                continue
            again = {'purchase_intent': scores.intent[row], 'purchase_power': scores.power[row],
                     'churn': scores.churn[row]}
            far = [name for name, score in again.items() if abs(score - published[name]) > GRID_STEPS / 10_000]
            if abs(scores.spend[row] - published['expected_spend_90d']) > 0.01 + SPEND_SHARE * scores.spend[row]:
                far.append('expected_spend_90d')
            if any(abs(one - other) > GRID_STEPS / 10_000
                   for one, other in zip(scores.tiers[row], message['tier_probabilities'], strict=True)):
                far.append('tier_probabilities')
            if far:
                problems.append(f'{where}: {", ".join(far)} do not follow from the state: {published}, again {again}')
    return problems
