"""A row's scores depend on that row alone."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.core.features import COUNTERS, SLOT_NUMBERS
from stream.learn.model import INPUT_NAMES, Logits, ModelOptions, ShopperModel, losses


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = ShopperModel(ModelOptions())
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


def test_outputs_are_in_range_even_for_absurd_counters(model):
    parts = batch(3, 8, [8, 4, 0])
    intent, tiers, spend, churn, row_id = scores(model, parts | {'counters': parts['counters'] * 1e6})
    assert intent.shape == spend.shape == churn.shape == row_id.shape == (3, 1) and tiers.shape == (3, 5)
    assert ((intent >= 0) & (intent <= 1) & (churn >= 0) & (churn <= 1)).all()
    np.testing.assert_allclose(tiers.sum(1), 1, rtol=1e-5)
    assert ((spend >= 0) & (spend <= np.exp(8.0) * 1.0001)).all()
    assert row_id[:, 0].tolist() == [0, 1, 2]


def test_averages_are_where_training_starts():
    model = ShopperModel(ModelOptions())
    for layer in (model.from_slots, model.from_counters, model.counter_mlp[-1]):
        torch.nn.init.zeros_(layer.weight)
    rng = torch.Generator().manual_seed(1)
    n = 4000
    counters = torch.rand((n, COUNTERS), generator=rng) * 5
    counters[:, 3] = 0.0
    intent, churn = ((torch.rand(n, generator=rng) < share).float() for share in (0.3, 0.6))
    spend = torch.where(torch.rand(n, generator=rng) < 0.5, torch.exp(torch.randn(n, generator=rng) + 4), 0.0)
    tier = torch.where(spend > 0, 1 + torch.arange(n) % 4, 0)
    model.fit_averages(counters, intent, churn, spend, tier)
    got_intent, tiers, _, got_churn, _ = scores(model.eval(), batch(1, 8, [8]))
    assert got_intent[0, 0] == pytest.approx(intent.mean().item(), abs=1e-4)
    assert got_churn[0, 0] == pytest.approx(churn.mean().item(), abs=1e-4)
    np.testing.assert_allclose(tiers[0], np.bincount(tier.numpy()) / n, atol=1e-4)
    assert model.counter_scale[3] == 0      # never changed in training: switched off
    out = model.logits(*(batch(1, 8, [8])[name] for name in INPUT_NAMES[:3]))
    assert out.mu.item() == pytest.approx(4, abs=0.1) and out.sigma.item() == pytest.approx(1, abs=0.1)


def test_spend_loss_is_the_likelihood_of_a_zero_inflated_log_normal():
    spend = torch.tensor([0.0, 20.0])
    out = Logits(*(torch.zeros(2) for _ in range(2)), torch.zeros(2, 5), torch.tensor([0.3, -0.2]),
                 torch.tensor([2.0, 2.5]), torch.tensor([0.7, 0.9]))
    got = losses(out, torch.zeros(2), torch.zeros(2), spend, torch.zeros(2, dtype=torch.long))['spend']
    chance = out.bought.sigmoid()
    density = torch.distributions.LogNormal(out.mu[1], out.sigma[1]).log_prob(spend[1])
    constant = spend[1].log() + 0.5 * np.log(2 * np.pi)
    wanted = -((1 - chance[0]).log() + chance[1].log() + density + constant) / 2
    assert got.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_hidden_slots_cannot_be_seen():
    torch.manual_seed(0)
    model = ShopperModel(ModelOptions()).eval()
    parts = batch(2, 8, [8, 8])
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    hidden[:, 3] = True
    other = {name: parts[name].clone() for name in ('categories', 'numbers')}
    other['categories'][:, 3, 0] = 5
    other['categories'][:, 3, 2] = 900
    other['numbers'][:, 3] = 7.0
    with torch.no_grad():
        first = model.slot_guesses(parts['categories'], parts['numbers'], hidden)
        second = model.slot_guesses(other['categories'], other['numbers'], hidden)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
