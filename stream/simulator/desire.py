"""Infer from the events of sessions what a simulated shopper wants, and how readily he or she buys.

A hypothesis is what the law hides of the moment: the wanted item, the desire, the category being looked at, whether the
last view was a return to the wanted item (such a view ends in the cart more often), and whether the lines now added to
the cart are the basket of a purchase. Each step splits hypotheses, each event weighs them, equal ones are joined, and
the heaviest HYPOTHESES_MAX stay. Each carries its weight by node of the own conversion [CONVERSION_NODES]: bought or
not, the end of a session weighs those.

    view    of the wanted item: a return (desire grows), or a fresh pick by chance; of another: a fresh pick, which
            takes the wanted one's place with chance 1 - desire
    add     from browsing, more often after a return; or from buying, where an empty cart gets the item seen last, and
            only buying adds what was not looked at just before
    end     nothing was bought: weighs every hypothesis by 1 - its chance to buy

The price level, and with it the tier, is filtered beside, on nodes: a fresh pick prefers items of the shopper's level.
"""
import enum
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stream.core.events import EventType, hash32
from stream.core.parse import Event
from stream.errors import InputError
from stream.simulator import shop as law
from stream.simulator.presence import stratified

HYPOTHESES_MAX = 48
CONVERSION_NODES = 9
LEVEL_NODES = 5         # of the price level, per tier
PRIOR_CATEGORIES = 4.0  # how many picks the first guess of a shopper's categories is worth
_NOTHING = -1
_DESIRE_DIGITS = 3      # hypotheses whose desires agree so far are one


class Stage(enum.IntEnum):
    """Where in a session the last event was."""

    BROWSES = 0     # the next step is sure: after arriving, and after a search
    VIEWED = 1      # what was looked at may still go into the cart
    ADDED = 2       # one more step, or the end
    OVER = 3        # bought, or took something out of the cart: nothing comes after it


class Shelf:
    """What all shoppers of a simulation share: the items, and the grid of traits in which shoppers differ.

    item_numbers        {hash of the item id: item}
    item_chances        [levels, items] chance of an item, given its category
    tier_of_level       [levels]
    level_chances       [levels] prior
    conversions         [CONVERSION_NODES], conversion_chances: their prior
    category_chances    [categories] of a shopper's steps, before anything is known
    more_lines          chance of one line more in a basket, over all shoppers
    """

    def __init__(self, options: law.SimulatorOptions) -> None:
        assortment = law.assortment_of(options)
        nodes, weights = np.polynomial.hermite_e.hermegauss(LEVEL_NODES)
        levels = np.add.outer(law.TIER_PRICE_LEVELS, law.PRICE_LEVEL_SPREAD * nodes).ravel()
        picks = [assortment.item_weights(level) for level in levels]
        self.item_numbers = {hash32(f'i{item:05d}'): item for item in range(len(assortment.prices))}
        self.item_chances = np.array([(pick / pick.sum(1, keepdims=True)).ravel() for pick in picks])
        self.tier_of_level = np.repeat(np.arange(len(law.TIER_SHARES)), LEVEL_NODES)
        self.level_chances = np.outer(law.TIER_SHARES, weights / weights.sum()).ravel()
        nodes, weights = np.polynomial.hermite_e.hermegauss(CONVERSION_NODES)
        self.conversions = law.CONVERSION_MEDIAN * np.exp(law.CONVERSION_SPREAD * nodes)
        self.conversion_chances = weights / weights.sum()
        extra_lines = np.array(law.TIER_EXTRA_LINES)
        self.more_lines = float(law.TIER_SHARES @ (extra_lines / (1 + extra_lines)))
        self.category_chances = assortment.category_popularity / assortment.category_popularity.sum()


class Hypothesis(NamedTuple):
    """One hidden state; `returned`: the last view was a return to the wanted item."""

    wanted: int = _NOTHING
    desire: float = 0.0
    category: int = _NOTHING
    returned: bool = False
    buying: bool = False


@dataclass
class Mind:
    """Drawn states at a moment, [draws] each.

    desire      at the last event
    wanted      whether there is a wanted item
    returned    see Hypothesis; `buying` too
    conversion  own chance to buy without desire
    stage       where the session is; Stage.OVER where none is going on
    cart        lines in the cart
    last        day of the last event within a session
    """

    desire: np.ndarray
    wanted: np.ndarray
    returned: np.ndarray
    buying: np.ndarray
    conversion: np.ndarray
    stage: np.ndarray
    cart: np.ndarray
    last: np.ndarray


def buying_chance(conversion: np.ndarray, desire: np.ndarray | float, day: np.ndarray | float) -> np.ndarray:
    """Chance that a session at a day since the start ends in a purchase; as `_Life._buying_chance` of the simulator."""
    drift = 1 + law.CONVERSION_DRIFT * np.cos(2 * np.pi * day / law.YEAR_DAYS)
    base = np.minimum(conversion * drift, 0.5)
    return 1 / (1 + (1 - base) / base * np.exp(-law.DESIRE_LOG_ODDS * desire))


class Desire:
    """Filters what one user does within sessions. Call `arrive`, then `see` for each event; `draw` at any time.

    began, last     days of the first and the last event of the session that began last
    cart            {item: None} in the order in which the lines were added
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.began = self.last = 0.0
        self.cart: dict[int, None] = {}
        self._stage = Stage.OVER
        self._seen = _NOTHING
        self._weights: dict[Hypothesis, np.ndarray] = {Hypothesis(): shelf.conversion_chances}
        self._levels = shelf.level_chances
        self._category_counts: dict[int, float] = {}

    def arrive(self, day: float) -> None:
        """A session begins. The one before it, if any, is over."""
        away = day - self.last
        weights = self._ended()
        if away > law.CART_KEPT_DAYS:
            self.cart.clear()
        fades = 0.5 ** (away / law.DESIRE_HALF_LIFE_DAYS)
        self._keep([(Hypothesis(hypothesis.wanted, hypothesis.desire * fades), weight)
                    for hypothesis, weight in weights.items()])
        self.began, self._stage, self._seen = day, Stage.BROWSES, _NOTHING

    def see(self, event: Event, day: float) -> None:
        """The next event of the session.

        Errors   InputError where the law cannot have made it.
        """
        self.last = day
        item = self.shelf.item_numbers.get(event.item, _NOTHING)
        if item == _NOTHING and event.item:
            raise _impossible(day)
        if event.type == EventType.VIEW:
            self._view(item)
        elif event.type == EventType.SEARCH:
            self._keep([(Hypothesis(hypothesis.wanted, hypothesis.desire), weight * self._leaves(hypothesis))
                        for hypothesis, weight in self._weights.items() if not hypothesis.buying])
            self._stage = Stage.BROWSES
        elif event.type == EventType.ADD_TO_CART:
            self._add(item)
        elif event.type == EventType.REMOVE_FROM_CART:
            self._keep([(Hypothesis(hypothesis.wanted, max(0.0, hypothesis.desire - law.DESIRE_PER_CART)), weight)
                        for hypothesis, weight in self._ended().items()])
            self.cart.pop(item, None)
            self._stage = Stage.OVER
        elif event.type == EventType.PURCHASE and self._stage != Stage.OVER:
            self._keep([(Hypothesis(), weight if hypothesis.buying else weight * self._buys(hypothesis))
                        for hypothesis, weight in self._weights.items()])
            self.cart.clear()
            self._stage = Stage.OVER

    @property
    def over(self) -> bool:
        """Whether the last event is certain to be the last one of its session."""
        return self._stage == Stage.OVER

    def tiers(self) -> np.ndarray:
        """Probabilities of the tiers."""
        return np.bincount(self.shelf.tier_of_level, self._levels, len(law.TIER_SHARES))

    def draw(self, silent: bool, draws: int, rng: np.random.Generator) -> Mind:
        """Hidden states given all up to now; `silent`: the session is known to be over."""
        weights = self._ended() if silent else self._weights
        picked, node = np.divmod(stratified(np.concatenate(list(weights.values())), draws, rng), CONVERSION_NODES)
        rng.shuffle(both := np.column_stack([picked, node]))        # the draws of presence are in an order of their own
        picked, node = both.T
        wanted, desire, _, returned, buying = (np.array(values)[picked] for values in zip(*weights, strict=True))
        stage = Stage.OVER if silent else self._stage
        return Mind(desire, wanted != _NOTHING, returned, buying, self.shelf.conversions[node],
                    np.full(draws, int(stage)), np.full(draws, len(self.cart)), np.full(draws, self.last))

    def _view(self, item: int) -> None:
        category = item // law.ITEMS_PER_CATEGORY
        of_levels = self.shelf.item_chances[:, item]
        picked = float(self._levels @ of_levels)
        found: list[tuple[Hypothesis, np.ndarray]] = []
        fresh, first_of_category = 0.0, 0.0
        for hypothesis, weight in self._weights.items():
            if hypothesis.buying:
                continue
            wanted, desire = hypothesis.wanted, hypothesis.desire
            weight = weight * self._leaves(hypothesis)
            again = 0.0 if wanted == _NOTHING else law.WANT_AGAIN + law.WANT_AGAIN_PER_DESIRE * desire
            if item == wanted:
                more = min(law.DESIRE_MAX, desire + law.DESIRE_PER_REPEATED_VIEW)
                found.append((Hypothesis(item, more, hypothesis.category, True), weight * again))
            weight = weight * ((1 - again) * self._category_chance(hypothesis, category) * picked)
            takes = 1.0 if wanted in (_NOTHING, item) else max(0.0, 1 - desire)
            if takes:
                found.append((Hypothesis(item, desire, category), weight * takes))
            if takes < 1:
                found.append((Hypothesis(wanted, desire, category), weight * (1 - takes)))
            fresh += float(weight.sum())
            first_of_category += float(weight.sum()) if hypothesis.category == _NOTHING else 0.0
        self._keep(found)
        all_ways = sum(float(weight.sum()) for _, weight in found)
        # The same weights summed in two orders: rounding must not make the share of fresh picks more than all.
        share = min(fresh / all_ways, 1.0)
        counts = self._category_counts
        counts[category] = counts.get(category, 0.0) + first_of_category / all_ways
        self._levels = self._levels * (share * of_levels / picked + (1 - share))
        self._levels = self._levels / self._levels.sum()
        self._stage, self._seen = Stage.VIEWED, item

    def _add(self, item: int) -> None:
        category = item // law.ITEMS_PER_CATEGORY
        picked = self.shelf.more_lines * float(self._levels @ self.shelf.item_chances[:, item])
        found = []
        for hypothesis, weight in self._weights.items():
            as_more = picked * self._category_chance(hypothesis, category)
            if hypothesis.buying:
                found.append((hypothesis, weight * as_more))
                continue
            if self._stage == Stage.VIEWED and item == self._seen:
                more = min(law.DESIRE_MAX, hypothesis.desire + law.DESIRE_PER_CART)
                found.append((hypothesis._replace(wanted=item, desire=more), weight * _add_chance(hypothesis)))
            is_first = not self.cart and item == self._seen
            found.append((hypothesis._replace(buying=True),
                          weight * self._buys(hypothesis) * (1.0 if is_first else as_more)))
        self._keep(found)
        self.cart[item] = None
        self._stage = Stage.ADDED

    def _category_chance(self, hypothesis: Hypothesis, category: int) -> float:
        """Chance that a fresh pick is from the category. Never 0: the right hypothesis may have been too light."""
        if hypothesis.category != _NOTHING:
            return 1.0 if hypothesis.category == category else 1e-9
        counts = self._category_counts
        return float((counts.get(category, 0.0) + PRIOR_CATEGORIES * self.shelf.category_chances[category])
                     / (sum(counts.values()) + PRIOR_CATEGORIES))

    def _leaves(self, hypothesis: Hypothesis) -> float:
        """Chance that what was seen last stays out of the cart, and, after a whole step, that another one follows."""
        if self._stage == Stage.BROWSES:
            return 1.0
        return law.MORE_STEPS * (1 - _add_chance(hypothesis) if self._stage == Stage.VIEWED else 1.0)

    def _buys(self, hypothesis: Hypothesis) -> np.ndarray:
        """Chance [conversions] that the session goes from here straight to a purchase."""
        out_of_cart = 1 - _add_chance(hypothesis) if self._stage == Stage.VIEWED else 1.0
        return (1 - law.MORE_STEPS) * out_of_cart * buying_chance(
            self.shelf.conversions, hypothesis.desire, self.last)

    def _ended(self) -> dict[Hypothesis, np.ndarray]:
        """The hypotheses, given that the session ended without a purchase, unless it is over anyway."""
        if self._stage == Stage.OVER:
            return self._weights
        ended = {}
        for hypothesis, weight in self._weights.items():
            if not hypothesis.buying:
                out_of_cart = 1 - _add_chance(hypothesis) if self._stage == Stage.VIEWED else 1.0
                ended[hypothesis] = weight * out_of_cart * (
                    1 - buying_chance(self.shelf.conversions, hypothesis.desire, self.last))
        # Who is gone in the middle of a purchase has no hypothesis left; nothing depends on it any more.
        return ended or self._weights

    def _keep(self, found: list[tuple[Hypothesis, np.ndarray]]) -> None:
        joined: dict[Hypothesis, np.ndarray] = defaultdict(lambda: np.zeros(CONVERSION_NODES))
        for hypothesis, weight in found:
            joined[hypothesis._replace(desire=round(hypothesis.desire, _DESIRE_DIGITS))] += weight
        heaviest = sorted(joined.items(), key=lambda pair: -pair[1].sum())[:HYPOTHESES_MAX]
        total = sum(weight.sum() for _, weight in heaviest)
        if not total:
            raise _impossible(self.last)
        self._weights = {hypothesis: weight / total for hypothesis, weight in heaviest}


def _add_chance(hypothesis: Hypothesis) -> float:
    """Chance that what was viewed last goes into the cart while browsing."""
    return law.ADD_WANTED_TO_CART if hypothesis.returned else law.ADD_TO_CART


def _impossible(day: float) -> InputError:
    return InputError(f'The events around day {day:.2f} cannot come from this simulation.',
                      do='give the options with which they were simulated.')
