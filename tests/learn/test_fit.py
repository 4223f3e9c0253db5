"""A fit learns, is the same twice, and its calibration does what it says."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import io

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.features import COUNTERS
from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import UsageError
from stream.learn import calibrate, dataset
from stream.learn.backbones import EncoderOptions, EventsBackbone
from stream.learn.dataset import CHURN, HORIZON_DAYS, INTENT, tier_of
from stream.learn.fit import _fit_counters, fit, window_logits
from stream.learn.model import BINARY, HORIZONS, Logits, ShopperModel

LIMITS = WindowLimits()
TIERS = 5
LOGITS = BINARY + TIERS + 3


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope='module')
def fitted(history, tiny_fit):
    return fit(history, range(len(history.user_ids)), history.end_ms, tiny_fit(), LIMITS, quiet())


def test_the_loss_falls_and_the_best_epoch_is_kept(fitted):
    assert fitted.epochs[-1]['train'] < fitted.epochs[0]['train']
    assert fitted.epochs[fitted.best_epoch - 1]['validation'] == min(epoch['validation'] for epoch in fitted.epochs)


def test_twice_the_same(fitted, history, tiny_fit, two_threads):
    again = fit(history, range(len(history.user_ids)), history.end_ms, tiny_fit(), LIMITS, quiet())
    for name, tensor in fitted.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert torch.get_num_threads() == two_threads and not torch.are_deterministic_algorithms_enabled()


def test_the_mean_of_the_newest_settled_labels_comes_out(fitted):
    data, model = fitted.data, fitted.model
    with torch.no_grad():
        logits = (model.mix * window_logits(model, data, np.arange(len(data)))
                  + (1 - model.mix) * model.counters(torch.from_numpy(data.inputs.counters)))
        chances = (model.calibration_scale * logits[:, :BINARY] + model.calibration_shift).sigmoid().numpy()
    for horizon in (INTENT, CHURN):
        asked = ~np.isnan(data.labels.bought[:, horizon]) & (data.kind == dataset.SnapshotKind.CUTOFF)
        newest = asked & (data.as_of_ms >= np.quantile(data.as_of_ms[asked], 1 - calibrate.NEWEST_SHARE))
        assert 0 < newest.sum() < asked.sum()
        assert chances[newest, horizon].mean() == pytest.approx(data.labels.bought[newest, horizon].mean(), abs=1e-4)


@pytest.mark.parametrize('mu', [1, 6, 11])
def test_spend_is_learned_in_any_currency(tiny_fit, mu):
    """In pounds as in yen: the linear branch finds the mean of log spend and its deviation, whatever their size."""
    rng = np.random.default_rng(0)
    counters = rng.normal(size=(2000, COUNTERS)).astype(np.float32)
    spend = np.where(rng.random(2000) < 0.5, np.exp(mu + 0.5 * counters[:, 0] + 0.5 * rng.normal(size=2000)), 0)
    labels = (torch.zeros(2000, BINARY), torch.from_numpy((spend > 0).astype(np.int64)),
              torch.from_numpy(spend.astype(np.float32)))
    options = tiny_fit()
    model = ShopperModel(EventsBackbone(options.encoder), TIERS)
    model.counters.fit_normal(torch.from_numpy(counters))
    _fit_counters(model, torch.from_numpy(counters), labels, np.ones(2000, bool), options)
    with torch.no_grad():
        out = Logits.of(model.counters(torch.from_numpy(counters)))
    assert out.mu.mean() == pytest.approx(mu, abs=0.1) and out.sigma.median() == pytest.approx(0.5, abs=0.05)
    assert out.sigma.max() < 1.5
    assert np.corrcoef(out.mu, counters[:, 0])[0, 1] > 0.9


def test_tiers_by_edges():
    assert tier_of(np.array([0, 0.5, 10, 15, 20, 29, 30, 99, np.nan]), np.array([10, 20, 30])).tolist() == [
        0, 1, 2, 2, 3, 3, 4, 4, -1]


def test_edges_share_out_those_who_spend(fitted):
    spend = fitted.data.labels.spend
    counts = np.bincount(tier_of(spend[spend > 0], fitted.tier_edges), minlength=TIERS)[1:]
    assert counts.min() > 0.15 * counts.sum()


def test_the_phase_of_a_single_year_is_not_learned_from(fitted):
    from stream.core.features import COUNTER_NAMES
    off = [COUNTER_NAMES.index(name) for name in ('year_sin', 'year_cos')]
    assert (fitted.model.counters.scale[off] == 0).all()


@pytest.fixture
def examples(history):
    return dataset.sample(history, range(len(history.user_ids)), history.start_ms, history.end_ms,
                          dataset.ExampleOptions(30, 0.0), LIMITS, 1)


def calibrated(examples, window, counters, binary, held_out=None):
    model = ShopperModel(EventsBackbone(EncoderOptions(hidden=16, layers=1, heads=2)), TIERS)
    labels = binary, torch.full((len(examples),), -1), torch.full((len(examples),), float('nan'))
    calibrate.calibrate(model, window, counters, examples, labels,
                        np.ones(len(examples), bool) if held_out is None else held_out)
    return model


def test_the_branch_that_knows_more_gets_more(examples):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(len(examples), generator=generator) * 2
    binary = (torch.rand(len(examples), generator=generator) < truth.sigmoid()).float()[:, None].repeat(1, BINARY)
    knows = truth[:, None].repeat(1, LOGITS)
    noise = torch.randn(len(examples), LOGITS, generator=generator) * 2
    assert (calibrated(examples, knows, noise, binary).mix[:BINARY] >= 0.7).all()
    assert (calibrated(examples, noise, knows, binary).mix[:BINARY] <= 0.2).all()


def test_of_branches_alike_the_window_gets_more_where_there_were_more_answers(examples):
    """Half and half at most: a linear branch needs fewer answers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(len(examples), LOGITS)
    rates = torch.tensor([0.002, 0.01, 0.05, 0.2, 0.5, 0.95])
    binary = (torch.rand(len(examples), BINARY, generator=generator) < rates).float()
    held_out = np.arange(len(examples)) % 2 == 0
    mix = calibrated(examples, logits, logits, binary, held_out).mix[:BINARY]
    taught = binary[torch.from_numpy(~held_out)]
    answers = torch.minimum(taught.sum(0), (1 - taught).sum(0))
    assert (mix - 0.5 * answers / (answers + 1000)).abs().max() < 0.06
    assert mix[0] < mix[3] < 0.5


def test_what_is_not_settled_is_told_from_what_is(examples):
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.01, 0.05, 0.2, 0.4, float('nan'), 0.1])
    binary = (torch.rand(len(examples), BINARY, generator=generator) < rates).float()
    binary[:, HORIZONS - 1] = float('nan')
    logits = torch.zeros(len(examples), LOGITS)
    model = calibrated(examples, logits, logits, binary)
    assert model.told_from.tolist() == [0, 1, 2, 3, 3]
    power = np.log(1 - 0.4) / np.log(1 - 0.2)       # of 30 days to 90: less than 3, shoppers tire
    wanted = (HORIZON_DAYS[4] / HORIZON_DAYS[3]) ** (np.log(power) / np.log(3))
    assert model.told_power[4].item() == pytest.approx(wanted, rel=0.1)
    told = model.probabilities(logits[:1, :BINARY])[0]
    assert told[0] < told[1] < told[2] < told[3] < told[4]


def test_a_recording_too_short_for_90_days_teaches_spend_from_30(history, tiny_fit):
    until_ms = history.start_ms + 60 * DAY_MS
    early = history.before(until_ms)
    fitted = fit(early, range(len(early.user_ids)), until_ms, tiny_fit(epochs=1), LIMITS, quiet())
    soon = fitted.data.labels.spent[:, HORIZON_DAYS.index(30)]
    assert np.isnan(fitted.data.labels.spend).all() and (soon > 0).any()
    assert fitted.tier_edges[-1] == pytest.approx(3 * np.quantile(soon[soon > 0], 0.75), rel=0.4)


@pytest.mark.parametrize('case', ['nobody buys', 'one user'])
def test_nothing_to_learn_from_says_what_to_do(history, tiny_fit, case):
    if case == 'one user':
        users, of = [0], history
    else:
        of = dataset.history_of({user_id: [event for event in events if event.type != 12] for user_id, events
                                 in zip(history.user_ids, history.events, strict=True)})
        users = range(len(of.user_ids))
    with pytest.raises(UsageError, match='Do: '):
        fit(of, users, of.end_ms, tiny_fit(), LIMITS, quiet())
