"""Options of a training by name: every one can be given, and a slip of the pen is told."""

from dataclasses import replace

import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.errors import UsageError
from stream.learn.backbones import BackboneOptions, EncoderOptions, make_backbone
from stream.learn.fit import FitOptions, option_names
from stream.learn.options import changed
from stream.learn.pretrain import PretrainOptions


def test_every_option_has_a_name_of_its_own():
    names = option_names()
    assert {'epochs', 'hidden', 'layers', 'learning_rate', 'backbone.learning_rate', 'task_weights.refund',
            'cutoffs_per_user', 'pretrain.epochs', 'pretrain.masked_share'} <= names.keys()
    assert len(set(names.values())) == len(names)
    assert not {'seed', 'tiers', 'tuning', 'catalogue', 'source', 'refund', 'pretrain', 'pretrain.objectives'
                } & names.keys()       # have flags of their own


def test_values_reach_their_place_and_nothing_else_changes():
    options = replace(FitOptions(), tiers=3, backbone=BackboneOptions('bert', 'folder', 'lora'))
    got = changed(options, {'epochs': 2, 'hidden': 96, 'learning_rate': 1, 'backbone.learning_rate': 1e-3,
                            'task_weights.tier': 0.25, 'items': True, 'moments_per_user': 0}, option_names())
    assert got == replace(
        options, epochs=2, learning_rate=1.0, encoder=EncoderOptions(hidden=96, items=True),
        backbone=replace(options.backbone, learning_rate=1e-3), task_weights=options.task_weights | {'tier': 0.25},
        examples=replace(options.examples, moments_per_user=0.0))
    assert changed(options, {}, option_names()) == options


@pytest.mark.parametrize(('name', 'value', 'message'), [
    ('hiden', 8, 'no option hiden, did you mean hidden?'), ('tiers', 3, 'no option tiers'),
    ('epochs', 0, 'epochs'), ('epochs', 2.5, 'epochs'), ('epochs', 'many', 'epochs'),
    ('hidden', True, r'encoder\.hidden'), ('dropout', 1, r'encoder\.dropout'), ('dropout', -0.1, r'encoder\.dropout'),
    ('validation_share', 0, 'validation_share'), ('items', 'yes', r'encoder\.items'), ('clip_norm', 0, 'clip_norm'),
    ('task_weights.spend', -1, 'task_weights'), ('backbone.learning_rate', 'fast', r'backbone\.learning_rate'),
])
def test_what_is_wrong_says_so(name, value, message):
    with pytest.raises(UsageError, match=message):
        changed(FitOptions(), {name: value}, option_names())


def test_heads_that_do_not_divide_the_units_are_told():
    with pytest.raises(UsageError, match='3 attention heads cannot share 64'):
        make_backbone(BackboneOptions(), EncoderOptions(heads=3))


def test_what_makes_it_small_has_names():
    options = changed(FitOptions(), {'teachers': 2, 'wider': 2, 'heads_kept': 0.5}, option_names())
    assert (options.distil.teachers, options.distil.wider, options.heads_kept) == (2, 2.0, 0.5)
    for name, wrong in (('heads_kept', 0), ('heads_kept', 1.5), ('teachers', -1)):
        with pytest.raises(UsageError, match=name):
            changed(FitOptions(), {name: wrong}, option_names())


def test_pretraining_has_options_where_it_is_asked_for():
    options = replace(FitOptions(), pretrain=PretrainOptions.of('masked,next'))
    got = changed(options, {'pretrain.epochs': 2, 'epochs': 5, 'pretrain.temperature': 1, 'learning_rate': 1e-3},
                  option_names())
    assert got == replace(options, epochs=5, learning_rate=1e-3, pretrain=replace(
        PretrainOptions.of('masked,next'), epochs=2, temperature=1.0))
    for name, wrong in (('epochs', 0), ('masked_share', 1), ('learning_rate', 'fast'), ('crop_share_min', 1.5)):
        with pytest.raises(UsageError, match=rf'pretrain\.{name}'):
            changed(options, {f'pretrain.{name}': wrong}, option_names())
    with pytest.raises(UsageError, match='pretraining, which is not asked for'):
        changed(FitOptions(), {'pretrain.epochs': 2}, option_names())
