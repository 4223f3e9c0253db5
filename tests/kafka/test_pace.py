"""The pause between fetches follows what they bring."""
import pytest

from stream.kafka.pace import BYTES_AIM, BYTES_MANY, PAUSE_S_MAX, PAUSE_S_MIN, Pace


def settled(bytes_per_s: float) -> float:
    """The mean pause at a steady rate of records, which gather during a pause."""
    pace, pauses = Pace(), []
    for _ in range(200):
        pace.fetched(round(bytes_per_s * (0.001 + pace.pause_s)))
        pauses.append(pace.pause_s)
    return sum(pauses[100:]) / 100


def test_a_quiet_shop_has_the_longest_pauses_and_a_busy_one_the_shortest():
    assert settled(10_000) == pytest.approx(PAUSE_S_MAX)
    assert settled(2_000_000) == pytest.approx(PAUSE_S_MIN)


def test_between_them_a_fetch_brings_about_the_aim():
    for rate in (100_000, 200_000):
        assert 0.7 * BYTES_AIM < rate * (0.001 + settled(rate)) < 1.4 * BYTES_AIM


def test_a_backlog_is_read_without_a_pause_and_the_pause_comes_back_after_it():
    pace = Pace()
    pace.fetched(BYTES_MANY)
    assert pace.pause_s == 0.0
    pace.fetched(100)
    assert PAUSE_S_MIN <= pace.pause_s <= PAUSE_S_MAX
