"""Chances stay chances, however a processor rounds.

numpy computes exp and pow with the widest vectors that the processor has, and their results differ in the last bit. So
each test makes the rounding itself, and fails on every processor if the code does not expect it.
"""
import numpy as np
import pytest

from stream.simulator import presence
from stream.simulator import shop as law
from stream.simulator.presence import Calendar, Presence, Visit, stratified
from stream.simulator.shop import SimulatorOptions

YEAR = SimulatorOptions(shoppers=1, days=365)


@pytest.fixture
def rate_known(monkeypatch):
    """The law with one visit rate for everybody: all edges between the rates are the same number."""
    monkeypatch.setattr(law, 'VISIT_RATE_RANGE', (0.2, 0.2))


@pytest.mark.parametrize('towards', [0.0, 1.0], ids=['down', 'up'])
def test_edges_that_differ_in_their_last_bit_leave_no_share_below_zero(rate_known, monkeypatch, towards):
    def rounded(low: float, high: float, count: int) -> np.ndarray:
        edges = np.full(count, low)
        edges[1:-1] = np.nextafter(low, towards)
        return edges

    monkeypatch.setattr(presence.np, 'geomspace', rounded)
    calendar = Calendar(YEAR, interests=4, rates=12)
    for tier in np.eye(len(law.TIER_SHARES)):
        shares = calendar.rate_chances(tier)
        assert (shares >= 0).all()
        assert shares.sum() == pytest.approx(1, abs=1e-12)


def test_every_known_rate_gives_shares(monkeypatch):
    for rate in np.linspace(0.02, 1.0, 50):
        monkeypatch.setattr(law, 'VISIT_RATE_RANGE', (rate, rate))
        assert (Calendar(YEAR, interests=4, rates=24).rate_chances(np.array(law.TIER_SHARES)) >= 0).all()


def test_a_life_that_rounds_longer_with_age_is_no_chance_below_zero(monkeypatch):
    ages = []

    def rounded(age_days: np.ndarray) -> np.ndarray:
        """The same chance at all ages, but for one bit more in every second call: at the end of each bin of death."""
        ages.append(age_days)
        return np.full(age_days.shape, 0.75 if len(ages) % 2 else np.nextafter(0.75, 1))

    calendar = Calendar(YEAR, interests=16, rates=12)
    user = Presence(calendar)
    user.arrive(20.0)
    monkeypatch.setattr(presence, 'still_there', rounded)
    # The logarithm of a number below 0 is a warning, and so an error.
    _, alive = user.draw(21.0, 20.0, Visit(20.0, 20.0, False), calendar.rate_chances(np.array(law.TIER_SHARES)),
                         cells=32, draws=64, rng=np.random.default_rng(1))
    assert (ages[1] >= ages[0]).all()
    assert alive == 1       # in no bin does anybody die


def test_what_weighs_nothing_is_never_drawn():
    class Last:
        """Draws the last number below 1, which a product may round up to the end of the sum."""

        def random(self, count: int) -> np.ndarray:
            return np.full(count, np.nextafter(1.0, 0.0))

    for count in (1, 3, 64, 256):
        for weights in ([1.0, 0.1, 0.0, 0.0], [0.0, 0.3, 0.0], [1e-300, 0.0]):
            drawn = stratified(np.array(weights), count, Last())
            assert (np.array(weights)[drawn] > 0).all()
