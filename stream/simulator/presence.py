"""Infer from the times of visits when a simulated shopper comes, and whether he or she is still there.

Visits are a Poisson process of intensity own rate x season x interest x fading until death, and visits for the sake of
a cart: after half of the sessions that leave one, at 1, 2, .. days later, give or take hours. A cell is one own rate,
one period and phase of interest, and whether the shopper was there before the start or joined with the first visit.
Without fading and death, a cell's likelihood is a running sum:

    log of the intensity at each visit - intensity x time at risk      (nobody arrives within a session or 30 min after)

Fading and death touch at most the last FADE_DAYS[1] days before the last event, and the silence since. So at a moment a
few hundred cells are taken, in proportion to their weights, and each is joined with every (length of fading, day of
death) that the events allow: the correction of its likelihood is a product of matrices.
"""
from dataclasses import dataclass
from typing import Any

import numpy as np

from stream.core.layout import DAY_MS, HOUR_MS
from stream.simulator import shop as law

FADE_NODES = 5
DEAD_NODES = 24         # days of death between the last event and now
DYING_NODES = 12        # days of death from now to the end of a fading that has begun
LATEST_RETURN_DAYS = 16
RETURNS_MAX = 8         # carts that a drawn shopper comes back for at a time
AHEAD_DAYS = 100
_HOUR = 1 / 24
_GAP = law.SESSION_GAP_MS / DAY_MS
_RETURN_HALF_WIDTH = law.COME_BACK_SPREAD_MS / DAY_MS / 2


class Calendar:
    """What all shoppers of a simulation share. Days count from the start of the simulation.

    period_days, phase  [interests], a lattice over their uniform prior; the phase counts from the start
    rates               [rates] nodes of the own rate, visits a day: both ends of its range, and between them the
                        geometric middle of equal ratios
    fades, fade_chances lengths of fading in days, 0 for none, and their prior
    """

    def __init__(self, options: law.SimulatorOptions, interests: int, rates: int) -> None:
        self.options = options
        hours = (options.days + AHEAD_DAYS) * 24
        self._hour_days = np.arange(hours + 1) * _HOUR
        self._season = law.season(options.start_ms + np.arange(hours) * HOUR_MS + HOUR_MS // 2)
        self._summed = np.concatenate([[0], self._season.cumsum() * _HOUR])

        # The golden ratio's lattice fills the plane evenly at any size.
        index = np.arange(interests)
        low, high = law.INTEREST_PERIOD_DAYS
        self.period_days = low + (high - low) * ((index + 0.5) / interests)
        self.phase = 2 * np.pi * (index * (np.sqrt(5) - 1) / 2 % 1)
        self.interest_of_day = np.array([interest(self.period_days, self.phase, day + 0.5)
                                         for day in range(options.days + 1)])          # [days, interests]

        edges = np.geomspace(*law.VISIT_RATE_RANGE, rates - 1)
        self.rates = np.concatenate([edges[:1], np.sqrt(edges[1:] * edges[:-1]), edges[-1:]])
        x = np.linspace(0, 20 * law.VISIT_RATE_MEAN, 200_001)[1:]
        density = x ** (law.VISIT_RATE_SHAPE - 1) * np.exp(-x * law.VISIT_RATE_SHAPE / law.VISIT_RATE_MEAN)
        below = np.array([np.interp(edges / factor, x, density.cumsum() / density.sum())
                          for factor in law.TIER_VISIT_FACTORS])
        self._rates_of_tier = as_chance(np.diff(below, axis=1, prepend=0, append=1))    # [tiers, rates]

        low, high = law.FADE_DAYS
        self.fades = np.concatenate([[0], low + (high - low) * (np.arange(FADE_NODES) + 0.5) / FADE_NODES])
        self.fade_chances = np.array([1 - law.SHARE_FADING] + [law.SHARE_FADING / FADE_NODES] * FADE_NODES)

    def day(self, ts_ms: int) -> float:
        return (ts_ms - self.options.start_ms) / DAY_MS

    def season(self, day: float) -> float:
        """The factor of season at a time."""
        return float(self._season[min(int(day * 24), len(self._season) - 1)])

    def summed(self, days: np.ndarray) -> np.ndarray:
        """The integral of the season from the start."""
        return np.interp(days, self._hour_days, self._summed)

    def when(self, summed: np.ndarray) -> np.ndarray:
        """The day at which the integral reaches a value; the end of the calendar where it does not."""
        return np.interp(summed, self._summed, self._hour_days)

    def rate_chances(self, tiers: np.ndarray) -> np.ndarray:
        """Prior of the own rate [rates], given the chances of the tiers."""
        return tiers @ self._rates_of_tier


def as_chance(values: np.ndarray | float) -> np.ndarray:
    """The values within [0, 1], where the law puts them.

    A difference of two chances, or a quotient of two sums, can miss that range by its last bit. Which ones do depends
    on the processor, since numpy rounds exp and pow differently with each instruction set. One value of -1e-16 is
    enough: its logarithm is NaN.
    """
    return np.clip(values, 0.0, 1.0)


def interest(period_days: np.ndarray, phase: np.ndarray, day: float | np.ndarray) -> np.ndarray:
    """The factor of personal interest."""
    return np.exp(law.INTEREST_SWING * np.sin(2 * np.pi * day / period_days + phase))


def still_there(age_days: np.ndarray) -> np.ndarray:
    """Chance to be alive at an age. An exponential life with a gamma hazard is a Lomax life."""
    return (1 + age_days / _life_scale_days()) ** -law.HAZARD_SHAPE


def _life_scale_days() -> float:
    return law.HAZARD_SHAPE * law.LIFE_MEDIAN_DAYS / np.log(2)


def _returned(days: Any) -> Any:
    """Share of those who come back for a cart who have done so so many days after the session."""
    knots, shares = _return_knots()
    return np.interp(days, knots, shares)


def _return_density(days: float) -> float:
    whole = round(days)
    if whole < 1 or abs(days - whole) > _RETURN_HALF_WIDTH:
        return 0.0
    return (1 - law.COME_BACK_LATER) * law.COME_BACK_LATER ** (whole - 1) / (2 * _RETURN_HALF_WIDTH)


def _return_knots() -> tuple[np.ndarray, np.ndarray]:
    whole = np.arange(1, LATEST_RETURN_DAYS + 1)
    knots = np.column_stack([whole - _RETURN_HALF_WIDTH, whole + _RETURN_HALF_WIDTH]).ravel()
    shares = np.concatenate([[0], np.repeat(1 - law.COME_BACK_LATER ** whole, 2)[:-1]])
    return knots, shares


@dataclass(frozen=True)
class Visit:
    """A session: days of its first and last event, and whether it left something in the cart."""

    began: float
    ended: float
    cart: bool


class _Return:
    """A visit that may still come for a cart left at `day`.

    unseen  chance that it has not been seen to happen, [interests, rates], or 1.0 while no visit could have been it
    left    of those unseen, the share that the visible past did not rule out (those who never come stay in it)
    """

    def __init__(self, day: float) -> None:
        self.day = day
        self.unseen: np.ndarray | float = 1.0
        self.left = 1.0

    def share_between(self, a: float, b: np.ndarray | float) -> np.ndarray:
        """Of the unseen ones at a, the share that comes by b."""
        share = law.COME_BACK_FOR_CART * as_chance(_returned(b - self.day) - _returned(a - self.day))
        return share / self.left

    def hazard(self, day: float) -> float:
        return law.COME_BACK_FOR_CART * _return_density(day - self.day) / self.left

    def ahead(self, day: float) -> float:
        """Of the unseen ones, the share that will come after `day`."""
        return law.COME_BACK_FOR_CART * float(1 - _returned(day - self.day)) / self.left


@dataclass
class Who:
    """Drawn shoppers who are there at a moment, [draws] each; days count from the start of the simulation.

    returns  [draws, RETURNS_MAX] days of visits that will come for a cart; infinite where there is none
    """

    rate: np.ndarray
    period_days: np.ndarray
    phase: np.ndarray
    death: np.ndarray
    fade_days: np.ndarray
    returns: np.ndarray


class Presence:
    """Filters one user's visits. Call `arrive` and `leave` in turn, and `draw` at any time."""

    def __init__(self, calendar: Calendar) -> None:
        self.calendar = calendar
        self._began: list[float] = []
        self._visits: list[Visit] = []
        self._returns: list[_Return] = []
        cells = (len(calendar.period_days), len(calendar.rates))
        self._log = np.zeros(cells)                             # of the visits that need the whole cell
        self._log_interest = np.zeros(cells[0])                 # of the others
        self._poisson_visits = 0
        self._coming: list[np.ndarray | float] = []             # intensity of coming for a cart at each visit

    def arrive(self, day: float) -> None:
        """A session begins."""
        self._began.append(day)
        if len(self._began) == 1:       # the first one belongs to the way of joining: see draw()
            self._coming.append(0.0)
            return
        free = self._visits[-1].ended + _GAP
        self._returns = [item for item in self._returns if day - item.day < LATEST_RETURN_DAYS]
        for item in self._returns:
            share = float(item.share_between(free, day))
            if isinstance(item.unseen, np.ndarray):
                kept = 1 - item.unseen * share
                self._log += np.log(kept)
                item.unseen = item.unseen * (1 - share) / kept
            item.left *= 1 - share
        about_now = interest(self.calendar.period_days, self.calendar.phase, day)
        able = [item for item in self._returns if item.hazard(day)]
        if not able:
            self._poisson_visits += 1
            self._log_interest += np.log(about_now)
            self._coming.append(0.0)
            return
        hazards = [item.unseen * item.hazard(day) for item in able]
        coming = sum(hazards)
        total = self.calendar.rates * (self.calendar.season(day) * about_now)[:, None] + coming
        self._log += np.log(total)
        self._coming.append(np.broadcast_to(coming, total.shape))
        for item, hazard in zip(able, hazards, strict=True):
            item.unseen = item.unseen * (total - hazard) / total

    def leave(self, visit: Visit) -> None:
        """The session that began last is over."""
        self._visits.append(visit)
        if visit.cart:
            self._returns.append(_Return(visit.ended))

    def draw(
        self, now: float, seen: float, visit: Visit, rate_chances: np.ndarray, cells: int, draws: int,
        rng: np.random.Generator,
    ) -> tuple[Who, float]:
        """Shoppers who are still there, drawn given all up to the day `now`, and the chance to be there.

        seen   day of the last event of any kind: the shopper was there
        visit  the session that began last, as far as it is known; `cart` only if it is over
        """
        calendar = self.calendar
        visits = [*self._visits, visit]
        logs = self._cell_logs(now, seen, visits, rate_chances)
        chances = [np.exp(log - log.max()) for log in logs]
        # The rate before the interest: neighbours are alike, so that the parts of the draw differ.
        proposal = (np.sum([chance / chance.sum() for chance in chances], 0) / len(logs)).transpose(0, 2, 1)
        picked = np.unravel_index(stratified(proposal.ravel(), cells, rng), proposal.shape)
        way, rate_at, point = picked
        rate, period, phase = calendar.rates[rate_at], calendar.period_days[point], calendar.phase[point]
        born = np.array([0.0, visits[0].began])[way]

        # Returns for a cart until now; the one of the last session cannot have been seen yet.
        returns = [*self._returns, *([_Return(visit.ended)] if visit.cart else [])]
        unseen = np.array([item.unseen[point, rate_at] if isinstance(item.unseen, np.ndarray)
                           else np.full(cells, item.unseen) for item in returns])     # [returns, cells]

        # Every length of fading with every day of death that the events allow.
        fade, dies, low, high = self._ends(now, seen)
        mass = as_chance(still_there(np.maximum(low - born[:, None], 0))
                         - still_there(np.maximum(high - born[:, None], 0)))
        later = still_there(now + calendar.fades - born[:, None]) * calendar.fade_chances       # [cells, fades]
        with np.errstate(divide='ignore'):      # what the law rules out weighs nothing
            log_ends = np.log(mass * calendar.fade_chances[fade])
            log_later = np.log(later.sum(1))
        log_ends += self._correction(now, seen, visits, calendar.fades[fade], dies, way, point, rate_at)
        log_ends += self._no_return(returns, unseen, visit, np.minimum(dies, now))
        log_later += self._no_return(returns, unseen, visit, np.array([now]))[:, 0]

        log_joint = np.column_stack([log_ends, log_later])
        log_joint += (logs[0][way, point, rate_at] - np.log(proposal[picked]))[:, None]
        joint = np.exp(log_joint - log_joint.max())
        there = np.append(dies > now, True)
        alive = float(as_chance(joint[:, there].sum() / joint.sum()))
        cell, end = np.divmod(stratified((joint * there).ravel(), draws, rng), joint.shape[1])
        return self._who(now, cell, end, rate, period, phase, born, later, (fade, low, high), returns, unseen, visit,
                         rng), alive

    def _cell_logs(
        self, now: float, seen: float, visits: list[Visit], rate_chances: np.ndarray,
    ) -> list[np.ndarray]:
        """Log weights [ways of joining, interests, rates] of the cells without fading and lives, at risk until `now`,
        and until the last event only: the truth of most cells lies between the two."""
        calendar, rates = self.calendar, self.calendar.rates
        first = visits[0].began
        at_first = np.log(calendar.season(first) * interest(calendar.period_days, calendar.phase, first))
        with np.errstate(divide='ignore'):      # what the law rules out weighs nothing
            log = np.log(rate_chances) + self._poisson_visits * np.log(rates) + self._log_interest[:, None] + self._log
            log_before = np.log(law.SHARE_BEFORE_START) + np.log(rates) + at_first[:, None]
            log_joined = np.log((1 - law.SHARE_BEFORE_START) / calendar.options.days)
        before = self._at_risk(0, first, [])
        logs = []
        for until in (now, seen):
            since = self._at_risk(first, until, visits)
            logs.append(np.array([log + log_before - (before + since)[:, None] * rates,
                                  log + log_joined - since[:, None] * rates]))
        return logs

    def _at_risk(self, start: float, end: float, visits: list[Visit]) -> np.ndarray:
        """Integral [interests] of season x interest where an arrival would have been seen."""
        days = np.arange(int(start), int(end) + 1)
        edges = np.append(np.maximum(days, start), end)
        return self._seasons(edges, visits) @ self.calendar.interest_of_day[days]

    def _seasons(self, edges: np.ndarray, visits: list[Visit]) -> np.ndarray:
        """Integral of the season between the edges, without sessions and the pause after each."""
        began = np.array([visit.began for visit in visits])
        over = np.array([visit.ended for visit in visits]) + _GAP
        summed = self.calendar.summed
        cut = np.clip(edges[:, None], began, over) if len(visits) else np.zeros((len(edges), 0))
        return np.diff(summed(edges)) - np.diff(summed(cut), axis=0).sum(1)

    def _ends(self, now: float, seen: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(length of fading as its index, day of death, and the bounds of its bin): dead already, or fading now."""
        edges = [np.linspace(seen, now, DEAD_NODES + 1)] if now > seen else []
        parts = [(index, both[:-1], both[1:])
                 for index, fade in enumerate(self.calendar.fades)
                 for both in [*edges, *([np.linspace(now, now + fade, DYING_NODES + 1)] if fade else [])]]
        low, high = (np.concatenate([part[side] for part in parts]) for side in (1, 2))
        fade = np.concatenate([np.full(len(part[1]), part[0]) for part in parts])
        return fade, (low + high) / 2, low, high

    def _correction(
        self, now: float, seen: float, visits: list[Visit], fades: np.ndarray, dies: np.ndarray, way: np.ndarray,
        point: np.ndarray, rate_at: np.ndarray,
    ) -> np.ndarray:
        """Log likelihood [cells, ends] with fading and death, less that without."""
        calendar = self.calendar
        rate, period, phase = calendar.rates[rate_at], calendar.period_days[point], calendar.phase[point]
        start = max(0.0, seen - law.FADE_DAYS[1])
        edges = np.concatenate([_steps(start, seen), _steps(seen, now)[1:]])
        middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
        gone = np.clip((edges[1:] - dies[:, None]) / np.maximum(width, 1e-9), 0, 1)     # [ends, bins]
        lived = np.minimum(middle, (np.minimum(edges[1:], dies[:, None]) + edges[:-1]) / 2)
        missing = gone + (1 - gone) * (1 - fading(dies[:, None] - lived, fades[:, None]))
        # Who joined with the first visit was not at risk before it.
        first = visits[0].began
        expected = self._seasons(edges, visits) * interest(period[:, None], phase[:, None], middle)   # [cells, bins]
        expected[way == 1] *= middle > first
        log = (rate[:, None] * expected) @ missing.T
        for place, (visit, coming) in enumerate(zip(visits, self._coming, strict=True)):
            if visit.began < start:
                continue
            factor = fading(dies - visit.began, fades)
            if not isinstance(coming, np.ndarray):
                ratio = np.log(factor)[None, :]
            else:
                own = (rate * calendar.season(visit.began) * interest(period, phase, visit.began))[:, None]
                carts = coming[point, rate_at][:, None]
                ratio = np.log((own * factor + carts) / (own + carts))
            log += ratio if place else ratio * (way == 0)[:, None]
        return log

    def _no_return(
        self, returns: list[_Return], unseen: np.ndarray, visit: Visit, until: np.ndarray,
    ) -> np.ndarray:
        """Log chance [cells, ends] that nobody came for a cart after the last session until the day of each end."""
        log = np.zeros((1, len(until)))
        for item, chance in zip(returns, unseen, strict=True):
            log = log + np.log1p(-chance[:, None] * item.share_between(visit.ended + _GAP, until))
        return log

    def _who(
        self, now: float, cell: np.ndarray, end: np.ndarray, rate: np.ndarray, period: np.ndarray, phase: np.ndarray,
        born: np.ndarray, later: np.ndarray, ends: tuple[np.ndarray, np.ndarray, np.ndarray],
        returns: list[_Return], unseen: np.ndarray, visit: Visit, rng: np.random.Generator,
    ) -> Who:
        fade_of_end, low, high = ends
        draws = len(cell)
        fading = end < len(fade_of_end)
        known = np.where(fading, end, 0)
        # Of those who do not fade yet: the length, then a life that lasts longer than it.
        # Of the running sum's own end, so that no draw lies beyond it.
        summed = later.cumsum(1)[cell]
        unborn = (rng.random(draws)[:, None] * summed[:, -1:] > summed).sum(1)
        fade = self.calendar.fades[np.where(fading, fade_of_end[known], unborn)]
        age = now + fade - born[cell]
        scale = _life_scale_days()
        beyond = born[cell] + (scale + age) * rng.random(draws) ** (-1 / law.HAZARD_SHAPE) - scale
        death = np.where(fading, low[known] + (high - low)[known] * rng.random(draws), beyond)
        coming = np.full((draws, RETURNS_MAX), np.inf)
        knots, shares = _return_knots()
        for place, (item, chance) in enumerate(zip(returns[-RETURNS_MAX:], unseen[-RETURNS_MAX:], strict=True)):
            chance = chance[cell]
            seen_none = 1 - chance * item.share_between(visit.ended + _GAP, now)
            comes = rng.random(draws) < chance * item.ahead(now) / seen_none
            done = _returned(now - item.day)
            coming[comes, place] = item.day + np.interp(done + (1 - done) * rng.random(int(comes.sum())), shares, knots)
        return Who(rate[cell], period[cell], phase[cell], death, fade, coming)


def fading(left_days: np.ndarray, fades: np.ndarray) -> np.ndarray:
    """The factor of fading so many days before death."""
    return np.where(fades > 0, np.clip(left_days / np.maximum(fades, 1e-9), law.FADED_RATE, 1), 1.0)


def _steps(start: float, end: float) -> np.ndarray:
    """From start to end in equal steps of a day or less."""
    return np.linspace(start, end, int(np.ceil(end - start)) + 1) if end > start else np.array([start])


def stratified(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices in rising order, each about in proportion to its weight: one from each of `count` equal parts.

    One step for all parts (systematic resampling) would fall in with the period of the flattened axes.
    """
    summed = weights.cumsum()
    at = (np.arange(count) + rng.random(count)) / count * summed[-1]
    # The last part's place may round up to the sum itself. Just below it lies the last index that weighs anything.
    at = np.minimum(at, np.nextafter(summed[-1], 0.0))
    return np.minimum(np.searchsorted(summed, at, side='right'), len(weights) - 1)
