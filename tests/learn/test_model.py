"""A row's scores depend on that row alone."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.core.features import COUNTER_NAMES, COUNTERS, SLOT_NUMBERS
from stream.learn.backbones import EncoderOptions, EventsBackbone
from stream.learn.dataset import CHURN, HORIZON_DAYS, INTENT
from stream.learn.model import BINARY, HORIZONS, INPUT_NAMES, Counters, Logits, ShopperModel, losses

TIERS = 5
LOGITS = BINARY + TIERS + 3


@pytest.fixture(scope='module', params=[False, True], ids=['no items', 'items'])
def model(request):
    torch.manual_seed(0)
    model = ShopperModel(EventsBackbone(EncoderOptions(items=request.param)), TIERS)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.log_spend_max.fill_(8.0)
    return model.eval()


def batch(rows: int, length: int, filled: list[int]) -> dict:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    categories = torch.randint(1, 15, (rows, length, 3), generator=generator, dtype=torch.int32)
    numbers = torch.rand((rows, length, SLOT_NUMBERS), generator=generator)
    for row, slots in enumerate(filled):
        categories[row, slots:] = 0
        numbers[row, slots:] = 0
    return {'categories': categories, 'numbers': numbers,
            'counters': torch.rand((rows, COUNTERS), generator=generator), 'row_id': torch.arange(rows)[:, None]}


def scores(model, parts) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in model(*(parts[name] for name in INPUT_NAMES))]


def test_padding_changes_nothing(model):
    short = batch(5, 8, [8, 5, 1, 3, 0])
    long = short | {name: torch.nn.functional.pad(short[name], (0, 0, 0, 8)) for name in ('categories', 'numbers')}
    for mine, theirs in zip(scores(model, short), scores(model, long), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_neighbours_change_nothing(model):
    parts = batch(6, 16, [16, 9, 2, 16, 7, 1])
    together = scores(model, parts)
    for row in range(6):
        alone = scores(model, {name: part[row:row + 1] for name, part in parts.items()})
        for mine, theirs in zip(alone, together, strict=True):
            np.testing.assert_allclose(mine, theirs[row:row + 1], rtol=1e-5, atol=1e-5)


def test_slots_and_counters_both_matter(model):
    parts = batch(4, 8, [8, 8, 8, 8])
    before = scores(model, parts)
    for name in ('categories', 'numbers', 'counters'):
        after = scores(model, parts | {name: parts[name].flip(0)})
        assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(before[:4], after[:4], strict=True)), name


def test_order_of_the_slots_matters(model):
    parts = batch(2, 8, [8, 8])
    flipped = parts | {name: parts[name].flip(1) for name in ('categories', 'numbers')}
    assert np.abs(scores(model, parts)[0] - scores(model, flipped)[0]).max() > 1e-5


def test_the_state_that_scores_is_the_last_one_of_all_states(model):
    parts = batch(5, 16, [16, 5, 1, 3, 0])
    with torch.no_grad():
        alone = model.backbone(parts['categories'], parts['numbers'])
        among = model.backbone.states(parts['categories'], parts['numbers'])[:, -1]
    torch.testing.assert_close(alone, among)


def test_a_slot_sees_only_what_came_before_it(model):
    parts = batch(1, 8, [8])
    other = {name: parts[name].clone() for name in ('categories', 'numbers')}
    other['categories'][:, 5:, 0] = 3
    other['numbers'][:, 5:] = 2.0
    with torch.no_grad():
        first, second = (model.backbone.states(part['categories'], part['numbers']) for part in (parts, other))
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, -1], second[:, -1])


def test_outputs_are_in_range_and_agree_even_for_absurd_counters(model):
    parts = batch(3, 8, [8, 4, 0])
    intent, tiers, spend, churn, row_id, purchase, typical, refund = scores(
        model, parts | {'counters': parts['counters'] * 1e6})
    assert intent.shape == spend.shape == churn.shape == row_id.shape == refund.shape == typical.shape == (3, 1)
    assert tiers.shape == (3, TIERS) and purchase.shape == (3, HORIZONS)
    for chance in (intent, churn, purchase, refund):
        assert ((chance >= 0) & (chance <= 1)).all()
    assert (np.diff(purchase) >= 0).all()       # a longer horizon is never less likely
    np.testing.assert_array_equal(intent[:, 0], purchase[:, INTENT])
    np.testing.assert_array_equal(churn[:, 0], 1 - purchase[:, CHURN])
    np.testing.assert_allclose(tiers.sum(1), 1, rtol=1e-5)
    for amount in (spend, typical):
        assert ((amount >= 0) & (amount <= np.exp(8.0) * 1.0001)).all()
    assert row_id[:, 0].tolist() == [0, 1, 2]


def test_a_horizon_that_nobody_settled_is_told_from_a_shorter_one():
    model = ShopperModel(EventsBackbone(EncoderOptions(hidden=16, layers=1, heads=2)), TIERS)
    model.told_from[-1], model.told_power[-1] = HORIZON_DAYS.index(90), 2.0
    chances = torch.tensor([0.01, 0.1, 0.2, 0.3, 0.9, 0.0])
    told = model.probabilities(chances.logit()[None])[0]
    assert told[-2].item() == pytest.approx(1 - 0.7**2)
    assert told[:4].tolist() == pytest.approx([0.01, 0.1, 0.2, 0.3])


def test_counters_are_normalised_cut_and_switched_off():
    branch = Counters(LOGITS)
    generator = torch.Generator().manual_seed(1)
    counters = torch.rand((500, COUNTERS), generator=generator) * 5
    counters[:, 3] = 2.0
    branch.fit_normal(counters, ['year_sin'])
    normal = branch.normal(counters)
    off = [3, COUNTER_NAMES.index('year_sin')]
    assert (normal[:, off] == 0).all()
    on = [column for column in range(COUNTERS) if column not in off]
    assert normal[:, on].mean(0).abs().max() < 1e-5
    assert (normal[:, on].std(0) - 1).abs().max() < 0.01
    assert branch.normal(counters + 1e6).max() == 6.0


def test_unsettled_labels_teach_nothing():
    logits = torch.randn(4, LOGITS, generator=torch.Generator().manual_seed(2), requires_grad=True)
    binary = torch.tensor([[0.0, 1, 1, 1, float('nan'), 0]] * 4)
    parts = losses(logits, binary, torch.tensor([2, -1, -1, -1]), torch.tensor([5.0, *[float('nan')] * 3]))
    sum(parts.values()).backward()
    gradient = logits.grad
    assert (gradient[:, HORIZONS - 1] == 0).all() and (gradient[:, 0] != 0).all()
    assert (gradient[1:, BINARY:] == 0).all() and (gradient[0, BINARY:] != 0).all()


def test_spend_loss_is_the_likelihood_of_a_zero_inflated_log_normal():
    spend = torch.tensor([0.0, 20.0])
    raw = torch.zeros(2, LOGITS)
    raw[:, -3:] = torch.tensor([[0.3, 2.0, 0.7], [-0.2, 2.5, 0.9]])
    out = Logits.of(raw)
    got = losses(raw, torch.zeros(2, BINARY), torch.zeros(2, dtype=torch.long), spend)['spend']
    chance = out.bought.sigmoid()
    density = torch.distributions.LogNormal(out.mu[1], out.sigma[1]).log_prob(spend[1])
    constant = spend[1].log() + 0.5 * np.log(2 * np.pi)
    wanted = -((1 - chance[0]).log() + chance[1].log() + density + constant) / 2
    assert got.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_typical_spend_is_the_median_of_those_who_buy_where_most_do(model):
    nothing, drawn = torch.zeros(2), torch.randn(100_001, generator=torch.Generator().manual_seed(4))
    mu, sigma = torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.5])
    likely, unlikely = (model.typical_spend(Logits(nothing, nothing, nothing, mu, sigma), torch.tensor([chance] * 2))
                        for chance in (0.51, 0.49))
    torch.testing.assert_close(likely, (mu + sigma * drawn[:, None]).exp().median(0).values, rtol=0.02, atol=0)
    assert (unlikely == 0).all()


def test_hidden_slots_cannot_be_seen(model):
    parts = batch(2, 8, [8, 8])
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    hidden[:, 3] = True
    other = {name: parts[name].clone() for name in ('categories', 'numbers')}
    other['categories'][:, 3, 0] = 5
    other['categories'][:, 3, 2] = 900
    other['numbers'][:, 3, 0] = 7.0
    with torch.no_grad():
        first, second = (model.backbone.states(part['categories'], part['numbers'], hidden) for part in (parts, other))
    torch.testing.assert_close(first[:, 3], second[:, 3])
