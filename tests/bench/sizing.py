"""How much CPU a worker takes, as a linear model of what it does, and how sure that is.

    cores = base + partition * P + step * S + event * R + user * W + message * M + disk * D

P partitions; R events, S steps, W users scored, M messages of scores and D users read from disk, all a second. S and W
can be measured, or follow from R, P and the number of users: see `Pacing`.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TERMS = ('base', 'partition', 'step', 'event', 'user', 'message', 'disk')
RESAMPLES = 500
CORE_FLOOR = 0.02       # errors are relative, but those of an idle worker not to less than this


@dataclass(frozen=True)
class Load:
    """What a worker has to do. `rate`: events a second; `publish`: a message for each scored user."""

    rate: float
    partitions: int
    users: int
    publish: bool


@dataclass(frozen=True)
class Run:
    """One measured run: the load, the share of a core, and steps and users scored a second."""

    load: Load
    core: float
    steps: float
    rows: float


@dataclass(frozen=True)
class Pacing:
    """How many steps a second a load leads to.

    A step takes at least `step_s`, and waits for an event. With `by_lane`, each partition takes steps of its own; else
    one step serves all of them.
    """

    step_s: float
    by_lane: bool

    def steps(self, load: Load) -> float:
        lanes = load.partitions if self.by_lane else 1
        return load.rate / (1 + load.rate * self.step_s / lanes)

    def rows(self, load: Load) -> float:
        """Users scored a second: the different ones among the events of a step, if users are drawn evenly."""
        steps = self.steps(load)
        if not steps:
            return 0.0
        reach = max(load.users / (load.partitions if self.by_lane else 1), 1)
        return steps * reach * -np.expm1(-load.rate / steps / reach)

    @staticmethod
    def fitted(runs: Sequence[Run]) -> 'Pacing':
        """The one whose steps differ least, relatively, from the measured ones."""
        busy = [run for run in runs if run.load.rate and run.steps]
        if not busy:
            return Pacing(0.0, True)
        measured = np.array([run.steps for run in busy])

        def error(pacing: Pacing) -> float:
            return float(np.sum(np.log(np.array([pacing.steps(run.load) for run in busy]) / measured) ** 2))

        return min((Pacing(float(step_s), by_lane)
                    for step_s in np.geomspace(1e-5, 1, 500) for by_lane in (True, False)), key=error)


def terms(load: Load, steps: float, rows: float, cached_users: float) -> list[float]:
    """The factors of the model's coefficients, in the order of TERMS. Up to `cached_users` users stay in memory."""
    from_disk = rows * max(0.0, 1 - cached_users / max(load.users, 1))
    return [1.0, load.partitions, steps, load.rate, rows, rows if load.publish else 0.0, from_disk]


def fitted(factors: np.ndarray, cores: np.ndarray) -> np.ndarray:
    """Coefficients by least squares of relative errors, none negative: a term that would be is left out."""
    weights = 1 / np.maximum(cores, CORE_FLOOR)
    scale = np.maximum(np.abs(factors).max(axis=0), 1e-12)
    weighted = factors / scale * weights[:, None]
    kept = list(range(factors.shape[1]))
    while kept:
        found = np.linalg.lstsq(weighted[:, kept], cores * weights, rcond=None)[0]
        if found.min() >= 0:
            coefficients = np.zeros(factors.shape[1])
            coefficients[kept] = found / scale[kept]
            return coefficients
        kept.pop(int(found.argmin()))
    return np.zeros(factors.shape[1])


def relative(predicted: np.ndarray, cores: np.ndarray) -> np.ndarray:
    """Errors as shares of what was measured."""
    return (predicted - cores) / np.maximum(cores, CORE_FLOOR)


@dataclass(frozen=True)
class Model:
    """The fitted model.

    interval   the middle 90 % of each coefficient over resampled runs, [2, terms]
    left_out   relative error for each run of a model that was fitted without it
    """

    coefficients: np.ndarray
    interval: np.ndarray
    left_out: np.ndarray
    pacing: Pacing
    cached_users: float

    @staticmethod
    def of(runs: Sequence[Run], cached_users: float, seed: int = 1) -> 'Model':
        factors = np.array([terms(run.load, run.steps, run.rows, cached_users) for run in runs])
        cores = np.array([run.core for run in runs])
        everyone = np.arange(len(runs))
        left_out = np.array([
            relative(factors[index] @ fitted(factors[everyone != index], cores[everyone != index]), cores[index])
            for index in everyone])
        draw = np.random.default_rng(seed)
        resampled = [fitted(factors[drawn], cores[drawn]) for drawn
                     in draw.integers(0, len(runs), (RESAMPLES, len(runs)))]
        return Model(fitted(factors, cores), np.percentile(resampled, (5, 95), axis=0), left_out, Pacing.fitted(runs),
                     cached_users)

    def cores(self, load: Load, steps: float | None = None, rows: float | None = None) -> float:
        """Of a load alone, or with the steps and users that were measured."""
        steps = self.pacing.steps(load) if steps is None else steps
        rows = self.pacing.rows(load) if rows is None else rows
        return float(np.dot(self.coefficients, terms(load, steps, rows, self.cached_users)))

    def formula(self) -> str:
        """The model in words, for sizing."""
        us = dict(zip(TERMS, self.coefficients * 1e6, strict=True))
        lanes = ' / P' if self.pacing.by_lane else ''
        return (f"cores = {us['base'] / 1e6:.4f} + {us['partition'] / 1e6:.5f} P + {us['step']:.0f}e-6 S + "
                f"{us['event']:.1f}e-6 R + {us['user']:.1f}e-6 W + {us['message']:.1f}e-6 W (publish = all) + "
                f"{us['disk']:.1f}e-6 W max(0, 1 - {self.cached_users:,.0f} / U)\n"
                f'    with S = R / (1 + {self.pacing.step_s:.5f} R{lanes}), and W = R unless few users have many '
                'events in one step')


def median_interval(values: Sequence[float], seed: int = 1) -> tuple[float, float]:
    """The middle 95 % of the medians of resampled values."""
    drawn = np.random.default_rng(seed).choice(np.array(values), (10_000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)
