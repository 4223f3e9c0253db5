"""Calibrate the model's raw outputs into probabilities.

    mix        per task, the share of the window branch: the one that fits held-out users best
    scale      Platt's slope, on the same users: it flattens overconfident logits
    shift      fits the mean of the newest settled labels, since base rates drift
    horizons   a horizon that no label settles is derived from the longest settled one
    spend      scaled to the total of the newest settled labels: the mean of a log-normal depends on its tail alone

All of these are buffers of the model and part of its exported graph.

Source: Platt (1999), "Probabilistic outputs for support vector machines".
"""
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from stream.learn.dataset import HORIZON_DAYS, Examples, SnapshotKind
from stream.learn.model import BINARY, HORIZONS, Logits, ShopperModel

SETTLED_ROWS_MIN = 500      # a horizon with fewer labels counts as not settled
_SHIFT_MAX = 20.0
NEWEST_SHARE = 0.25         # of the settled rows, from which the base rate is taken
_SHARES = np.linspace(0, 1, 11)
_EXPECTED_WEIGHT = 20.0     # the prior of the share, in users: it is half,
_HALF_ANSWERS = 1_000       # or less if a class has few labels, since the linear branch needs fewer
_SCALE_WEIGHT = 300.0       # the prior of a scale of 1, in users


def calibrate(model: ShopperModel, window: Tensor, counters: Tensor, examples: Examples,
              labels: tuple[Tensor, Tensor, Tensor], held_out: np.ndarray) -> None:
    """Set the model's buffers.

    window, counters  logits of the two branches, float [n, k], of the rows of `examples`
    labels            binary, tier, spend, as in `stream.learn.model.losses`
    held_out          bool [n]: users that the window branch was not trained on
    """
    binary, tier, spend = labels
    users = len(np.unique(examples.user[held_out]))
    mixed = torch.from_numpy(held_out)
    w, c = window[mixed].double(), counters[mixed].double()
    y, t = binary[mixed].double(), tier[mixed]
    model.mix.fill_(0.5)
    for task in range(BINARY):
        known = ~y[:, task].isnan()
        if known.any():
            loss = [float(binary_cross_entropy_with_logits(
                share * w[known, task] + (1 - share) * c[known, task], y[known, task])) for share in _SHARES]
            answers = [int((binary[~mixed, task] == answer).sum()) for answer in (0, 1)]
            model.mix[task] = _best(loss, users, 0.5 * min(answers) / (min(answers) + _HALF_ANSWERS))
    known = t >= 0
    if known.any():
        tiers = slice(BINARY, BINARY + model.tiers)
        loss = [float(cross_entropy(share * w[known, tiers] + (1 - share) * c[known, tiers], t[known]))
                for share in _SHARES]
        model.mix[tiers] = _best(loss, users)

    logits = model.mixed(window, counters)
    settled = _settled(binary)
    for task in range(BINARY):
        known = (~binary[:, task].isnan()).numpy()
        if known[held_out].sum() < SETTLED_ROWS_MIN / 10 or binary[known, task].unique().numel() < 2:
            continue
        scale = _scale(logits[mixed & torch.from_numpy(known), task], binary[mixed & torch.from_numpy(known), task],
                       users)
        newest = _newest(examples, known)
        model.calibration_scale[task] = scale
        model.calibration_shift[task] = _shift_to(newest, task, logits, binary, scale)
    _derive_horizons(model, settled, binary)
    _fit_spend(model, logits, examples, spend.numpy())


def _newest(examples: Examples, known: np.ndarray) -> np.ndarray:
    """Which of the known rows are the newest, bool [n]. Only cut-offs, which every user has, if there are any."""
    at_cutoff = examples.kind == SnapshotKind.CUTOFF
    asked = known & at_cutoff if at_cutoff[known].any() else known
    return asked & (examples.as_of_ms >= np.quantile(examples.as_of_ms[asked], 1 - NEWEST_SHARE))


def _best(loss: list[float], users: int, expected: float = 0.5) -> float:
    penalised = np.array(loss) + _EXPECTED_WEIGHT * (_SHARES - expected) ** 2 / max(users, 1)
    return float(_SHARES[penalised.argmin()])


def _scale(logits: Tensor, truth: Tensor, users: int) -> float:
    """Platt's slope; few users leave it near 1."""
    fitted = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([fitted], max_iter=50, line_search_fn='strong_wolfe')
    z, y = logits.double(), truth.double()

    def closure() -> Tensor:
        solver.zero_grad()
        loss = (binary_cross_entropy_with_logits(fitted[0] * z + fitted[1], y)
                + _SCALE_WEIGHT * (fitted[0] - 1) ** 2 / max(users, 1))
        loss.backward()
        return loss

    solver.step(closure)
    return float(fitted[0].detach().clamp(0.2, 2.0))


def _shift_to(rows: np.ndarray, task: int, logits: Tensor, binary: Tensor, scale: float) -> float:
    """The shift at which the mean probability of these rows equals the share of positives, by bisection."""
    scaled = scale * logits[rows, task].double().numpy()
    rate = float(binary[rows, task].mean())
    low, high = -_SHIFT_MAX, _SHIFT_MAX
    for _ in range(40):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-(scaled + middle)))).mean() < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _settled(binary: Tensor) -> list[int]:
    """The horizons that enough rows settle. The shortest one always counts."""
    counts = (~binary[:, :HORIZONS].isnan()).sum(0).tolist()
    return [horizon for horizon, count in enumerate(counts) if horizon == 0 or count >= SETTLED_ROWS_MIN]


def _derive_horizons(model: ShopperModel, settled: list[int], binary: Tensor) -> None:
    """At a steady rate, the probability of a purchase within d days is 1 - (1 - p) ** (d / days of p). Real shoppers
    slow down: between the two longest settled horizons the power is below the ratio of days. The same damping is used
    for the horizons that are not settled."""
    longest = settled[-1]
    damping = 1.0
    if len(settled) > 1:
        shorter = settled[-2]
        both = ~binary[:, longest].isnan()
        rates = binary[both][:, [shorter, longest]].mean(0).clamp(1e-4, 1 - 1e-4).tolist()
        power = math.log1p(-rates[1]) / math.log1p(-rates[0])
        damping = math.log(max(power, 1.0)) / math.log(HORIZON_DAYS[longest] / HORIZON_DAYS[shorter])
    for horizon in range(HORIZONS):
        if horizon in settled:
            model.told_from[horizon], model.told_power[horizon] = horizon, 1.0
        else:
            model.told_from[horizon] = longest
            model.told_power[horizon] = (HORIZON_DAYS[horizon] / HORIZON_DAYS[longest]) ** damping


def _fit_spend(model: ShopperModel, logits: Tensor, examples: Examples, spend: np.ndarray) -> None:
    known = ~np.isnan(spend)
    model.log_spend_scale.zero_()
    if not (spend[known] > 0).any():
        return
    model.log_spend_max.fill_(math.log(spend[known].max()))
    newest = _newest(examples, known)
    for _ in range(3):      # the bound of a single spend needs a few rounds
        predicted = float(model.spend(Logits.of(logits[newest])).sum())
        spent = float(spend[newest].sum())
        if spent > 0:
            model.log_spend_scale += math.log(spent / predicted)
