"""The plan of a run, drawn from one seed: the faults, their order, the event at which each fires, and the worker."""
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal['kill', 'die', 'term', 'join', 'leave', 'broker', 'triton']
STAGES = ('read', 'score', 'changelog', 'outputs', 'done', 'write', 'commit')
CUT_STAGES = ('changelog', 'outputs', 'write', 'commit')      # those that take time, so that one can die within
SHARE_BEFORE_LAST = 0.94        # of the events are consumed when the last fault fires
EVENTS_BETWEEN_MIN = 1_000


@dataclass(frozen=True)
class Planned:
    """One fault.

    at       events consumed when it is due; it waits for more if the last fault was less than `EVENTS_BETWEEN_MIN` ago
    delay_s  and then for this long, so that it hits any moment of a step
    kind     kill: SIGKILL from outside; die: SIGKILL at a named point; term: SIGTERM, twice; join, leave: the second
             worker; broker: SIGKILL, away for `delay_s` more, back on its port; triton: the same
    target   place among the workers that run then
    empty    the data directory is emptied before the restart
    again    killed once more while it takes its partitions over
    """

    at: int
    delay_s: float
    kind: Kind
    target: int = 0
    stage: str = ''
    when: Literal['before', 'during', 'after'] = 'after'
    calls: int = 1
    cut_ms: int = 0
    empty: bool = False
    again: bool = False

    @property
    def name(self) -> str:
        """The fault in words."""
        parts = [self.kind]
        if self.stage:
            parts.append(f'{self.when} {self.stage} (call {self.calls})')
        if self.empty:
            parts.append('directory emptied')
        if self.again:
            parts.append('and again while taking over')
        return ', '.join(parts)


@dataclass(frozen=True)
class Plan:
    """The plan of a run. `ahead`: how far the publisher may be ahead of the consumer, which changes during the run."""

    seed: int
    events: int
    shoppers: int
    faults: list[Planned]
    ahead: list[int]

    def ahead_at(self, consumed: int) -> int:
        """The publisher's limit at this point of the run."""
        return self.ahead[min(consumed * len(self.ahead) // self.events, len(self.ahead) - 1)]


def draw(seed: int, events: int, kills: int, rebalances: int, terms: int, brokers: int, tritons: int,
         shoppers: int) -> Plan:
    """Draw a plan. Errors: ValueError if there are too few events for the faults."""
    rng = random.Random(seed)
    named: list[dict] = [{'stage': stage, 'when': 'after', 'calls': _calls(rng, stage)} for stage in STAGES]
    named += [{'stage': stage, 'when': 'during', 'calls': _calls(rng, stage), 'cut_ms': rng.choice((0, 1, 3, 10))}
              for stage in CUT_STAGES]
    named += [{'stage': stage, 'when': 'before', 'calls': _calls(rng, stage)} for stage in ('outputs', 'write')]
    if kills < len(named):
        # Each point once before any of them twice.
        named = named[:len(STAGES)] if kills >= len(STAGES) else rng.sample(named, kills)
    deaths: list[dict] = [{'kind': 'die', **point} for point in named]
    deaths += [{'kind': 'kill'} for _ in range(kills - len(deaths))]
    rng.shuffle(deaths)
    for death in rng.sample(deaths, max(len(deaths) // 4, min(len(deaths), 1))):
        death['empty'] = True
    for death in rng.sample(deaths, len(deaths) // 8):
        death['again'] = True
    others: list[dict] = [{'kind': 'term'}] * terms + [{'kind': 'broker'}] * brokers + [{'kind': 'triton'}] * tritons
    mixed = [*deaths, *others]
    rng.shuffle(mixed)
    # Joins and leaves alternate, spread over the run; the second worker is gone at its end.
    places = sorted(rng.sample(range(len(mixed) + rebalances), rebalances))
    for number, place in enumerate(places):
        mixed.insert(place, {'kind': 'join' if number % 2 == 0 else 'leave'})
    slot = int(events * SHARE_BEFORE_LAST) // max(len(mixed), 1)
    if mixed and slot < 2 * EVENTS_BETWEEN_MIN:
        raise ValueError(f'{len(mixed)} faults need at least {int(len(mixed) * 2 * EVENTS_BETWEEN_MIN / 0.9)} events')
    faults = [Planned(at=int(slot * (place + rng.uniform(0.1, 0.9))), delay_s=round(rng.uniform(0, 1.5), 3),
                      target=rng.randrange(2), **fault) for place, fault in enumerate(mixed)]
    ahead = [rng.choice((1_500, 5_000, 20_000, 60_000)) for _ in range(max(events // 25_000, 4))]
    return Plan(seed, events, shoppers, faults, ahead)


def _calls(rng: random.Random, stage: str) -> int:
    return rng.randint(1, {'commit': 2, 'write': 6}.get(stage, 30))     # commits and writes come rarely
