"""A short run with the real parts: one worker is killed, another joins and leaves, and nothing is lost."""
import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.plan import STAGES, Plan, draw
from tests.chaos.run import Options, console, play


def test_one_kill_and_one_rebalance_lose_nothing(kafka: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, 'aiokafka')
    options = Options(seed=4, events=20_000, kills=1, rebalances=1, terms=0, brokers=0, tritons=0, partitions=4,
                      shoppers=300, publish='all')
    report = asyncio.run(play(options, tmp_path, kafka, None, 'chaos'))
    report.print(console)
    assert report.ok, report.failed
    assert report.checks['C10'].looked_at == {'faults of 2 planned': 2}
    assert report.checks['C1'].looked_at['events'] > 19_000
    assert report.checks['C5'].looked_at.keys() >= {'states', 'users compared state by state', 'records in RocksDB'}


def test_a_plan_follows_from_its_seed_and_has_every_point():
    def plan(seed: int) -> Plan:
        return draw(seed, 1_000_000, 20, 10, 2, 1, 2, 3_000)

    assert plan(1) == plan(1) != plan(2)
    for seed in range(50):
        faults = plan(seed).faults
        kills = [fault for fault in faults if fault.kind in ('kill', 'die')]
        assert len(kills) == 20
        assert {fault.stage for fault in kills} >= set(STAGES)
        assert sum(fault.empty for fault in kills) >= 3
        assert [fault.kind for fault in faults if fault.kind in ('join', 'leave')] == ['join', 'leave'] * 5
        assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='events'):
        draw(1, 20_000, 20, 10, 2, 1, 2, 3_000)
