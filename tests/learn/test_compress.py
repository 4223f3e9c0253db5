"""Teachers are larger, have not seen the validation users, and move the student. Removed heads are really gone."""
# ruff: noqa: E402  (the imports below need torch: skip first)
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console
from torch import nn

from stream.core.features import SLOT_NUMBERS
from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn import fit as fitting
from stream.learn.backbones import BackboneOptions, EncoderOptions, EventsBackbone
from stream.learn.checkpoint import Checkpoint, load, save, some_training_windows, some_windows
from stream.learn.compress import (
    DistilOptions,
    attentions,
    cut,
    cut_as,
    expected_losses,
    importance,
    kept_heads,
    mean_logits,
    teacher_options,
)
from stream.learn.fit import fit
from stream.learn.model import BINARY, HORIZONS, losses

LOGITS = BINARY + 5 + 3


def settled(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, BINARY), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)


def logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn((rows, LOGITS), generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_loss_over_labels_that_the_teacher_draws():
    """Of 200,000 labels that come true as the teacher says."""
    mine, theirs, draws = logits(1, 1), logits(1, 2), 200_000
    rng = np.random.default_rng(3)
    spread = torch.nn.functional.softplus(theirs[0, -1]).clamp(0.05, 3.0).item()
    binary = (rng.random((draws, BINARY)) < theirs[0, :BINARY].sigmoid().numpy()).astype(np.float32)
    tier = rng.choice(5, draws, p=theirs[0, BINARY:BINARY + 5].double().softmax(-1).numpy())
    spend = np.where(rng.random(draws) < theirs[0, -3].sigmoid().item(),
                     np.exp(rng.normal(theirs[0, -2].item(), spread, draws)), 0.0).astype(np.float32)
    drawn = losses(mine.expand(draws, -1), torch.from_numpy(binary), torch.from_numpy(tier), torch.from_numpy(spend))
    for task, expected in expected_losses(mine, theirs, *settled(1)).items():
        assert float(expected) == pytest.approx(float(drawn[task]), rel=0.02), task


def test_it_is_least_where_the_student_says_the_same():
    theirs = logits(7, 1)
    same = theirs.clone().requires_grad_()
    torch.stack(list(expected_losses(same, theirs, *settled(7)).values())).sum().backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(theirs), atol=1e-6, rtol=0)


def test_what_is_not_settled_teaches_nothing():
    binary, tier, spend = settled(2)
    binary[1], tier[1], spend[1] = torch.nan, -1, torch.nan
    mine = logits(2, 1).requires_grad_()
    torch.stack(list(expected_losses(mine, logits(2, 2), binary, tier, spend).values())).sum().backward()
    assert mine.grad[0].abs().min() > 0 and not mine.grad[1].any()


def test_teachers_speak_with_one_voice():
    torch.testing.assert_close(mean_logits([logits(3, 1), logits(3, 2)]), (logits(3, 1) + logits(3, 2)) / 2)


def test_teachers_are_larger_and_differ_in_their_seeds(tiny_fit):
    student = tiny_fit(distil=DistilOptions(2), heads_kept=0.5)
    first, second = (teacher_options(student, place) for place in range(2))
    assert first.encoder.hidden > student.encoder.hidden and first.encoder.layers > student.encoder.layers
    assert first.encoder.hidden % first.encoder.heads == 0
    assert len({student.seed, first.seed, second.seed}) == 3
    assert first.distil.teachers == 0 and first.heads_kept == 1.0
    told = teacher_options(tiny_fit(distil=DistilOptions(1, wider=2.0, deeper=0)), 0).encoder
    assert told == replace(student.encoder, hidden=32, intermediate=64)


def test_a_pretrained_student_is_refused(tiny_fit):
    student = tiny_fit(distil=DistilOptions(1), backbone=BackboneOptions('bert', 'somewhere'))
    with pytest.raises(UsageError, match='bert'):
        teacher_options(student, 0)


def test_students_learn_from_teachers_who_have_not_seen_who_validates(history, tiny_fit, monkeypatch):
    """Teachers who think everybody buys: the student comes to think so too, though its labels say otherwise."""
    seen = []
    monkeypatch.setattr(fitting, 'fit', lambda *arguments, **named: seen.append(fit(*arguments, **named)) or seen[-1])
    monkeypatch.setattr(fitting, 'mean_logits', lambda taught: mean_logits(taught) + 3.0)
    options = tiny_fit(epochs=2, distil=DistilOptions(2, weight=0.9))
    users = list(range(60))
    student, by_itself = (fit(history, users, history.end_ms + 1, chosen, WindowLimits(), Console(quiet=True))
                          for chosen in (options, replace(options, distil=DistilOptions())))
    held = {user for user in users if fitting.part_of(history.user_ids[user], (options.validation_share,),
                                                      options.seed) == 0}
    assert len(seen) == 2 and held
    for teacher in seen:
        assert not held & set(teacher.data.user.tolist())
        assert teacher.model.backbone.width > student.model.backbone.width
    told, untold = (fitting.window_logits(model, student.data, np.arange(len(student.data)))[:, :HORIZONS].mean()
                    for model in (student.model, by_itself.model))
    assert told > untold + 0.3


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
