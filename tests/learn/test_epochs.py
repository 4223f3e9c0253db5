"""Passes keep the best weights, stop in time, and go on after a cut as if there had been none."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import io
import sys
from contextlib import nullcontext

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.layout import WindowLimits
from stream.errors import StateError, UsageError
from stream.learn import epochs
from stream.learn.epochs import Run, device, mixed_precision, run_epochs
from stream.learn.fit import fit
from stream.learn.pretrain import PretrainOptions
from stream.learn.training_log import TrainingLog


class Cut(Exception):       # noqa: N818 (an event rather than a mistake)
    """The end of a training that nobody asked for."""


class CutAt(Console):
    """Cuts the training off where it says something that starts like this."""

    def __init__(self, words: str) -> None:
        super().__init__(file=io.StringIO())
        self.words = words

    def print(self, text: str = '', *args, **kwargs) -> None:
        if text.strip().startswith(self.words):
            raise Cut


def quiet() -> Console:
    return Console(file=io.StringIO())


def run(validations: list[float], **changes) -> tuple[torch.nn.Linear, Run]:
    """One weight pulled towards 10, one step an epoch, and validation losses as given."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    told = iter(validations)
    return module, Run(**{
        'name': 'toy', 'title': 'pass', 'module': module, 'weights': [(0.5, 0.0, list(module.parameters()))],
        'batches': lambda rng: [np.arange(2)], 'loss': lambda rows: (module.weight - 10).square().mean(),
        'validate': lambda: {'validation': next(told), 'weight': module.weight.item()}, 'epochs': 6, 'steps': 6,
        'warmup_share': 0.0, 'clip_norm': 1.0, 'patience': 2, 'seed': 1} | changes)


def test_the_best_epoch_is_kept_and_the_third_worse_one_is_not_run():
    module, toy = run([3.0, 2.0, 2.5, 2.6, 0.1])
    epochs, best_epoch = run_epochs(toy, TrainingLog(), quiet())
    assert (len(epochs), best_epoch) == (4, 2)
    assert module.weight.item() == pytest.approx(epochs[1]['weight']) != epochs[3]['weight']
    assert [epoch['validation'] for epoch in epochs] == [3.0, 2.0, 2.5, 2.6]


def test_rates_rise_and_fall():
    _, toy = run([6, 5, 4, 3, 2, 1], warmup_share=0.5)
    epochs, _ = run_epochs(toy, TrainingLog(), quiet())
    steps = np.diff([0, *(epoch['weight'] for epoch in epochs)])
    assert steps[:3] == pytest.approx([0.5 / 3, 1 / 3, 0.5], rel=0.01)      # Adam's first steps are as long as the rate
    assert steps[3] > steps[4] > steps[5] > 0


# ---- cut off and gone on --------------------------------------------------------------------------------------------

def small(tiny_fit):
    return tiny_fit(epochs=3, pretrain=PretrainOptions({'masked': 1.0}, epochs=2, rows_per_epoch=200, batch_rows=32))


@pytest.fixture(scope='module')
def whole(history, tiny_fit):
    return fit(history, range(len(history.user_ids)), history.end_ms, small(tiny_fit), WindowLimits(), quiet())


@pytest.mark.parametrize('words', ['pretraining 1/2', 'pretraining 2/2', 'epoch 2/3', 'epoch 3/3'])
def test_gone_on_after_a_cut_is_as_without_it(history, tiny_fit, whole, tmp_path, words):
    def trained(log: TrainingLog, console: Console):
        return fit(history, range(len(history.user_ids)), history.end_ms, small(tiny_fit), WindowLimits(), console,
                   log)

    with pytest.raises(Cut):
        trained(TrainingLog(tmp_path), CutAt(words))
    said = quiet()
    after = trained(TrainingLog(tmp_path, resume=True), said)
    assert f'going on after epoch {words.split()[1][0]}' in said.file.getvalue()
    assert (after.pretraining, after.epochs, after.best_epoch) == (whole.pretraining, whole.epochs, whole.best_epoch)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name]), name


def saved(folder) -> None:
    _, toy = run([3.0, 2.0], epochs=2)
    run_epochs(toy, TrainingLog(folder), quiet())


def test_another_training_does_not_go_on_from_it(tmp_path):
    saved(tmp_path)
    for log, start in ((TrainingLog(tmp_path, True).of('other data'), 0.0), (TrainingLog(tmp_path, True), 1.0)):
        module, toy = run([1.0])
        torch.nn.init.constant_(module.weight, start)
        with pytest.raises(UsageError, match='other data'):
            run_epochs(toy, log, quiet())


def test_without_being_asked_it_begins_anew(tmp_path):
    saved(tmp_path)
    _, toy = run([3.0, 2.0, 1.0], epochs=1)
    assert len(run_epochs(toy, TrainingLog(tmp_path), quiet())[0]) == 1


def test_a_state_that_was_cut_short_says_what_to_do(tmp_path):
    saved(tmp_path)
    path = tmp_path / 'toy.pt'
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StateError, match='Do: train without --resume'):
            run_epochs(run([1.0])[1], TrainingLog(tmp_path, True), quiet())


def test_a_cut_while_the_state_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    saved(tmp_path)
    before = (tmp_path / 'toy.pt').read_bytes()

    def half(state, path):
        path.write_bytes(b'half')
        raise Cut

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(Cut):
        saved(tmp_path)
    assert (tmp_path / 'toy.pt').read_bytes() == before


# ---- where ----------------------------------------------------------------------------------------------------------

def test_a_cpu_trains_in_single_precision():
    assert isinstance(mixed_precision(torch.device('cpu')), nullcontext)


@pytest.mark.parametrize('able', [True, False])
def test_a_gpu_multiplies_in_bfloat16_if_it_can(monkeypatch, able):
    asked = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: able)
    monkeypatch.setattr(epochs.torch, 'autocast', lambda *arguments: asked.append(arguments) or nullcontext())
    assert device() == torch.device('cuda')
    mixed_precision(device())
    assert asked == ([('cuda', torch.bfloat16)] if able else [])


# ---- curves ---------------------------------------------------------------------------------------------------------

def test_curves_of_each_pass(tmp_path):
    accumulating = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    _, toy = run([3.0, 2.0], epochs=2)
    epochs, _ = run_epochs(toy, TrainingLog(curves=tmp_path).part('refit'), quiet())
    curves = accumulating.EventAccumulator(str(tmp_path / 'refit' / 'toy'))
    curves.Reload()
    for name in ('train', 'validation', 'weight'):
        assert [(point.step, point.value) for point in curves.Scalars(name)] == [
            (number, pytest.approx(epoch[name])) for number, epoch in enumerate(epochs, 1)]


def test_curves_without_tensorboard_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(UsageError, match='pip install tensorboard'):
        run_epochs(run([1.0])[1], TrainingLog(curves=tmp_path), quiet())
