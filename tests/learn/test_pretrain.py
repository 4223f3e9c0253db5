"""Pretraining learns what windows are like, from nothing that it must not see, and the fit starts from it."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import io
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.features import SLOT_NUMBER_NAMES, SLOT_NUMBERS
from stream.core.layout import WindowLimits
from stream.errors import ModelError, UsageError
from stream.learn import dataset
from stream.learn.backbones import BackboneOptions, EncoderOptions, EventsBackbone
from stream.learn.checkpoint import load, save
from stream.learn.compress import attentions, cut
from stream.learn.fit import fit
from stream.learn.pretrain import PretrainHeads, PretrainOptions, cropped, pretrain, slot_targets, start_from
from stream.learn.training_log import TrainingLog
from tests.learn.pretrained import save_tiny

ENCODER = EncoderOptions(hidden=16, layers=1, heads=2, intermediate=32)
AMOUNT, GAP = SLOT_NUMBER_NAMES.index('amount'), SLOT_NUMBER_NAMES.index('gap_days')


def tiny(names: str, **changes) -> PretrainOptions:
    return replace(PretrainOptions.of(names), **{
        'epochs': 2, 'rows_per_epoch': 256, 'batch_rows': 32, 'learning_rate': 3e-3, 'validation_rows': 100,
        'slots_max': 128} | changes)


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope='module')
def examples(history):
    return dataset.sample(history, range(len(history.user_ids)), history.start_ms, history.end_ms,
                          dataset.ExampleOptions(4, 4.0), WindowLimits(), 1)


def learned(examples, options: PretrainOptions) -> tuple[EventsBackbone, list[dict[str, float]]]:
    torch.manual_seed(0)
    backbone = EventsBackbone(ENCODER)
    return backbone, pretrain(backbone, examples, examples.user % 5 == 0, options, 3, TrainingLog(), quiet())


def windows(filled: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up categories and numbers; in each slot its place, from 1, is its type, item and category."""
    inside = torch.arange(length) < torch.tensor(filled)[:, None]
    places = torch.where(inside, torch.arange(1, length + 1), 0)
    return (places[:, :, None].expand(-1, -1, 3).int().clone(),
            torch.where(inside[:, :, None], torch.rand(len(filled), length, SLOT_NUMBERS) + 0.1, 0))


@pytest.mark.parametrize('name', ['masked', 'next', 'contrastive'])
def test_each_objective_is_learned_alone(examples, name):
    before, _ = learned(examples, tiny(name, epochs=0))
    backbone, epochs = learned(examples, tiny(name))
    assert [set(epoch) for epoch in epochs] == [{'train', 'validation', name}] * 2
    assert epochs[-1]['train'] < epochs[0]['train']
    assert epochs[-1]['validation'] < epochs[0]['validation']
    start = before.state_dict()
    moved = {part for part, tensor in backbone.state_dict().items() if not torch.equal(tensor, start[part])}
    assert any(part.startswith('encoder') for part in moved)
    assert ('masked' in moved) == (name == 'masked')


def test_the_weights_of_the_objectives_count(examples):
    _, epochs = learned(examples, tiny('next,contrastive', objectives={'next': 2.0, 'contrastive': 0.5}, epochs=1))
    assert epochs[0]['validation'] == pytest.approx(2 * epochs[0]['next'] + epochs[0]['contrastive'] / 2)


def test_twice_the_same(examples):
    first, epochs = learned(examples, tiny('masked,next,contrastive', epochs=1))
    again, epochs_again = learned(examples, tiny('masked,next,contrastive', epochs=1))
    assert epochs == epochs_again
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_labels_are_not_looked_at(examples):
    unlabelled = replace(examples, labels=None)
    assert learned(unlabelled, tiny('masked,next,contrastive', epochs=1))[1] == learned(
        examples, tiny('masked,next,contrastive', epochs=1))[1]


# ---- what is told, and from what ------------------------------------------------------------------------------------

def test_what_is_slot_targets_a_slot():
    categories = torch.tensor([[[1, 7, 9], [12, 0, 0], [0, 0, 0]]])
    numbers = torch.zeros(1, 3, SLOT_NUMBERS)
    numbers[0, :, GAP] = torch.tensor([np.log1p(3), np.log1p(3), 0])
    numbers[0, 1, AMOUNT] = np.log1p(20)
    told = slot_targets(categories, numbers)[0].tolist()
    assert told[0] == [1, 7, 9, 0, -1]          # before the first slot there is no gap
    assert told[1] == [12, -1, -1, 6, 5]        # an absent item or category is not asked for; log 21 / .5, log 4 / .25


class Recorder(torch.nn.Module):
    """Notes what it is asked to tell from, and what."""

    def forward(self, states, told):
        self.states, self.told = states, told
        return states.sum() * 0


def heads_of(names: str, **changes) -> PretrainHeads:
    torch.manual_seed(0)
    heads = PretrainHeads(EventsBackbone(ENCODER), tiny(names, **changes)).eval()
    heads.masked_head = heads.next_head = Recorder()
    return heads


def test_a_hidden_slot_is_not_seen():
    heads, (categories, numbers) = heads_of('masked'), windows([5, 3], 6)
    torch.manual_seed(1)
    heads._masked(categories, numbers)
    states, told = heads.masked_head.states, heads.masked_head.told
    changed = categories.clone()
    for row, kind in ((0, k) for k in told[:, 0].tolist()):
        changed[row, kind - 1] = torch.tensor([9, 1, 77])       # its place was its type; item 1 is also that of slot 1
    torch.manual_seed(1)
    heads._masked(changed, numbers)
    told_again = heads.masked_head.told
    own = (told_again != told).any(1)
    assert own.any()
    assert torch.equal(heads.masked_head.states[own], states[own])


def test_the_next_slot_is_told_from_what_came_before_it():
    heads, (categories, numbers) = heads_of('next'), windows([5, 1], 6)
    heads._next(categories, numbers)
    states = heads.next_head.states
    assert heads.next_head.told[:, 0].tolist() == [2, 3, 4, 5]     # of the window with one slot nothing is asked
    changed = categories.clone()
    changed[0, 4] = torch.tensor([9, 1, 77])
    heads._next(changed, numbers)
    assert torch.equal(heads.next_head.states, states)


def test_of_many_slots_some_are_told():
    heads, (categories, numbers) = heads_of('next', slots_max=3), windows([6, 6], 6)
    heads._next(categories, numbers)
    assert len(heads.next_head.told) == 3


def test_two_moments_of_one_user_are_not_held_against_each_other():
    heads, (categories, numbers) = heads_of('contrastive'), windows([5, 4, 6, 2], 6)
    alone = heads._contrastive(categories, numbers, torch.tensor([8, 8, 8, 8]))
    others = heads._contrastive(categories, numbers, torch.tensor([1, 2, 3, 4]))
    assert alone.item() == pytest.approx(0, abs=1e-6) and others.item() > 0.1


def test_a_crop_is_a_run_of_slots_moved_to_the_beginning():
    categories, numbers = windows([10, 10, 1, 7] * 20, 12)
    kinds, values = cropped(categories, numbers, 0.5)
    lengths = set()
    for row in range(len(kinds)):
        kept = kinds[row, :, 0][kinds[row, :, 0] > 0].tolist()
        count = int((categories[row, :, 0] > 0).sum())
        assert kept == list(range(kept[0], kept[0] + len(kept))) and kept[-1] <= count
        assert count / 2 <= len(kept) <= count
        assert torch.equal(values[row, :len(kept)], numbers[row, kept[0] - 1:kept[-1]])
        assert not kinds[row, len(kept):].any() and not values[row, len(kept):].any()
        lengths.add((count, len(kept), kept[0]))
    assert len(lengths) > 10


# ---- the fit starts from it -----------------------------------------------------------------------------------------

def fitted(history, options):
    return fit(history, range(len(history.user_ids)), history.end_ms, options, WindowLimits(), quiet())


def test_the_fit_starts_from_what_was_pretrained(history, tiny_fit):
    plain = fitted(history, tiny_fit(epochs=1))
    after = fitted(history, tiny_fit(epochs=1, pretrain=tiny('masked,next')))
    assert plain.pretraining == [] and len(after.pretraining) == 2
    # What stands for a hidden slot moves in pretraining alone.
    assert not torch.equal(plain.model.backbone.masked, after.model.backbone.masked)
    assert plain.epochs[0]['train'] != after.epochs[0]['train']


def test_the_fit_starts_from_another_checkpoint(history, tiny_fit, checkpoint):
    theirs = load(checkpoint).model.backbone.state_dict()
    ours = fitted(history, tiny_fit(epochs=0, start_from=str(checkpoint))).model.backbone.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_of_other_sizes_is_refused(checkpoint):
    with pytest.raises(ModelError, match=r"'hidden': 16.*'hidden': 24.*Do: start from one of the same sizes"):
        start_from(EventsBackbone(replace(ENCODER, hidden=24)), checkpoint)
    start_from(EventsBackbone(replace(ENCODER, dropout=0.5)), checkpoint)       # no weight depends on it


def test_a_checkpoint_with_heads_cut_out_is_refused(checkpoint, tmp_path):
    kept = load(checkpoint)
    cut(kept.model.backbone, [[0] for _ in attentions(kept.model.backbone)])
    save(kept, tmp_path)
    with pytest.raises(ModelError, match='heads cut out'):
        start_from(EventsBackbone(ENCODER), tmp_path)


@pytest.mark.parametrize('options', [{'pretrain': tiny('masked')}, {'start_from': 'anywhere'}])
def test_what_reads_text_is_not_pretrained_here(history, tiny_fit, tmp_path, options):
    source = str(save_tiny('distilbert', tmp_path))
    with pytest.raises(UsageError, match='comes pretrained'):
        fitted(history, tiny_fit(backbone=BackboneOptions('distilbert', source), **options))


def test_an_unknown_objective_is_refused():
    with pytest.raises(UsageError, match=r"'guessing'.*masked, next, contrastive"):
        PretrainOptions.of('masked,guessing')
