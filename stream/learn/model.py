"""The model: a backbone that reads the window beside a linear branch that reads the counters, mixed at the logit.

    categories, numbers -> backbone -> linear ---+
                                                 +-> mixed -> calibrated -> scores
    counters -> normalise -> linear -------------+

The inputs are `stream.core.features.Batch`; b rows, k logits. One exported graph holds all of it, calibration included.

    logits      k = horizons + 1 (refund) + tiers + 3 (any spend, and mean and deviation of its logarithm)
    mix         of each logit, the share of the window branch; the rest is the counters branch
    calibrated  sigmoid(scale * logit + shift) for each horizon, and for refunds

A horizon that the recording does not settle has not been learned. It is derived from the longest settled one, as
1 - (1 - p) ** power (see stream.learn.calibrate). A longer horizon is never less likely than a shorter one. Churn is
the complement of a purchase, so the two always agree.

Sources: Wang, Liu, Miao (2019), "A Deep Probabilistic Model for Customer Lifetime Value Prediction", arXiv 1912.07753,
for the zero-inflated log-normal spend. Platt (1999) for the calibration.
"""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from stream.core.features import COUNTER_NAMES, COUNTERS
from stream.learn.dataset import CHURN, HORIZON_DAYS, INTENT, SPEND

INPUT_NAMES = ('categories', 'numbers', 'counters', 'row_id')
HORIZONS = len(HORIZON_DAYS)
BINARY = HORIZONS + 1               # the horizons, and a refund
_SPEND = 3
_COUNTER_LIMIT = 6.0                # normalised counters are cut here: a user like nobody in training stays in range
_SIGMA_RANGE = (0.05, 3.0)


@dataclass(frozen=True)
class Logits:
    """The logits by meaning: binary [b, BINARY]; tier [b, tiers]; bought, mu, sigma [b]."""

    binary: Tensor
    tier: Tensor
    bought: Tensor      # log-odds of any spend
    mu: Tensor          # of log spend, where there is any
    sigma: Tensor

    @staticmethod
    def of(logits: Tensor) -> 'Logits':
        """From [b, k]."""
        tiers = int(logits.shape[1]) - BINARY - _SPEND      # a constant of the exported graph
        binary, tier, spend = logits.split((BINARY, tiers, _SPEND), -1)
        bought, mu, raw_sigma = spend.unbind(-1)
        return Logits(binary, tier, bought, mu, softplus(raw_sigma).clamp(*_SIGMA_RANGE))


def mu_and_sigma(log_spend: Tensor) -> Tensor:
    """The last two logits, [2], for which every row gets the mean and deviation of these values, [n]."""
    sigma = log_spend.std(unbiased=False).clamp(2 * _SIGMA_RANGE[0], _SIGMA_RANGE[1] / 2)
    return torch.stack([log_spend.mean(), sigma.expm1().log()])


class Backbone(nn.Module):
    """Reads a window: the base class of all backbones (stream.learn.backbones).

    width   units of the state that `forward` returns
    """

    width: int

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        """[b, width] from int [b, l, 3] and float [b, l, SLOT_NUMBERS] as in `stream.core.features.Batch`.

        Promise  a row's state depends neither on its padding nor on its neighbours.
        """
        raise NotImplementedError


class Counters(nn.Module):
    """The counters branch: normalised, then linear."""

    mean: Tensor
    scale: Tensor

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.head = nn.Linear(COUNTERS, logits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer('mean', torch.zeros(COUNTERS))
        self.register_buffer('scale', torch.ones(COUNTERS))     # 1 / standard deviation

    def fit_normal(self, counters: Tensor, ignored: Iterable[str] = ()) -> None:
        """Take means and deviations of the training rows, [n, COUNTERS]. Counters that are constant there are switched
        off, since their weights would learn nothing reliable. So are those in `ignored`."""
        deviation = counters.std(0, unbiased=False)
        self.mean.copy_(counters.mean(0))
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0))
        self.scale[[COUNTER_NAMES.index(name) for name in ignored]] = 0.0

    def normal(self, counters: Tensor) -> Tensor:
        """[b, COUNTERS], each around 0."""
        return ((counters - self.mean) * self.scale).clamp(-_COUNTER_LIMIT, _COUNTER_LIMIT)

    def forward(self, counters: Tensor) -> Tensor:
        """[b, k]"""
        return self.head(self.normal(counters))


class ShopperModel(nn.Module):
    """Batch in, scores out: see `forward`."""

    mix: Tensor
    calibration_scale: Tensor
    calibration_shift: Tensor
    told_from: Tensor
    told_power: Tensor
    log_spend_max: Tensor
    log_spend_scale: Tensor

    def __init__(self, backbone: Backbone, tiers: int, refund: bool = True) -> None:
        super().__init__()
        self.tiers = tiers
        self.refund = refund        # has the refund head; else its logit stays untrained and is no output
        k = BINARY + tiers + _SPEND
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, k)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.counters = Counters(k)
        self.register_buffer('mix', torch.full((k,), 0.5))
        self.register_buffer('calibration_scale', torch.ones(BINARY))
        self.register_buffer('calibration_shift', torch.zeros(BINARY))
        self.register_buffer('told_from', torch.arange(HORIZONS))       # itself, or the longest settled horizon
        self.register_buffer('told_power', torch.ones(HORIZONS))
        self.register_buffer('log_spend_max', torch.tensor(20.0))
        self.register_buffer('log_spend_scale', torch.tensor(0.0))

    def window_logits(self, categories: Tensor, numbers: Tensor) -> Tensor:
        """Logits of the window branch, [b, k]."""
        return self.head(self.backbone(categories, numbers))

    def logits(self, categories: Tensor, numbers: Tensor, counters: Tensor) -> Tensor:
        """Logits of both branches, mixed, [b, k]."""
        return self.mixed(self.window_logits(categories, numbers), self.counters(counters))

    def mixed(self, by_window: Tensor, by_counters: Tensor) -> Tensor:
        """The logits of the branches, [b, k] each, mixed by `mix`."""
        return self.mix * by_window + (1 - self.mix) * by_counters

    def probabilities(self, binary: Tensor) -> Tensor:
        """Calibrated probabilities of a purchase within each horizon, and of a refund, [b, BINARY]."""
        calibrated = self.calibration_scale * binary + self.calibration_shift
        # 1 - (1 - p) ** power from the logit: from p, a power of some hundreds would make its last digit visible.
        told = 1 - torch.exp(-self.told_power * softplus(calibrated[:, :HORIZONS].index_select(1, self.told_from)))
        bought, so_far = [], torch.zeros_like(told[:, 0])
        for horizon in range(HORIZONS):
            so_far = torch.maximum(so_far, told[:, horizon])
            bought.append(so_far)
        return torch.stack([*bought, calibrated[:, HORIZONS].sigmoid()], 1)

    def spend(self, out: Logits) -> Tensor:
        """Expected spend, [b], in the configured currency: the probability of any spend times the mean of the
        log-normal, which is calibrated and capped at the largest spend of the training rows."""
        log_mean = torch.minimum(out.mu + out.sigma**2 / 2 + self.log_spend_scale, self.log_spend_max)
        return out.bought.sigmoid() * log_mean.exp()

    def typical_spend(self, out: Logits, bought: Tensor) -> Tensor:
        """Median spend of such users, if they buy, [b]; 0 if a purchase is less likely than not. Its error is below
        that of the expected spend, since a few large spenders move it little. `bought` [b]: the probability of a
        purchase within the days of the spend."""
        return torch.where(bought > 0.5, torch.minimum(out.mu, self.log_spend_max).exp(), 0.0)

    def forward(self, categories: Tensor, numbers: Tensor, counters: Tensor, row_id: Tensor) -> tuple[Tensor, ...]:
        """A batch's scores, in the order of `stream.learn.graph.outputs`: intent [b, 1], tiers [b, tiers], spend
        [b, 1], churn [b, 1], row ids [b, 1], purchase within each horizon [b, HORIZONS], typical spend [b, 1], and
        refund [b, 1] where there is a risk head."""
        out = Logits.of(self.logits(categories, numbers, counters))
        chances = self.probabilities(out.binary)
        return (chances[:, INTENT, None], out.tier.softmax(-1), self.spend(out)[:, None],
                1 - chances[:, CHURN, None], row_id.clone(), chances[:, :HORIZONS],
                self.typical_spend(out, chances[:, SPEND])[:, None], *([chances[:, HORIZONS:]] if self.refund else []))


def losses(logits: Tensor, binary: Tensor, tier: Tensor, spend: Tensor) -> dict[str, Tensor]:
    """The mean loss of each task over a batch, in nats.

    binary   float [b, BINARY], tier int [b], spend float [b]; a label that is not settled is NaN, a tier -1
    The mean is over all rows, settled or not: a horizon that few rows settle moves the model little.
    Spend is the negative log-likelihood of a zero-inflated log-normal, less the terms that the model cannot change.
    """
    out, rows = Logits.of(logits), len(logits)
    by_task = binary_cross_entropy_with_logits(out.binary, binary.nan_to_num(), reduction='none')
    by_task = torch.where(binary.isnan(), 0.0, by_task).sum(0) / rows
    known = ~spend.isnan()
    amount = torch.where(known, spend, 0.0)
    positive = amount > 0
    z = (torch.where(positive, amount, 1.0).log() - out.mu) / out.sigma
    any_spend = binary_cross_entropy_with_logits(out.bought, positive.float(), reduction='none')
    log_normal = torch.where(positive, out.sigma.log() + z**2 / 2, 0.0)
    return {
        'purchase': by_task[:HORIZONS].sum(),
        'refund': by_task[HORIZONS],
        'tier': cross_entropy(out.tier, tier, ignore_index=-1, reduction='sum') / rows,
        'spend': torch.where(known, any_spend + log_normal, 0.0).sum() / rows,
    }
