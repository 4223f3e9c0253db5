"""Options of a training: the values that they may have, and their names on the command line.

    epochs=3 hidden=32 backbone.learning_rate=1e-4 pretrain.epochs=5

An option's name is that of its field. A field of a group (an options class inside another) is called `group.field`, or
`field` alone where no other field has that name.
"""
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from stream.errors import UsageError

Count = Annotated[int, Meta(ge=1)]
CountOrNone = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Part = Annotated[float, Meta(gt=0, lt=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
PartOrAll = Annotated[float, Meta(gt=0, le=1)]

FieldPath = tuple[str, ...]         # (field,) or (group, field)
Options = TypeVar('Options')


def names_of(complete: Any, hidden: Collection[FieldPath], qualified: Collection[str]) -> dict[str, FieldPath]:
    """The place of each option by its name.

    complete    a dataclass of options in which every group is present
    hidden      places without a name here
    qualified   groups whose fields always carry the group's name
    """
    values = asdict(complete)
    places: list[FieldPath] = [(name,) for name, value in values.items() if not isinstance(value, dict)]
    places += [(group, name) for group, fields in values.items() if isinstance(fields, dict) for name in fields]
    uses = Counter(place[-1] for place in places)
    return {place[-1] if len(place) == 1 or (uses[place[-1]] == 1 and place[0] not in qualified) else '.'.join(place):
            place for place in places if place not in hidden}


def changed(options: Options, values: Mapping[str, Any], names: Mapping[str, FieldPath]) -> Options:
    """A copy of a dataclass of options with some values replaced, given by name.

    names    from `names_of`
    Errors   UsageError where there is no such option, its group is absent, or the value has the wrong type or is out of
             range.
    """
    fields: dict[str, Any] = asdict(options)        # pyright: ignore[reportArgumentType]  # a dataclass, as said above
    for name, value in values.items():
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise UsageError(f'Training has no option {name}' + (f', did you mean {near[0]}?' if near else '.'),
                             do=f'use one of {", ".join(names)}.')
        *group, field = names[name]
        if group and fields[group[0]] is None:
            raise UsageError(f'{name} is an option of pretraining, which is not asked for.',
                             do='choose what to pretrain on with --pretrain.')
        (fields[group[0]] if group else fields)[field] = value
    try:
        return msgspec.convert(fields, type(options))
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(' - at `$.')
        raise UsageError(f'The option {place.rstrip("`")} of training is wrong: {problem}.',
                         do='give it another value.') from error
