"""The settings of the rules: everything that decides what comes out of given events and a given model."""
from typing import Literal

import msgspec

from stream.core.decide import Policy
from stream.core.events import EventRules
from stream.core.layout import DAY_MS, WindowLimits

Publish = Literal['changes', 'all', 'events']


class StepRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the step driver needs.

    publish            changes: decisions only; all: scores of every scored user too; events: scores once per event
    reasons_rows_max   model rows that the reasons of one step may cost
    """

    limits: WindowLimits = WindowLimits()
    policy: Policy = Policy()
    publish: Publish = 'changes'
    reasons_rows_max: int = 2_048


class ReplayRules(StepRules, frozen=True, kw_only=True):
    """What a replay of recorded files needs besides: how to read events, and where to cut the stream into runs.

    block_span_ms_max   of event time, from the first to the last event of a run
    """

    events: EventRules = EventRules()
    block_events_max: int = 8_000
    block_span_ms_max: int = DAY_MS
