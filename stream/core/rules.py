"""Everything that decides what comes out of given events and a given model: the rules' settings, in one place."""
from typing import Literal

import msgspec

from stream.core.decide import Policy
from stream.core.events import EventRules
from stream.core.layout import DAY_MS, WindowLimits

Publish = Literal['changes', 'all', 'events']


class ReplayRules(msgspec.Struct, frozen=True):
    """Everything that decides what comes out, apart from the events and the model."""

    events: EventRules = EventRules()
    limits: WindowLimits = WindowLimits()
    policy: Policy = Policy()
    publish: Publish = 'changes'
    block_events_max: int = 8_000
    block_span_ms_max: int = DAY_MS
    reasons_rows_max: int = 2_048
