"""Simple contenders that the model has to beat. All of them use what the worker knew at a moment: simple
rules, BG/NBD, regressions, boosted trees, a small network.

    purchase_contenders    fit(train, horizon) -> itself; predict(test) -> scores [n], more is likelier to buy
    spend_contenders       fit(train, horizon) -> itself; predict(test) -> expected spend within it [n]

`horizon` is an index into HORIZON_DAYS. Where `is_chance` is set, scores are chances and have a log loss; else they
only rank. Rows with an unknown label are not learnt from. Whatever is chosen or stopped early is so by its loss on a
fifth of the training users, so that no user is on both sides.

BG/NBD and Gamma-Gamma look at no label: they are fitted on the newest training row of each user who has ordered. To
compare on a segment that recency chooses, still train these two on all rows: the law does not hold within it.
"""
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from scipy.special import logit
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from stream.errors import UsageError
from stream.learn.dataset import HORIZON_DAYS, tier_of
from stream.learn.judging.bgnbd import BgNbd, GammaGamma
from stream.learn.judging.simple_rules import Table, past_tier, purchase_rules, spend_rules

VALIDATION_SHARE = 0.2
_TINY = 1e-6                # chances are kept so far from 0 and 1


class PurchaseContender(Protocol):
    """Scores for buying within a horizon. Errors of `fit`: UsageError where there is nothing to learn from."""

    is_chance: bool

    def fit(self, train: Table, horizon: int, /) -> Self: ...
    def predict(self, test: Table, /) -> np.ndarray: ...


class SpendContender(Protocol):
    """Expected spend within a horizon. Errors of `fit`: UsageError where there is nothing to learn from."""

    def fit(self, train: Table, horizon: int, /) -> Self: ...
    def predict(self, test: Table, /) -> np.ndarray: ...


def purchase_contenders(seed: int, threads: int = 1) -> dict[str, PurchaseContender]:
    """All of them, not yet fitted, by the name that a table shows. One thread: the same bytes on every run."""
    return {
        **purchase_rules(),
        'BG/NBD': BuyTillYouDie(),
        'logistic regression': Regression(seed),
        'PCA + logistic': Regression(seed, PCA(0.95, whiten=True, svd_solver='full')),
        'LDA + logistic': Regression(seed, LinearDiscriminantAnalysis()),
        'LightGBM': Trees(seed, threads),
        'MLP regression': Network(seed),
    }


def spend_contenders(seed: int, threads: int = 1) -> dict[str, SpendContender]:
    """All of them, not yet fitted, by the name that a table shows. One thread: the same bytes on every run."""
    return {
        **spend_rules(),
        'BG/NBD + Gamma-Gamma': BuyTillYouDieSpend(),
        'LightGBM': SpendTrees(seed, threads),
        'MLP regression': SpendNetwork(seed),
    }


# ---- buy till you die -----------------------------------------------------------------------------------------------

class BuyTillYouDie:
    """BG/NBD, and a logistic regression of the labels on its log odds, so that its probabilities fit this shop.

    The regression keeps the order of customers. Where no label of the horizon is known, or all are the same, the
    model's own chances are given. Whoever never ordered is no customer to the model: they get the share of training
    rows without an order that were followed by one, and 0 where there is no such row.
    """

    is_chance = True

    def fit(self, train: Table, horizon: int) -> Self:
        self.days = HORIZON_DAYS[horizon]
        self.model = _bg_nbd(train)
        known = train.take(~np.isnan(train.bought[:, horizon]))
        labels, ordered = known.bought[:, horizon], known.orders > 0
        self.without_order = float(labels[~ordered].mean()) if not ordered.all() else 0.0
        self.calibration = None
        if len(np.unique(labels[ordered])) == 2:
            calibration = LogisticRegression(C=1e6).fit(self._log_odds(known.take(ordered)), labels[ordered])
            self.calibration = calibration if calibration.coef_[0, 0] > 0 else None
        return self

    def predict(self, test: Table) -> np.ndarray:
        log_odds = self._log_odds(test)
        if self.calibration is None:
            chances = 1 / (1 + np.exp(-log_odds[:, 0]))
        else:
            chances = self.calibration.predict_proba(log_odds)[:, 1]
        return np.where(test.orders > 0, chances, self.without_order)

    def _log_odds(self, table: Table) -> np.ndarray:
        chances = self.model.buys_within(table.frequency, table.recency_days, table.age_days, self.days)
        return logit(np.clip(chances, _TINY, 1 - _TINY))[:, None]


class BuyTillYouDieSpend:
    """Expected orders by BG/NBD times expected order value by Gamma-Gamma. Uses no labels.

    Whoever never ordered gets the mean of what training rows without an order were followed by, 0 where there is none.
    """

    def fit(self, train: Table, horizon: int) -> Self:
        self.days = HORIZON_DAYS[horizon]
        self.model = _bg_nbd(train)
        customers = train.newest()
        self.values = GammaGamma.fit(customers.orders, customers.mean_order_value)
        after = train.spent[(train.orders == 0) & ~np.isnan(train.spent[:, horizon]), horizon]
        self.without_order = float(after.mean()) if len(after) else 0.0
        return self

    def predict(self, test: Table) -> np.ndarray:
        orders = self.model.orders_within(test.frequency, test.recency_days, test.age_days, self.days)
        return np.where(test.orders > 0, orders * self.values.value(test.orders, test.mean_order_value),
                        self.without_order)


def _bg_nbd(train: Table) -> BgNbd:
    customers = train.newest()
    customers = customers.take(customers.orders > 0)
    return BgNbd.fit(customers.frequency, customers.recency_days, customers.age_days)


# ---- learnt from the counters ---------------------------------------------------------------------------------------

class Regression:
    """Logistic regression on normalised counters, or on their components by PCA or LDA.

    Its inverse penalty is the one of PENALTIES with the lowest log loss on the validation users; then all users are
    learnt from.
    """

    is_chance = True
    PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

    def __init__(self, seed: int, components: PCA | LinearDiscriminantAnalysis | None = None) -> None:
        self.seed = seed
        self.components = components

    def fit(self, train: Table, horizon: int) -> Self:
        known = _labelled(train, horizon)
        self._learn(known.counters, known.bought[:, horizon], known.user)
        return self

    def predict(self, test: Table) -> np.ndarray:
        return self.pipeline.predict_proba(test.counters)[:, 1]

    def _learn(self, inputs: np.ndarray, labels: np.ndarray, user: np.ndarray) -> None:
        held_out = _validation(user, self.seed)
        losses = [_log_loss(self._pipeline(penalty).fit(inputs[~held_out], labels[~held_out]), inputs[held_out],
                            labels[held_out]) for penalty in self.PENALTIES]
        self.inverse_penalty = self.PENALTIES[int(np.argmin(losses))]
        self.pipeline = self._pipeline(self.inverse_penalty).fit(inputs, labels)

    def _pipeline(self, inverse_penalty: float) -> Pipeline:
        steps = [StandardScaler(), self.components, LogisticRegression(C=inverse_penalty, max_iter=1000)]
        return make_pipeline(*(step for step in steps if step is not None))


class TierRegression(Regression):
    """Multinomial logistic regression of the tier, on normalised counters and the tier of the last 90 days' spend.

    edges  between the tiers, see `stream.learn.dataset.tier_of`
    """

    PENALTIES = (1e-3, 1e-2, 1e-1)
    ROWS_MAX = 20_000       # five classes take five times as long

    def __init__(self, seed: int, edges: np.ndarray) -> None:
        super().__init__(seed)
        self.edges = edges

    def fit(self, train: Table, horizon: int) -> Self:
        known = _spent(train, horizon)
        if len(known) > self.ROWS_MAX:
            known = known.take(np.random.default_rng(self.seed).choice(len(known), self.ROWS_MAX, replace=False))
        tier = tier_of(known.spent[:, horizon], self.edges)
        if len(np.unique(tier)) < 2:
            raise UsageError('All training rows are of one tier.', do='use a longer recording or more users.')
        self._learn(self._inputs(known), tier, known.user)
        return self

    def predict(self, test: Table) -> np.ndarray:
        """Probabilities, float64 [n, tiers]."""
        chances = np.zeros((len(test), len(self.edges) + 2))
        chances[:, self.pipeline.classes_] = self.pipeline.predict_proba(self._inputs(test))
        return chances

    def _inputs(self, table: Table) -> np.ndarray:
        return np.column_stack([table.counters, past_tier(table, self.edges)])


def _lightgbm() -> Any:
    """Imported on demand: it loads the system's libgomp, which a bare machine lacks."""
    try:
        import lightgbm
    except OSError as error:
        raise UsageError(f'LightGBM cannot be loaded: {error}.',
                         do='install libgomp (Debian: apt-get install libgomp1).') from error
    return lightgbm


class _Boosting:
    """Gradient-boosted trees, stopped when the validation users' loss has not fallen for a while."""

    SETTINGS: ClassVar = {
        'learning_rate': 0.05, 'num_leaves': 15, 'min_data_in_leaf': 50, 'lambda_l2': 5.0, 'feature_fraction': 0.7,
        'bagging_fraction': 0.8, 'bagging_freq': 1, 'deterministic': True, 'force_row_wise': True, 'verbosity': -1}
    ROUNDS_MAX, PATIENCE = 600, 40

    def __init__(self, seed: int, threads: int) -> None:
        self.seed = seed
        self.threads = threads

    def _boost(self, counters: np.ndarray, labels: np.ndarray, user: np.ndarray, objective: str) -> None:
        held_out = _validation(user, self.seed)
        lightgbm = _lightgbm()
        fitted = lightgbm.Dataset(counters[~held_out], labels[~held_out])
        self.booster = lightgbm.train(
            self.SETTINGS | {'objective': objective, 'seed': self.seed, 'num_threads': self.threads}, fitted,
            self.ROUNDS_MAX, [lightgbm.Dataset(counters[held_out], labels[held_out], reference=fitted)],
            callbacks=[lightgbm.early_stopping(self.PATIENCE, verbose=False)])

    def predict(self, test: Table) -> np.ndarray:
        return np.maximum(self.booster.predict(test.counters, num_threads=self.threads), 0.0)


class Trees(_Boosting):
    """LightGBM on the counters, by log loss."""

    is_chance = True

    def fit(self, train: Table, horizon: int) -> Self:
        known = _labelled(train, horizon)
        self._boost(known.counters, known.bought[:, horizon], known.user, 'binary')
        return self


class SpendTrees(_Boosting):
    """LightGBM on the counters, by absolute error: it forecasts the median, which is 0 if most users buy nothing."""

    def fit(self, train: Table, horizon: int) -> Self:
        known = _spent(train, horizon)
        self._boost(known.counters, known.spent[:, horizon], known.user, 'l1')
        return self


class _Perceptron:
    """A network of one hidden layer by squared error, as of the pass with the lowest error on the validation users.

    Of the PENALTIES on its weights the one with the lowest such error is kept.

    penalty           of the kept network
    loss_curve        mean loss of each pass over the training users, its penalty included
    validation_curve  mean squared error of the validation users after each pass
    """

    HIDDEN = 32
    PENALTIES = (0.1, 10.0)
    PASSES_MAX, PATIENCE = 200, 6

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _learn(self, counters: np.ndarray, target: np.ndarray, user: np.ndarray) -> None:
        held_out = _validation(user, self.seed)
        self.scaler = StandardScaler().fit(counters)
        inputs = self.scaler.transform(counters)
        self.validation_curve = [np.inf]
        for penalty in self.PENALTIES:
            network = MLPRegressor(hidden_layer_sizes=(self.HIDDEN,), alpha=penalty, random_state=self.seed)
            errors: list[float] = []
            weights: tuple[list[np.ndarray], list[np.ndarray]] = [], []
            while len(errors) < self.PASSES_MAX and len(errors) - np.argmin([*errors, np.inf]) <= self.PATIENCE:
                network.partial_fit(inputs[~held_out], target[~held_out])
                errors.append(float(np.mean((network.predict(inputs[held_out]) - target[held_out]) ** 2)))
                if errors[-1] == min(errors):
                    weights = [part.copy() for part in network.coefs_], [part.copy() for part in network.intercepts_]
            if min(errors) < min(self.validation_curve):
                network.coefs_, network.intercepts_ = weights
                self.penalty, self.network = penalty, network
                self.loss_curve, self.validation_curve = network.loss_curve_, errors

    def _answer(self, table: Table) -> np.ndarray:
        return np.asarray(self.network.predict(self.scaler.transform(table.counters)), np.float64)


class Network(_Perceptron):
    """The network on 0 and 1. Its answers may lie outside 0 and 1, so they are not probabilities: they only rank."""

    is_chance = False

    def fit(self, train: Table, horizon: int) -> Self:
        known = _labelled(train, horizon)
        self._learn(known.counters, known.bought[:, horizon], known.user)
        return self

    def predict(self, test: Table) -> np.ndarray:
        return self._answer(test)


class SpendNetwork(_Perceptron):
    """The network on log(1 + spend)."""

    def fit(self, train: Table, horizon: int) -> Self:
        known = _spent(train, horizon)
        self._learn(known.counters, np.log1p(known.spent[:, horizon]), known.user)
        return self

    def predict(self, test: Table) -> np.ndarray:
        return np.maximum(np.expm1(self._answer(test)), 0.0)


# ---- what is learnt from --------------------------------------------------------------------------------------------

def _labelled(train: Table, horizon: int) -> Table:
    known = train.take(~np.isnan(train.bought[:, horizon]))
    if len(np.unique(known.bought[:, horizon])) < 2 or len(np.unique(known.user)) < 2:
        raise UsageError(
            f'The training rows do not hold both users who buy within {HORIZON_DAYS[horizon]} days and who do not.',
            do='use a longer recording or more users.')
    return known


def _spent(train: Table, horizon: int) -> Table:
    known = train.take(~np.isnan(train.spent[:, horizon]))
    if len(np.unique(known.user)) < 2:
        raise UsageError(f'Of fewer than two training users the spend of {HORIZON_DAYS[horizon]} days is known.',
                         do='use a longer recording or more users.')
    return known


def _validation(user: np.ndarray, seed: int) -> np.ndarray:
    """The rows of the held-out users. At least one user is held out, and at least one is not."""
    users = np.random.default_rng(seed).permutation(np.unique(user))
    return np.isin(user, users[:max(1, round(VALIDATION_SHARE * len(users)))])


def _log_loss(fitted: Pipeline, inputs: np.ndarray, labels: np.ndarray) -> float:
    """A class that it has never seen gets probability 0."""
    chances = (fitted.predict_proba(inputs) * (labels[:, None] == fitted.classes_)).sum(1)
    return float(-np.log(np.clip(chances, _TINY, 1 - _TINY)).mean())
