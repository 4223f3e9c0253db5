"""Heads that are cut out are gone from the weights, and those that matter stay."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console
from torch import nn

from stream.core.features import SLOT_NUMBERS
from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn.backbones import EncoderOptions, EventsBackbone
from stream.learn.checkpoint import Checkpoint, load, save, some_training_windows, some_windows
from stream.learn.fit import fit
from stream.learn.prune import attentions, cut, cut_as, importance, kept_heads


@pytest.fixture
def backbone() -> EventsBackbone:
    torch.manual_seed(1)
    made = EventsBackbone(EncoderOptions(hidden=16, layers=2, heads=4, intermediate=32))
    for weight in made.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return made.eval()


def some_slots() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return (torch.randint(1, 15, (6, 8, 3), generator=draw, dtype=torch.int32),
            torch.rand((6, 8, SLOT_NUMBERS), generator=draw))


def no_batches():
    raise RuntimeError('no more batches')
    yield


def silence(backbone: EventsBackbone, layer: int, head: int) -> None:
    """What this head says comes to nothing."""
    attention = list(attentions(backbone).values())[layer]
    units = attention.self.attention_head_size
    with torch.no_grad():
        attention.output.dense.weight[:, head * units:(head + 1) * units] = 0


def test_without_heads_that_say_nothing_all_is_as_before(backbone):
    for layer, head in ((0, 2), (1, 0), (1, 3)):
        silence(backbone, layer, head)
    inputs = some_slots()
    with torch.no_grad():
        before, states = backbone(*inputs), backbone.states(*inputs)
        weights = sum(weight.numel() for weight in backbone.parameters())
        cut(backbone, [[0, 1, 3], [1, 2]])
        torch.testing.assert_close(backbone(*inputs), before)
        torch.testing.assert_close(backbone.states(*inputs), states)
    assert weights - sum(weight.numel() for weight in backbone.parameters()) == 3 * (4 * 16 * 4 + 3 * 4)


def test_the_gradient_finds_the_heads_that_say_something(backbone):
    for layer, head in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        silence(backbone, layer, head)
    scores = importance(backbone, (backbone(*some_slots()).square().mean() for _ in range(2)))
    assert [(score > 0).tolist() for score in scores] == [[True, False, False, False], [False, False, True, True]]
    assert kept_heads(scores, 3 / 8) == [[0], [2, 3]]


def test_the_gates_are_gone_afterwards(backbone):
    with pytest.raises(RuntimeError, match='no more batches'):
        importance(backbone, no_batches())
    assert not any(layer.output.dense._forward_pre_hooks for layer in attentions(backbone).values())


def test_the_best_heads_stay_and_one_of_each_layer_at_least():
    scores = [torch.tensor([0.1, 0.2]), torch.tensor([5.0, 4.0]), torch.tensor([3.0, 0.3])]
    assert kept_heads(scores, 1.0) == [[0, 1], [0, 1], [0, 1]]
    assert kept_heads(scores, 0.67) == [[1], [0, 1], [0]]
    assert kept_heads(scores, 0.01) == [[1], [0], [0]]


def test_a_backbone_without_heads_is_refused():
    with pytest.raises(UsageError, match='heads'):
        attentions(nn.Linear(2, 2))


def test_as_many_heads_as_the_weights_have(backbone):
    cut(backbone, [[0], [1, 3]])
    fresh = EventsBackbone(EncoderOptions(hidden=16, layers=2, heads=4, intermediate=32)).eval()
    whole = [attention.self.num_attention_heads for attention in attentions(fresh).values()]
    cut_as(fresh, fresh.state_dict())
    assert [attention.self.num_attention_heads for attention in attentions(fresh).values()] == whole == [4, 4]
    cut_as(fresh, backbone.state_dict())
    fresh.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(*some_slots()), backbone(*some_slots()))


def test_a_pruned_model_is_fitted_saved_and_read(history, tiny_fit, tmp_path, checkpoint):
    options = tiny_fit(epochs=1, heads_kept=0.5)
    fitted = fit(history, range(60), history.end_ms + 1, options, WindowLimits(), Console(quiet=True))
    layer, = attentions(fitted.model.backbone).values()
    assert layer.self.num_attention_heads == 1
    kept = load(checkpoint)
    save(Checkpoint(fitted.model, kept.config, kept.metrics, some_windows(fitted.data),
                    some_training_windows(fitted.data, 1)), tmp_path)
    again = load(tmp_path)
    for name, weight in fitted.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name], weight)
