"""The best possible scores for simulated shoppers: the simulator's own probabilities, inverted by Bayes' rule.

`stream.simulator.shop` generates events from hidden shoppers. Here the events are given and the shopper is not: how
likely is a purchase within 1, 7, 30 and 90 days? Only the events and what holds for all shoppers (the simulator's
constants, the shop's items) are known. No model can reach a higher AUC than these probabilities, but for luck.

    events -> sessions
           -> presence   own rate, interest, fading, death, visits still to come for a cart  (presence)
           -> desire     the wanted item, desire, own conversion, purchase power             (desire)
    as of a time: draw hidden shoppers from both, live on without buying               -> (futures)
    P(purchase within h) = 1 - mean over the draws of the product of (1 - chance to buy) of all sessions within h

Given the times of the visits and what happened in them, the two hidden halves are independent (but for the tier, which
presence takes from desire as the prior of the own rate), so each is filtered alone.

The chances hold for moments that were chosen without a look at what came after them. A few moments out of each user's
whole life are not: of a short life each moment is the likelier to be taken, and whoever takes the last event of a
session knows that it was the last. Weigh such moments by 1 / (their chance to be taken), or choose others.

What is not exact, and what it touches
- Numbers: own rate, period and phase of interest, day of death, length of fading, conversion and price level are
  sums over nodes (`Resolution`, and the constants of the parts), and the future is a mean over draws.
- Several carts to come back to: their chances of being still open are kept one by one, not jointly, and as if the
  shopper were not fading.
- A visit is dated by its first event, about 36 s later than it began; a pause of 30 minutes ends a session, as in the
  law; 15 minutes of silence count as its end (chance of a longer pause: 1e-11).
- Categories: where a fresh item comes from a category not yet known, the category's chance is a smoothed count of the
  shopper's earlier ones; favourites are not filtered. It only helps to tell a repeated view from a fresh one.
- The tier is read from the items seen, not from the lines of a basket; it moves the rate by 0.85 to 1.25.
- In the draws of the future every line added to the cart counts as another item (this moves only the chance of 4 % a
  line that one is removed).
- The shop goes on after the end of the simulation: a moment should have 90 days ahead of it.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stream.core.events import EventType
from stream.core.layout import DAY_MS
from stream.core.parse import Event
from stream.errors import UsageError
from stream.simulator import shop as law
from stream.simulator.desire import Desire, Shelf
from stream.simulator.futures import Futures, join, survival
from stream.simulator.presence import Calendar, Presence, Visit, as_chance

HORIZONS_DAYS = (1, 7, 30, 90)
SILENCE_MS = DAY_MS // 96           # 15 minutes: nobody pauses so long within a session
FUTURES_AT_ONCE = 60_000
FOLLOW_UPS = (EventType.RATING, EventType.REVIEW, EventType.REFUND)


@dataclass(frozen=True)
class Resolution:
    """The resolution of the calculation. Time grows with each of these numbers.

    interests   points of the plane of period and phase of the personal interest
    rates       nodes of the own visit rate
    cells       pairs of the two that are kept to look at fading and death
    futures     draws per moment
    """

    interests: int = 2048
    rates: int = 24
    cells: int = 256
    futures: int = 512


def posterior(
    events: Sequence[Event], as_of_ms: Sequence[int], options: law.SimulatorOptions, rng: np.random.Generator,
    resolution: Resolution | None = None,
) -> np.ndarray:
    """Chance that one simulated user buys within each of HORIZONS_DAYS after each moment, float64 [moments, 4].

    events   all of one user, sorted by time; of those after a moment nothing is used for it
    Errors   UsageError for a noisy simulation, unsorted events, or a moment before the first event; InputError for
             events that the simulation cannot have made.
    """
    return posteriors([(events, as_of_ms)], options, rng, resolution)[0]


def posteriors(
    users: Sequence[tuple[Sequence[Event], Sequence[int]]], options: law.SimulatorOptions, rng: np.random.Generator,
    resolution: Resolution | None = None,
) -> list[np.ndarray]:
    """`posterior` for many users, each given as (events, as_of_ms): one array [moments, 4] per user, in their order."""
    if options.noise:
        raise UsageError(f'The simulation has noise ({options.noise}): lost events have no tractable likelihood.',
                         do='simulate with a noise of 0.')
    resolution = resolution or Resolution()
    calendar, shelf = Calendar(options, resolution.interests, resolution.rates), Shelf(options)
    answers: list[np.ndarray] = []
    waiting: list[Futures] = []
    alive: list[float] = []
    for events, as_of_ms in users:
        for futures, chance in _as_of_each(events, as_of_ms, calendar, shelf, resolution, rng):
            waiting.append(futures)
            alive.append(chance)
            if sum(map(len, waiting)) > FUTURES_AT_ONCE:
                answers.append(_bought(waiting, alive, calendar, rng))
                waiting, alive = [], []
    if waiting:
        answers.append(_bought(waiting, alive, calendar, rng))
    rows = np.concatenate([np.empty((0, len(HORIZONS_DAYS))), *answers])
    return np.split(rows, np.cumsum([len(as_of_ms) for _, as_of_ms in users])[:-1])[:len(users)]


def _bought(waiting: list[Futures], alive: list[float], calendar: Calendar, rng: np.random.Generator) -> np.ndarray:
    """Chances of a purchase [moments, horizons], from the draws of some moments and the chance to be there at all."""
    unsold, weights = survival(join(waiting), HORIZONS_DAYS, calendar, rng)
    starts = np.cumsum([0, *map(len, waiting[:-1])])
    unsold = np.add.reduceat(unsold, starts) / np.add.reduceat(weights, starts)[:, None]
    return np.array(alive)[:, None] * as_chance(1 - unsold)


def _as_of_each(
    events: Sequence[Event], as_of_ms: Sequence[int], calendar: Calendar, shelf: Shelf, resolution: Resolution,
    rng: np.random.Generator,
) -> list[tuple[Futures, float]]:
    """For each moment: hidden shoppers who are still there, and the chance that this one is."""
    if not len(as_of_ms):
        return []
    times_ms = [event.ts_ms for event in events]
    if times_ms != sorted(times_ms):
        raise UsageError('The events are not sorted by time.', do='sort them by ts_ms.')
    if not times_ms or min(as_of_ms) < times_ms[0]:
        raise UsageError('A moment lies before the first event: such a user is unknown.', do='ask for later moments.')
    in_sessions = [event for event in events if event.type not in FOLLOW_UPS]
    presence, desire = Presence(calendar), Desire(shelf)
    found: dict[int, tuple[Futures, float]] = {}
    done = 0
    for moment in sorted(range(len(as_of_ms)), key=as_of_ms.__getitem__):
        now_ms = as_of_ms[moment]
        while done < len(in_sessions) and in_sessions[done].ts_ms <= now_ms:
            event = in_sessions[done]
            if done == 0 or event.ts_ms - in_sessions[done - 1].ts_ms > law.SESSION_GAP_MS:
                if done:
                    presence.leave(Visit(desire.began, desire.last, bool(desire.cart)))
                desire.arrive(calendar.day(event.ts_ms))
                presence.arrive(desire.began)
            desire.see(event, calendar.day(event.ts_ms))
            done += 1
        now, seen = calendar.day(now_ms), calendar.day(max(ts for ts in times_ms if ts <= now_ms))
        silent = now_ms - in_sessions[done - 1].ts_ms > SILENCE_MS
        visit = Visit(desire.began, desire.last, (silent or desire.over) and bool(desire.cart))
        who, alive = presence.draw(now, seen, visit, calendar.rate_chances(desire.tiers()), resolution.cells,
                                   resolution.futures, rng)
        mind = desire.draw(silent, resolution.futures, rng)
        found[moment] = Futures(np.full(resolution.futures, now), who, mind), alive
    return [found[moment] for moment in range(len(as_of_ms))]
