"""What is filtered stays a chance, however the weights round."""
import numpy as np

from stream.simulator import shop as law
from stream.simulator.desire import CONVERSION_NODES, Desire, Hypothesis, Shelf
from stream.simulator.shop import SimulatorOptions


def test_a_level_that_never_picks_an_item_is_ruled_out_by_it_and_no_more():
    # The share of fresh picks is a quotient of the same weights, summed in two orders: it rounds to more than 1, too.
    shelf, rng = Shelf(SimulatorOptions(shoppers=1, days=365)), np.random.default_rng(1)
    never = shelf.tier_of_level == 0
    shelf.item_chances[never] = 0
    for _ in range(300):
        desire = Desire(shelf)
        desire.arrive(1.0)
        desire._weights = {Hypothesis(item, rng.uniform(0, law.DESIRE_MAX), item // law.ITEMS_PER_CATEGORY):
                           rng.random(CONVERSION_NODES) / 100 for item in range(40)}
        desire._view(45)        # nobody wanted it before: every way there is a fresh pick
        assert (desire.tiers() >= 0).all()
        assert (desire._levels[never] < 1e-15).all()
