"""Options of a training by name, for whoever has only words: the command line.

    epochs=3 hidden=32 backbone.learning_rate=1e-4 pretrain.epochs=5

A name is that of a field of `FitOptions`, or of one of the groups in it, alone where no other field is called so.
Pretraining is one of the groups where it is asked for.
"""
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

import msgspec

from stream.errors import UsageError
from stream.learn.fit import FitOptions
from stream.learn.pretrain import PretrainOptions

# They have flags of their own.
_ELSEWHERE = {('seed',), ('clean',), ('tiers',), ('refund',), ('start_from',), ('pretrain', 'objectives'),
              ('backbone', 'name'), ('backbone', 'source'), ('backbone', 'tuning'), ('backbone', 'catalogue')}
_BY_GROUP = ('task_weights', 'ranker', 'pretrain')      # of these the name alone says too little


def option_names() -> dict[str, tuple[str, ...]]:
    """Where each option is in `FitOptions`, by name."""
    whole = asdict(FitOptions(pretrain=PretrainOptions({})))
    places = [(name,) for name, value in whole.items() if not isinstance(value, dict)]
    places += [(group, name) for group, values in whole.items() if isinstance(values, dict) for name in values]
    often = Counter(place[-1] for place in places)
    return {place[-1] if len(place) == 1 or (often[place[-1]] == 1 and place[0] not in _BY_GROUP) else '.'.join(place):
            place for place in places if place not in _ELSEWHERE}


def changed(options: FitOptions, values: Mapping[str, Any]) -> FitOptions:
    """The options with some values by name.

    Errors   UsageError where there is no such option, or not without pretraining, or its value is of another kind or
             out of range.
    """
    places = option_names()
    whole = asdict(options)
    for name, value in values.items():
        if name not in places:
            near = get_close_matches(name, places, 1)
            raise UsageError(f'Training has no option {name}' + (f', did you mean {near[0]}?' if near else '.'),
                             do=f'use one of {", ".join(places)}.')
        *group, last = places[name]
        if group == ['pretrain'] and options.pretrain is None:
            raise UsageError(f'{name} is an option of pretraining, which is not asked for.',
                             do='name with --pretrain what is to be learned before.')
        (whole[group[0]] if group else whole)[last] = value
    try:
        return msgspec.convert(whole, FitOptions)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(' - at `$.')
        raise UsageError(f'The option {place.rstrip("`")} of training is wrong: {problem}.',
                         do='give it another value.') from error
