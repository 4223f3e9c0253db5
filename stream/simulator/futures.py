"""Continue the lives of drawn shoppers by the simulator's rules, without purchases. Each session adds a factor: the
probability that nothing was bought.

In the law a purchase is one draw at the end of a session, independent of all others. So the chance that a drawn shopper
buys nothing is the mean, over lives in which that draw always says no, of the product of (1 - chance to buy) over the
sessions: a much calmer number than counting lives with a purchase.
"""
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from stream.core.layout import DAY_MS
from stream.simulator import shop as law
from stream.simulator.desire import Mind, Stage, buying_chance
from stream.simulator.presence import RETURNS_MAX, Calendar, Who, fading, interest

_GAP = law.SESSION_GAP_MS / DAY_MS
_TICK = law.STEP_MEAN_MS / DAY_MS
_STEP = _TICK * (1 + law.CLICK + law.FAVORITE + law.SHARE + law.FOLLOW + law.ADD_TO_CART + law.SEARCH)


@dataclass
class Futures:
    """Drawn shoppers at their moments: `now` [draws] in days since the start; nobody is dead yet."""

    now: np.ndarray
    who: Who
    mind: Mind

    def __len__(self) -> int:
        return len(self.now)


def join(parts: Sequence[Futures]) -> Futures:
    """The draws of several moments, one after the other."""
    who = Who(*(np.concatenate([getattr(part.who, field.name) for part in parts]) for field in fields(Who)))
    mind = Mind(*(np.concatenate([getattr(part.mind, field.name) for part in parts]) for field in fields(Mind)))
    return Futures(np.concatenate([part.now for part in parts]), who, mind)


def survival(
    futures: Futures, horizons_days: Sequence[float], calendar: Calendar, rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(weight x chance to buy nothing within each horizon [draws, horizons], weight [draws]). Uses `futures` up.

    The weight is the chance of the silence between the last event and now; it differs between the draws only where a
    session may be going on.
    """
    who, mind, now = futures.who, futures.mind, futures.now
    unsold = np.ones((len(futures), len(horizons_days)))
    weights = _finish(futures, unsold, horizons_days, rng)
    until = np.minimum(who.death, now + max(horizons_days))
    clock = np.maximum(now, mind.last + _GAP)
    active = np.arange(len(futures))
    while len(active):
        who.returns[active] = np.where(who.returns[active] < clock[active, None], np.inf, who.returns[active])
        visit = _next_visit(who, active, clock[active], until[active], calendar, rng)
        returning = who.returns[active].argmin(1)
        back = who.returns[active, returning]
        who.returns[active[back < visit], returning[back < visit]] = np.inf
        visit = np.minimum(visit, back)
        active, visit = active[visit < until[active]], visit[visit < until[active]]
        away = visit - mind.last[active]
        mind.desire[active] *= 0.5 ** (away / law.DESIRE_HALF_LIFE_DAYS)
        mind.cart[active[away > law.CART_KEPT_DAYS]] = 0
        steps = _browse(mind, active, rng)
        mind.last[active] = visit + steps * _STEP
        _leave(futures, active, unsold, horizons_days, rng)
        clock[active] = mind.last[active] + _GAP
    return unsold * weights[:, None], weights


def _finish(
    futures: Futures, unsold: np.ndarray, horizons_days: Sequence[float], rng: np.random.Generator,
) -> np.ndarray:
    """Bring the sessions that may be going on to their end; returns the weights [draws]."""
    mind = futures.mind
    weights = np.ones(len(futures))
    going_on = np.flatnonzero(mind.stage != Stage.OVER)
    if not len(going_on):
        return weights
    silence = np.maximum(futures.now - mind.last - law.SECOND_MS / DAY_MS, 0)[going_on]
    no_event = np.exp(-silence / _TICK)
    buying, stage = mind.buying[going_on], mind.stage[going_on]
    adds = (stage == Stage.VIEWED) & (rng.random(len(going_on)) < np.where(
        mind.returned[going_on], law.ADD_WANTED_TO_CART, law.ADD_TO_CART))
    mind.cart[going_on] += adds
    mind.desire[going_on] = np.minimum(mind.desire[going_on] + law.DESIRE_PER_CART * adds, law.DESIRE_MAX)
    goes_on = ~buying & ((stage == Stage.BROWSES) | (rng.random(len(going_on)) < law.MORE_STEPS))
    steps = _browse(mind, going_on[goes_on], rng)
    mind.last[going_on] = futures.now[going_on]
    mind.last[going_on[goes_on]] += steps * _STEP
    chance = _leave(futures, going_on, unsold, horizons_days, rng)
    unsold[going_on[buying]] = 0
    # Whoever did not come to another event only breaks the silence by buying.
    silent = ~(adds | goes_on | buying)
    weights[going_on] = np.where(silent, 1 - chance + chance * no_event, no_event)
    unsold[going_on] /= np.where(silent, weights[going_on], 1)[:, None]
    return weights


def _next_visit(
    who: Who, active: np.ndarray, clock: np.ndarray, until: np.ndarray, calendar: Calendar, rng: np.random.Generator,
) -> np.ndarray:
    """Days of the next visits of the Poisson process after `clock`, by thinning; whatever is after `until` may be any
    later day."""
    ceiling = np.exp(abs(law.INTEREST_SWING))
    visit = clock.copy()
    waiting = np.arange(len(active))
    while len(waiting):
        rows = active[waiting]
        pause = rng.exponential(size=len(waiting)) / (who.rate[rows] * ceiling)
        day = calendar.when(calendar.summed(visit[waiting]) + pause)
        visit[waiting] = day
        chance = (interest(who.period_days[rows], who.phase[rows], day) / ceiling
                  * fading(who.death[rows] - day, who.fade_days[rows]))
        waiting = waiting[(rng.random(len(waiting)) >= chance) & (day < until[waiting])]
    return visit


def _browse(mind: Mind, going: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One step or more for the rows `going`; returns how many [going]."""
    steps = np.zeros(len(going))
    places = np.arange(len(going))
    while len(places):
        rows = going[places]
        desire = mind.desire[rows]
        again = mind.wanted[rows] & (
            rng.random(len(rows)) < law.WANT_AGAIN + law.WANT_AGAIN_PER_DESIRE * desire)
        adds = rng.random(len(rows)) < np.where(again, law.ADD_WANTED_TO_CART, law.ADD_TO_CART)
        desire = desire + law.DESIRE_PER_REPEATED_VIEW * again + law.DESIRE_PER_CART * adds
        mind.desire[rows] = np.minimum(desire, law.DESIRE_MAX)
        mind.cart[rows] += adds
        mind.wanted[rows] = True
        steps[places] += 1
        places = places[rng.random(len(places)) < law.MORE_STEPS]
    return steps


def _leave(
    futures: Futures, rows: np.ndarray, unsold: np.ndarray, horizons_days: Sequence[float], rng: np.random.Generator,
) -> np.ndarray:
    """The end of sessions at `mind.last`: nothing is bought, perhaps a line is taken out of the cart, perhaps there
    will be a visit for its sake; returns the chance [rows] that there was to buy."""
    who, mind = futures.who, futures.mind
    ended, cart = mind.last[rows], mind.cart[rows]
    chance = np.where(ended < who.death[rows], buying_chance(mind.conversion[rows], mind.desire[rows], ended), 0.0)
    within = (ended - futures.now[rows])[:, None] <= np.array(horizons_days)
    unsold[rows] *= 1 - chance[:, None] * within
    removes = rng.random(len(rows)) < law.REMOVE_FROM_CART * cart
    mind.cart[rows] = cart - removes
    mind.desire[rows] = np.maximum(mind.desire[rows] - law.DESIRE_PER_CART * removes, 0)
    comes_back = rows[(mind.cart[rows] > 0) & (rng.random(len(rows)) < law.COME_BACK_FOR_CART)]
    days = rng.geometric(1 - law.COME_BACK_LATER, len(comes_back))
    spread = (rng.random(len(comes_back)) - 0.5) * law.COME_BACK_SPREAD_MS / DAY_MS
    free = np.isinf(who.returns[comes_back])
    place = np.where(free.any(1), free.argmax(1), RETURNS_MAX - 1)
    who.returns[comes_back, place] = mind.last[comes_back] + days + spread
    return chance
