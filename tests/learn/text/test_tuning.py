"""Only what the tuning names moves, and it learns. That it is served: tests/learn/test_backbones.py."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import re

import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.events import EventRules
from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn import fit as fit_module
from stream.learn.backbones import BackboneOptions, EncoderOptions, make_backbone
from stream.learn.dataset import ExampleOptions, read
from stream.learn.fit import FitOptions, fit
from stream.learn.model import ShopperModel
from stream.learn.text.readers import TEXT_BACKBONES, load_text_backbone
from stream.learn.text.tuning import PREFIX_BACKBONES, PREFIX_TOKENS, merged, pretrained, tune
from tests.learn.pretrained import save_tiny, windows

# Of the weights' names, those that move; and one in which BERT's keys have a bias, which attention cancels out.
MOVES = {
    'full': '.*',
    'frozen': '(?!)',
    'lora': r'.*\.lora_[AB]\..*',
    'ia3': r'.*\.ia3_l\..*',
    'prefix': r'prompt_encoder\..*',
    'freeze:embeddings,layers=1': {
        'bert': r'encoder\.layer\.1\..*', 'distilbert': r'transformer\.layer\.1\..*',
        't5': r'encoder\.(block\.1\.|final_layer_norm).*', 'gpt2': r'(h\.1\.|ln_f).*'},
    'freeze:layers=2': {
        'bert': r'embeddings\..*', 'distilbert': r'embeddings\..*',
        't5': r'shared\..*|encoder\.(embed_tokens|final_layer_norm).*', 'gpt2': r'(wte|wpe|ln_f).*'},
}
CANCELLED = re.compile(r'.*\.(key|k_lin)\.bias')
CASES = [(name, tuning) for tuning in MOVES for name in TEXT_BACKBONES
         if tuning != 'prefix' or name in PREFIX_BACKBONES]
RATES = {'full': 1e-2, 'lora': 3e-2, 'ia3': 3e-1, 'prefix': 3e-1, 'freeze': 1e-2}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    # Without dropout a loss that falls has been learned: it is the same in every pass where nothing moves.
    return {name: str(save_tiny(name, tmp_path_factory.mktemp(name), positions=64, dropout=0.0))
            for name in TEXT_BACKBONES}


@pytest.fixture(scope='module')
def history(lines):
    whole = read(lines, EventRules())
    return whole.before(whole.start_ms + 100 * 86_400_000)


def weights(backbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.reader.named_parameters()}


def moved(backbone, scale: float) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in pretrained(backbone):
            if weight.requires_grad:
                weight += scale * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize(('name', 'tuning'), CASES)
def test_what_is_tuned_moves_and_learns(name, tuning, folders, history, monkeypatch):
    before = []

    def with_loud_head(*options):
        made = ShopperModel(*options)
        made.head.weight.data *= 50
        before.append(weights(made.backbone))
        return made

    # Where a backbone moves the head stands still, so that what is learned is the backbone's; and it is loud, so that
    # there is something to learn. The counters, which would take the longest, have no part in it.
    monkeypatch.setattr(fit_module, 'ShopperModel', with_loud_head)
    monkeypatch.setattr(fit_module, '_fit_counters', lambda *_: None)
    fitted = fit(history, range(20), history.end_ms, FitOptions(
        examples=ExampleOptions(2, 1.0), validation_share=0.3, epochs=3, rows_per_epoch=10_000, batch_rows=12,
        learning_rate=0.05 if tuning == 'frozen' else 0.0,
        backbone=BackboneOptions(name, folders[name], tuning, RATES.get(tuning.partition(':')[0]))),
        WindowLimits(), Console(quiet=True))
    losses = [epoch['train'] for epoch in fitted.epochs]
    assert losses[-1] < 0.95 * losses[0], losses

    after = weights(fitted.model.backbone)
    expected = MOVES[tuning] if isinstance(MOVES[tuning], str) else MOVES[tuning][name]
    for weight, tensor in after.items():
        if not CANCELLED.fullmatch(weight):
            assert torch.equal(tensor, before[0][weight]) != bool(re.fullmatch(expected, weight)), weight
    assert any(re.fullmatch(expected, weight) for weight in after) == (tuning != 'frozen')
    assert not any(part in weight for weight in merged(fitted.model).state_dict() for part in ('lora_', 'ia3_'))


@pytest.mark.parametrize('name', TEXT_BACKBONES)
def test_merging_leaves_the_model_and_its_scores(name, folders):
    parts = windows([8, 3, 0], 8)
    torch.manual_seed(7)
    for tuning in ('lora', 'ia3'):
        backbone, _ = load_text_backbone(name, folders[name], {})
        tune(backbone, tuning)
        moved(backbone, 0.2)
        model = torch.nn.Sequential()
        model.add_module('backbone', backbone.eval())
        before = weights(backbone)
        with torch.no_grad():
            wanted = backbone(*parts)
            got = merged(model).backbone(*parts)
            plain = load_text_backbone(name, folders[name], {})[0].eval()(*parts)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert (plain - wanted).abs().max() > 1e-4      # ten times what is allowed above
        assert all(torch.equal(tensor, before[weight]) for weight, tensor in weights(backbone).items())


def test_nothing_to_merge_is_no_copy(folders):
    backbone = make_backbone(BackboneOptions(), EncoderOptions(hidden=8, layers=1, heads=2, intermediate=8))
    assert merged(backbone) is backbone
    for tuning in ('full', 'prefix'):
        backbone = make_backbone(BackboneOptions('bert', folders['bert'], tuning), EncoderOptions())
        assert merged(backbone) is backbone


@pytest.mark.parametrize('name', PREFIX_BACKBONES)
def test_a_prefix_is_seen_and_leaves_room_for_itself(name, folders):
    backbone = load_text_backbone(name, folders[name], {})[0].eval()
    room = backbone.tokens_max
    categories, numbers = windows([64, 64, 2], 64)      # longer than the model's input
    tune(backbone, 'prefix')
    assert backbone.tokens_max == room - PREFIX_TOKENS
    with torch.no_grad():
        first = backbone(categories, numbers)
        moved(backbone, 1.0)
        second = backbone(categories, numbers)
        alone = backbone(categories[2:, :2], numbers[2:, :2])
    assert ((first - second).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(alone, second[2:], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_tuned_says_so(folders):
    for name in ('distilbert', 't5'):
        with pytest.raises(UsageError, match=f'prefix cannot be put before a {name}'):
            make_backbone(BackboneOptions(name, folders[name], 'prefix'), EncoderOptions())
    for tuning in ('', 'freeze', 'freeze:', 'freeze:heads', 'freeze:layers=0', 'freeze:layers=1,', 'embeddings',
                   'qlora'):
        with pytest.raises(UsageError, match='not a way to tune'):
            make_backbone(BackboneOptions('bert', folders['bert'], tuning), EncoderOptions())
    with pytest.raises(UsageError, match='has 2 layers, not 3'):
        make_backbone(BackboneOptions('gpt2', folders['gpt2'], 'freeze:layers=3'), EncoderOptions())
    with pytest.raises(UsageError, match='no backbone'):
        make_backbone(BackboneOptions('lstm', folders['bert']), EncoderOptions())
    with pytest.raises(UsageError, match='t5 is pretrained'):
        make_backbone(BackboneOptions('t5'), EncoderOptions())
    for options in (BackboneOptions(tuning='lora'), BackboneOptions(source=folders['bert'])):
        with pytest.raises(UsageError, match='events is not pretrained'):
            make_backbone(options, EncoderOptions())
