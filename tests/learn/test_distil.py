"""Teachers are larger, have not seen who validates, and what they say moves the student."""
# ruff: noqa: E402  (the imports below need torch: skip first)
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn import fit as fitting
from stream.learn.backbones import BackboneOptions
from stream.learn.distil import DistilOptions, expected_losses, mean_logits, teacher_options
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
