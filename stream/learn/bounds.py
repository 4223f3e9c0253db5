"""Bounds of options: what `stream.learn.options` holds a value from the command line to."""
from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
CountOrNone = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Part = Annotated[float, Meta(gt=0, lt=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
PartOrAll = Annotated[float, Meta(gt=0, le=1)]
