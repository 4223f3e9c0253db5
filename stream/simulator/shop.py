"""A simulated shop with a seed: the events of shoppers who visit, want, buy and leave, and the truth about each.

Shoppers follow "buy till you die": each visits at an own, gamma-distributed Poisson rate until an own, exponential time
at which he or she is gone for good, seen by nobody. Source: Fader, Hardie, Lee (2005), "Counting Your Customers the
Easy Way: An Alternative to the Pareto/NBD Model", Marketing Science 24(2). Different from BG/NBD: death comes in time
(as in Pareto/NBD) and not after a purchase, visits have seasons, and desire, which earlier sessions build up, drives
buying.

The world (the constants below, in this order)

| part       | what                                  | value                                         | unit            |
|------------|---------------------------------------|-----------------------------------------------|-----------------|
| shop       | categories x items                    | 40 x 50, Zipf popularity                      | items           |
|            | price of an item                      | log-normal about its category's, spread 0.5   | currency units  |
| tier       | purchase power 0..4, shares           | 30, 27, 22, 14, 7                             | % of shoppers   |
|            | price level: normal about the tier's  | -1.2 .. 1.6, spread 0.25                      | sd of log price |
|            | lines added to a basket, mean         | 0.2 .. 1.4, log-normal spread 0.2             | lines           |
|            | visit rate factor                     | 0.85 .. 1.25                                  | 1               |
| presence   | there before the start                | 60; the others join at uniform times          | % of shoppers   |
|            | life from joining, or from the start  | exponential, own hazard gamma(4), median ~100 | days            |
|            | fading before the end of life         | 60 % of shoppers, over the last 15 .. 50      | days            |
| visits     | own rate                              | gamma(1.3), mean 0.22, kept in 0.05 .. 1      | visits a day    |
|            | times hour, weekday, year             | tables; peak at the end of November           | 1               |
|            | times personal interest               | exp(0.5 sin), own period of 25 .. 90 days     | 1               |
| a session  | browsing steps                        | geometric, mean 4.5                           | steps           |
|            | back to what was left in a cart       | after 50 % of such sessions, 1, 2, .. later   | days            |
| desire     | per view of the wanted item, per cart | +0.35, +1; half-life 2.5 days; 0 on purchase  | 1               |
|            | on buying                             | 1.1                                           | log-odds per 1  |
|            | buying without desire                 | log-normal, median 2.8, spread 0.5            | % of sessions   |
|            | drift of that, the whole shop         | +-20, cosine of one year from the start       | %               |
| follow-ups | rating, review, refund                | 8, 4, 4; 1 .. 20 days later                   | % of lines      |

Nothing of a shopper is recorded at or after `churned_ms`. Each shopper lives from an own child seed: shopper i does the
same things however many others there are; only the event ids, which count lines in time order, differ.
"""

import heapq
import math
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from stream.core.layout import DAY_MS, HOUR_MS
from stream.errors import UsageError

SECOND_MS = 1_000
YEAR_DAYS = 365.25

# The shop. Median prices in currency units.
CATEGORY_PRICES = {
    'coffee': 9, 'tea': 7, 'chocolate': 6, 'wine': 14, 'spices': 5, 'snacks': 4, 'books': 13, 'comics': 11, 'toys': 18,
    'games': 35, 'puzzles': 16, 'stationery': 8, 'candles': 12, 'soap': 6, 'perfume': 45, 'makeup': 17, 'skincare': 22,
    'shirts': 25, 'trousers': 40, 'dresses': 50, 'jackets': 85, 'shoes': 65, 'socks': 9, 'bags': 48, 'watches': 110,
    'jewellery': 75, 'lamps': 38, 'chairs': 90, 'rugs': 70, 'bedding': 55, 'cookware': 42, 'knives': 36, 'tools': 30,
    'garden': 24, 'bicycles': 260, 'camping': 60, 'headphones': 80, 'cameras': 280, 'phones': 320, 'pets': 15,
}  # fmt: skip
CATEGORIES = tuple(CATEGORY_PRICES)
ITEMS_PER_CATEGORY = 50
ITEM_PRICE_SPREAD = 0.5

# What a tier drives, from tier 0 to tier 4.
TIER_SHARES = (0.30, 0.27, 0.22, 0.14, 0.07)
TIER_PRICE_LEVELS = (-1.2, -0.5, 0.2, 0.9, 1.6)
TIER_EXTRA_LINES = (0.2, 0.4, 0.7, 1.0, 1.4)
TIER_VISIT_FACTORS = (0.85, 0.95, 1.0, 1.1, 1.25)
PRICE_LEVEL_SPREAD = 0.25
EXTRA_LINES_SPREAD = 0.2
CATEGORY_PRICE_PULL = 0.2  # how much of the price level also decides between cheap and dear categories
FAVOURITES = 6

# Presence.
SHARE_BEFORE_START = 0.6
BEFORE_START_MEAN_DAYS = 200
LIFE_MEDIAN_DAYS = 100
HAZARD_SHAPE = 4.0
SHARE_FADING = 0.6
FADE_DAYS = (15, 50)
FADED_RATE = 0.1  # of the usual visit rate, on the last day

# Visits.
VISIT_RATE_SHAPE = 1.3
VISIT_RATE_MEAN = 0.22
VISIT_RATE_RANGE = (0.05, 1.0)
_HOURS = np.array([3, 2, 1, 1, 1, 2, 4, 6, 8, 9, 10, 10, 11, 10, 9, 9, 10, 11, 13, 15, 16, 15, 11, 6], dtype=float)
HOUR_FACTORS = _HOURS / _HOURS.mean()
WEEKDAY_FACTORS = np.array([1.02, 0.96, 0.94, 0.96, 0.97, 1.03, 1.12])  # Monday first
QUIET_SEASON_FACTOR = 0.94
PEAK_SEASON_EXTRA = 0.7
PEAK_DAY_OF_YEAR = 333
PEAK_WIDTH_DAYS = 18
INTEREST_SWING = 0.5
INTEREST_PERIOD_DAYS = (25, 90)
# No visit rate exceeds the own rate times this: the bound that thinning needs.
RATE_CEILING = (
    HOUR_FACTORS.max() * WEEKDAY_FACTORS.max() * (QUIET_SEASON_FACTOR + PEAK_SEASON_EXTRA) * math.exp(INTEREST_SWING)
)

# A session.
SESSION_GAP_MS = HOUR_MS // 2
STEP_MEAN_MS = 35 * SECOND_MS
MORE_STEPS = 0.78
LOGIN = 0.35
NEW_FAVOURITE = 0.05
SEARCH = 0.22
CLICK = 0.3
FAVORITE = 0.04
SHARE = 0.015
FOLLOW = 0.01
ADD_TO_CART = 0.045
ADD_WANTED_TO_CART = 0.12
REMOVE_FROM_CART = 0.04
SECOND_PIECE = 0.15
CART_KEPT_DAYS = 14

# Desire and buying.
WANT_AGAIN = 0.2
WANT_AGAIN_PER_DESIRE = 0.12
DESIRE_PER_REPEATED_VIEW = 0.35
DESIRE_PER_CART = 1.0
DESIRE_MAX = 4.0
DESIRE_HALF_LIFE_DAYS = 2.5
DESIRE_LOG_ODDS = 1.1
CONVERSION_MEDIAN = 0.028
CONVERSION_SPREAD = 0.5
CONVERSION_DRIFT = 0.2
COME_BACK_FOR_CART = 0.5
COME_BACK_LATER = 0.45  # chance of one day more, again and again
COME_BACK_SPREAD_MS = 6 * HOUR_MS

# After a purchase, per line.
RATING = 0.08
REVIEW = 0.04
REFUND = 0.04
FOLLOW_UP_DAYS = (1, 20)
STARS_UP_TO = (0.06, 0.12, 0.23, 0.5, 1.0)  # cumulative, one to five stars
REVIEW_TEXTS = ('bad, I want my money back', 'not what I hoped for', 'it is all right', 'good, as described', 'love it')
QUERY_WORDS = ('', '', 'best ', 'cheap ', 'new ', 'gift ')

# Noise.
REPEAT_DELAY_MS = (SECOND_MS, DAY_MS)
LATE_DELAY_MS = (60 * SECOND_MS, 3 * DAY_MS)
_CLEAN, _REPEATED, _DELAYED, *_BROKEN = range(7)
_CUT, _NO_USER, _NAN_PRICE, _SECONDS = _BROKEN
_NOISE_SHARES = (1 / 3, 1 / 3, *[1 / 12] * 4)

# Children of the one seed.
_CATALOGUE_SEED, _NOISE_SEED, _SHOPPER_SEED = range(3)


@dataclass(frozen=True)
class SimulatorOptions:
    """What to simulate.

    Units    `days` of 86,400 s from `start_ms` (Unix ms); `noise` is the share of rows repeated, delayed or broken.
    Errors   UsageError for a number out of range.
    """

    shoppers: int = 1000
    days: int = 180
    seed: int = 7
    start_ms: int = 1_735_689_600_000  # 2025-01-01T00:00Z
    currency: str | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.shoppers < 1:
            raise UsageError(f'A simulation of {self.shoppers} shoppers is empty.', do='ask for 1 or more.')
        if self.days < 1:
            raise UsageError(f'A simulation of {self.days} days is empty.', do='ask for 1 or more.')
        if self.seed < 0:
            raise UsageError(f'The seed {self.seed} is negative.', do='use a seed of 0 or more.')
        if not 0 <= self.noise <= 0.5:
            raise UsageError(f'The noise {self.noise} is not a share of 0 to 0.5.', do='use, say, 0.02.')
        if self.currency is not None and len(self.currency) != 3:
            raise UsageError(f'The currency {self.currency!r} is no ISO 4217 code.', do='use three letters, as in EUR.')

    @property
    def end_ms(self) -> int:
        return self.start_ms + self.days * DAY_MS


@dataclass(frozen=True)
class Simulation:
    """The lines of a simulated shop and the truth about its shoppers.

    bodies   events in time order, rendered without the opening brace and the event id, which is the place in this list
    order    (events,) int64: which body each line shows
    faults   (events,) int8: what is wrong with each line, if anything
    truth    one dict per shopper: user_id, tier, joined_ms, churned_ms (may lie after the end), visits_per_day (own
             rate), conversion (mean chance that a session buys), price_level (sd of log price), purchases (orders) and
             spend (currency units, refunds not taken off) as they happened, whatever the noise did to the lines
    """

    bodies: list[bytes]
    order: np.ndarray
    faults: np.ndarray
    truth: list[dict]

    @property
    def events(self) -> int:
        """How many lines there are."""
        return len(self.order)

    def lines(self) -> Iterator[bytes]:
        """Event JSON without a newline, in event-time order except for the noise; each call starts anew."""
        for place, fault in zip(self.order.tolist(), self.faults.tolist(), strict=True):
            line = b'{"event_id":"e%09d",' % place + self.bodies[place]
            yield _broken(line, fault) if fault in _BROKEN else line


def simulate(options: SimulatorOptions) -> Simulation:
    """Simulate every shopper, and merge their events in order.

    Promise  the same options give the same bytes (with the same numpy release line: its Generator streams may change).
    """
    assortment = assortment_of(options)
    bodies: list[bytes] = []
    times_ms: list[int] = []
    truth = []
    for number in range(options.shoppers):
        rng = _generator(options, _SHOPPER_SEED, number)
        shopper = _born(number, options, assortment, rng)
        events, conversion = _live(shopper, options, assortment, rng)
        truth.append(_truth(shopper, events, conversion))
        times_ms += [event['ts'] for event in events]
        # The slice also copies: orjson's own bytes keep a buffer of 1 kB and more each.
        bodies += [orjson.dumps(event)[1:] for event in events]
    ts = np.array(times_ms, dtype=np.int64)
    by_time = np.argsort(ts, kind='stable')
    order, faults = _noise(ts[by_time], options.noise, _generator(options, _NOISE_SEED))
    return Simulation([bodies[place] for place in by_time.tolist()], order, faults, truth)


def write(simulation: Simulation, events_path: str | Path, truth_path: str | Path) -> None:
    """Write the event lines and the truth as two plain .jsonl files, replacing what was there."""
    with Path(events_path).open('wb') as events_file:
        events_file.writelines(line + b'\n' for line in simulation.lines())
    with Path(truth_path).open('wb') as truth_file:
        truth_file.writelines(orjson.dumps(row) + b'\n' for row in simulation.truth)


def _generator(options: SimulatorOptions, *spawn_key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=spawn_key))


# The shop


@dataclass(frozen=True)
class Assortment:
    """prices: item number -> price; popularity, price_z: (categories, items), z of the log price in its category."""

    prices: list[float]
    popularity: np.ndarray
    price_z: np.ndarray
    category_popularity: np.ndarray
    category_price_z: np.ndarray

    def item_weights(self, price_level: float) -> np.ndarray:
        """How readily each item of a category is picked, (categories, items); a category's need not add up to 1."""
        return self.popularity * np.exp(price_level * self.price_z)


def assortment_of(options: SimulatorOptions) -> Assortment:
    """The items of the shop. They depend on the seed only, not on the shoppers."""
    rng = _generator(options, _CATALOGUE_SEED)
    medians = np.array(list(CATEGORY_PRICES.values()), dtype=float)
    price_z = rng.standard_normal((len(CATEGORIES), ITEMS_PER_CATEGORY))
    prices = np.round(medians[:, None] * np.exp(ITEM_PRICE_SPREAD * price_z), 2)
    zipf = 1 / np.arange(1, ITEMS_PER_CATEGORY + 1)
    popularity = np.array([rng.permutation(zipf) for _ in CATEGORIES])
    log_medians = np.log(medians)
    category_price_z = (log_medians - log_medians.mean()) / log_medians.std()
    category_popularity = rng.permutation(1 / np.arange(1, len(CATEGORIES) + 1) ** 0.7)
    return Assortment(prices.ravel().tolist(), popularity, price_z, category_popularity, category_price_z)


# A shopper


@dataclass(frozen=True)
class Shopper:
    """The hidden traits of a shopper. The events do not show them. Units as in the module's table."""

    user_id: str
    tier: int
    joined_ms: int
    churned_ms: int
    fade_days: float
    visits_per_day: float
    interest_period_days: float
    interest_phase: float
    conversion: float
    price_level: float
    more_lines: float
    favourites: tuple[int, ...]


def _born(number: int, options: SimulatorOptions, assortment: Assortment, rng: np.random.Generator) -> Shopper:
    tier = int(rng.choice(len(TIER_SHARES), p=TIER_SHARES))
    if rng.random() < SHARE_BEFORE_START:
        joined_ms = options.start_ms - 1 - int(rng.exponential(BEFORE_START_MEAN_DAYS) * DAY_MS)
    else:
        joined_ms = options.start_ms + int(rng.random() * options.days * DAY_MS)
    # An exponential life has no memory: whoever is there at the start has the same life ahead as whoever joins.
    hazard_per_day = math.log(2) / LIFE_MEDIAN_DAYS * rng.gamma(HAZARD_SHAPE, 1 / HAZARD_SHAPE)
    churned_ms = max(joined_ms, options.start_ms) + int(rng.exponential(1 / hazard_per_day) * DAY_MS)
    own_rate = TIER_VISIT_FACTORS[tier] * rng.gamma(VISIT_RATE_SHAPE, VISIT_RATE_MEAN / VISIT_RATE_SHAPE)
    price_level = rng.normal(TIER_PRICE_LEVELS[tier], PRICE_LEVEL_SPREAD)
    extra_lines = TIER_EXTRA_LINES[tier] * math.exp(rng.normal(0, EXTRA_LINES_SPREAD))
    taste = assortment.category_popularity * np.exp(CATEGORY_PRICE_PULL * price_level * assortment.category_price_z)
    return Shopper(
        user_id=f'u{number:06d}',
        tier=tier,
        joined_ms=joined_ms,
        churned_ms=churned_ms,
        fade_days=rng.uniform(*FADE_DAYS) if rng.random() < SHARE_FADING else 0.0,
        visits_per_day=float(np.clip(own_rate, *VISIT_RATE_RANGE)),
        interest_period_days=rng.uniform(*INTEREST_PERIOD_DAYS),
        interest_phase=rng.uniform(0, 2 * math.pi),
        conversion=CONVERSION_MEDIAN * math.exp(rng.normal(0, CONVERSION_SPREAD)),
        price_level=price_level,
        more_lines=extra_lines / (1 + extra_lines),
        favourites=tuple(rng.choice(len(CATEGORIES), FAVOURITES, replace=False, p=taste / taste.sum()).tolist()),
    )


def _truth(shopper: Shopper, events: list[dict], conversion: float) -> dict:
    lines = [event for event in events if event['type'] == 'purchase']
    return {
        'user_id': shopper.user_id,
        'tier': shopper.tier,
        'joined_ms': shopper.joined_ms,
        'churned_ms': shopper.churned_ms,
        'visits_per_day': shopper.visits_per_day,
        'conversion': conversion,
        'price_level': shopper.price_level,
        'purchases': len({line['order_id'] for line in lines}),
        'spend': round(sum(line['price'] * line['quantity'] for line in lines), 2),
    }


# A shopper's visits


def season(ts: np.ndarray) -> np.ndarray:
    """The factor of hour, weekday and time of year, about 1 on average over a year; ts: Unix ms, UTC."""
    hour = ts // HOUR_MS % 24
    weekday = (ts // DAY_MS + 3) % 7  # 1970-01-01 was a Thursday
    # Days from the peak, the nearer way round the year.
    from_peak = (ts / DAY_MS - PEAK_DAY_OF_YEAR + YEAR_DAYS / 2) % YEAR_DAYS - YEAR_DAYS / 2
    year = QUIET_SEASON_FACTOR + PEAK_SEASON_EXTRA * np.exp(-((from_peak / PEAK_WIDTH_DAYS) ** 2))
    return HOUR_FACTORS[hour] * WEEKDAY_FACTORS[weekday] * year


def _interest(shopper: Shopper, ts: np.ndarray) -> np.ndarray:
    turns = ts / DAY_MS / shopper.interest_period_days
    return np.exp(INTEREST_SWING * np.sin(2 * math.pi * turns + shopper.interest_phase))


def _fading(shopper: Shopper, ts: np.ndarray) -> np.ndarray:
    if not shopper.fade_days:
        return np.ones(len(ts))
    left = (shopper.churned_ms - ts) / DAY_MS / shopper.fade_days
    return np.clip(left, FADED_RATE, 1)


def _visit_times(shopper: Shopper, options: SimulatorOptions, rng: np.random.Generator) -> list[int]:
    """Sorted Unix ms of an inhomogeneous Poisson process, by thinning; who joins in the period visits on joining.

    Source   Lewis, Shedler (1979), "Simulation of nonhomogeneous Poisson processes by thinning".
    """
    from_ms = max(shopper.joined_ms, options.start_ms)
    until_ms = min(shopper.churned_ms, options.end_ms)
    expected = shopper.visits_per_day * RATE_CEILING * (until_ms - from_ms) / DAY_MS
    ts = np.sort(rng.integers(from_ms, max(until_ms, from_ms + 1), rng.poisson(expected)))
    chance = season(ts) * _interest(shopper, ts) * _fading(shopper, ts) / RATE_CEILING
    visits = ts[rng.random(len(ts)) < chance].tolist()
    return [from_ms, *visits] if shopper.joined_ms >= options.start_ms else visits


# A shopper's life, visit after visit


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    # One numpy call a number would cost more than all the rest.
    while True:
        yield from rng.random(512).tolist()


def _live(
    shopper: Shopper, options: SimulatorOptions, assortment: Assortment, rng: np.random.Generator
) -> tuple[list[dict], float]:
    """All events of a shopper in time order, and the mean chance that a session bought."""
    until_ms = min(shopper.churned_ms, options.end_ms)
    planned = _visit_times(shopper, options, rng)
    life = _Life(shopper, options, assortment, _uniforms(rng).__next__)
    chances = []
    while planned:
        at_ms = heapq.heappop(planned)
        # A visit that would start before the session before it was over is part of that one.
        if at_ms >= until_ms or (life.visits and at_ms < life.at_ms + SESSION_GAP_MS):
            continue
        chances.append(life.visit(at_ms))
        if life.cart and life.draw() < COME_BACK_FOR_CART:
            heapq.heappush(planned, life.come_back_ms())
    events = [event for event in life.events if event['ts'] < until_ms]
    events.sort(key=lambda event: event['ts'])
    return events, sum(chances) / len(chances) if chances else shopper.conversion


class _Life:
    """A shopper's state between and inside visits: the cart, the desire, the clock, and the events so far."""

    def __init__(
        self, shopper: Shopper, options: SimulatorOptions, assortment: Assortment, draw: Callable[[], float]
    ) -> None:
        self.shopper = shopper
        self.options = options
        self.prices = assortment.prices
        self.draw = draw
        self.favourites = list(shopper.favourites)
        cumulative = assortment.item_weights(shopper.price_level).cumsum(axis=1)
        self.item_chances: list[list[float]] = (cumulative / cumulative[:, -1:]).tolist()
        self.events: list[dict] = []
        self.at_ms = 0
        self.visits = 0
        self.orders = 0
        self.session_id = ''
        self.cart: dict[int, int] = {}  # item -> quantity
        self.desire = 0.0
        self.wanted: int | None = None

    def visit(self, at_ms: int) -> float:
        """One session: browse, then buy or not. Returns the probability of buying."""
        self._arrive(at_ms)
        category = self._favourite()
        seen = self._browse(category)
        while self.draw() < MORE_STEPS:
            if self.draw() < SEARCH:
                category = self._favourite()
                self._search(category)
            seen = self._browse(category)
        chance = self._buying_chance()
        if self.draw() < chance:
            self._buy(seen, category)
        elif self.cart and self.draw() < REMOVE_FROM_CART * len(self.cart):
            self._remove_from_cart()
        return chance

    def come_back_ms(self) -> int:
        """When to return to a cart: some whole days later, plus or minus hours, at about the same time of day."""
        days = 1
        while self.draw() < COME_BACK_LATER:
            days += 1
        return self.at_ms + days * DAY_MS + int((self.draw() - 0.5) * COME_BACK_SPREAD_MS)

    def _arrive(self, at_ms: int) -> None:
        away_days = (at_ms - self.at_ms) / DAY_MS
        self.desire *= 0.5 ** (away_days / DESIRE_HALF_LIFE_DAYS)
        if away_days > CART_KEPT_DAYS:
            self.cart.clear()
        if self.draw() < NEW_FAVOURITE:
            self.favourites[int(self.draw() * FAVOURITES)] = int(self.draw() * len(CATEGORIES))
        self.at_ms = at_ms
        self.visits += 1
        self.session_id = f's{self.shopper.user_id[1:]}-{self.visits:04d}'
        if self.visits == 1 or self.draw() < LOGIN:
            self._record('login')

    def _browse(self, category: int) -> int:
        """View one item, perhaps again the wanted one, and do something with it. Returns the item."""
        wanted = self._wanted_again()
        if wanted is None:
            item = self._pick(category)
            add_to_cart = ADD_TO_CART
            # A new thing takes the place of the wanted one the more easily, the weaker the desire.
            if self.wanted is None or self.draw() > self.desire:
                self.wanted = item
        else:
            item = wanted
            add_to_cart = ADD_WANTED_TO_CART
            self._want(item, DESIRE_PER_REPEATED_VIEW)
        self._record_item('view', item)
        if self.draw() < CLICK:
            self._record_item('click', item)
        if self.draw() < FAVORITE:
            self._record_item('favorite', item)
        if self.draw() < SHARE:
            self._record_item('share', item)
        if self.draw() < FOLLOW:
            self._record('follow', category=CATEGORIES[item // ITEMS_PER_CATEGORY])
        if self.draw() < add_to_cart:
            self._add_to_cart(item)
            self._want(item, DESIRE_PER_CART)
        return item

    def _wanted_again(self) -> int | None:
        """The wanted item, if there is one and the shopper returns to it now."""
        if self.wanted is not None and self.draw() < WANT_AGAIN + WANT_AGAIN_PER_DESIRE * self.desire:
            return self.wanted
        return None

    def _buying_chance(self) -> float:
        days = (self.at_ms - self.options.start_ms) / DAY_MS
        drift = 1 + CONVERSION_DRIFT * math.cos(2 * math.pi * days / YEAR_DAYS)
        base = min(self.shopper.conversion * drift, 0.5)
        return 1 / (1 + (1 - base) / base * math.exp(-DESIRE_LOG_ODDS * self.desire))

    def _buy(self, seen: int, category: int) -> None:
        if not self.cart:
            self._add_to_cart(seen)
        while self.draw() < self.shopper.more_lines:
            self._add_to_cart(self._pick(category))
        self.orders += 1
        order_id = f'o{self.shopper.user_id[1:]}-{self.orders:04d}'
        bought_ms = self._tick()
        for item, quantity in self.cart.items():
            self._record_item('purchase', item, bought_ms, quantity=quantity, order_id=order_id)
            self._follow_up(item, quantity, order_id)
        self.cart.clear()
        self.desire = 0.0
        self.wanted = None

    def _follow_up(self, item: int, quantity: int, order_id: str) -> None:
        fate = self.draw()
        if fate >= RATING + REVIEW + REFUND:
            return
        first_day, last_day = FOLLOW_UP_DAYS
        later_ms = self.at_ms + int((first_day + self.draw() * (last_day - first_day)) * DAY_MS)
        if fate < REFUND:
            self._record_item('refund', item, later_ms, session=False, quantity=quantity, order_id=order_id)
            return
        stars = 1 + bisect(STARS_UP_TO, self.draw())
        if fate < REFUND + REVIEW:
            text = REVIEW_TEXTS[stars - 1]
            self._record_item('review', item, later_ms, session=False, rating=stars, text=text)
        else:
            self._record_item('rating', item, later_ms, session=False, rating=stars)

    def _search(self, category: int) -> None:
        word = QUERY_WORDS[int(self.draw() * len(QUERY_WORDS))]
        self._record('search', query=word + CATEGORIES[category])

    def _add_to_cart(self, item: int) -> None:
        quantity = 2 if self.draw() < SECOND_PIECE else 1
        self.cart[item] = self.cart.get(item, 0) + quantity
        self._record_item('add_to_cart', item, quantity=quantity)

    def _remove_from_cart(self) -> None:
        item, quantity = self.cart.popitem()
        self._record_item('remove_from_cart', item, quantity=quantity)
        self.desire = max(0.0, self.desire - DESIRE_PER_CART)

    def _want(self, item: int, more: float) -> None:
        self.wanted = item
        self.desire = min(DESIRE_MAX, self.desire + more)

    def _favourite(self) -> int:
        # The square prefers the first ones.
        return self.favourites[int(self.draw() ** 2 * FAVOURITES)]

    def _pick(self, category: int) -> int:
        return category * ITEMS_PER_CATEGORY + bisect(self.item_chances[category], self.draw())

    def _tick(self) -> int:
        self.at_ms += SECOND_MS - int(STEP_MEAN_MS * math.log(1 - self.draw()))
        return self.at_ms

    def _record(self, kind: str, **fields: object) -> None:
        self.events.append(
            {
                'user_id': self.shopper.user_id,
                'ts': self._tick(),
                'type': kind,
                'session_id': self.session_id,
                **fields,
            }
        )

    def _record_item(self, kind: str, item: int, ts: int | None = None, session: bool = True, **fields: object) -> None:
        event = {
            'user_id': self.shopper.user_id,
            'ts': self._tick() if ts is None else ts,
            'type': kind,
            'item_id': f'i{item:05d}',
            'category': CATEGORIES[item // ITEMS_PER_CATEGORY],
            'price': self.prices[item],
            **fields,
        }
        if session:
            event['session_id'] = self.session_id
        if self.options.currency is not None:
            event['currency'] = self.options.currency
        self.events.append(event)


# Noise


def _noise(ts: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which row each line shows, and its fault: of the noisy rows one third is repeated, one delayed, one broken.

    Shapes   ts (rows,) sorted Unix ms in; order (lines,) int64 and faults (lines,) int8 out, lines = rows + repeats.
    """
    rows = np.arange(len(ts))
    kinds = rng.choice([_REPEATED, _DELAYED, *_BROKEN], len(ts), p=_NOISE_SHARES)
    faults = np.where(rng.random(len(ts)) < share, kinds, _CLEAN).astype(np.int8)
    late_ms = np.where(faults == _DELAYED, _log_uniform(rng, LATE_DELAY_MS, len(ts)), 0)
    repeated = rows[faults == _REPEATED]
    repeat_late_ms = _log_uniform(rng, REPEAT_DELAY_MS, len(repeated))
    lines = np.concatenate([rows, repeated])
    by_arrival = np.argsort(np.concatenate([ts + late_ms, ts[repeated] + repeat_late_ms]), kind='stable')
    return lines[by_arrival], faults[lines[by_arrival]]


def _log_uniform(rng: np.random.Generator, bounds: tuple[int, int], count: int) -> np.ndarray:
    low, high = bounds
    return np.exp(rng.uniform(math.log(low), math.log(high), count)).astype(np.int64)


def _broken(line: bytes, fault: int) -> bytes:
    """The line as a careless producer would have written it."""
    if fault == _CUT:
        return line[: len(line) // 2]
    event = orjson.loads(line)
    if fault == _NO_USER:
        del event['user_id']
        return orjson.dumps(event)
    if fault == _SECONDS:
        event['ts'] //= SECOND_MS
        return orjson.dumps(event)
    # JSON has no NaN, and orjson writes none; other producers do.
    event.pop('price', None)
    return orjson.dumps(event)[:-1] + b',"price":NaN}'
