"""The settings of the rules. Events, model and these settings together determine the outputs."""
from typing import Literal

import msgspec

from stream.core.decide import Policy
from stream.core.events import EventRules
from stream.core.layout import DAY_MS, WindowLimits

Publish = Literal['changes', 'all', 'events']


class StepRules(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the step driver.

    publish            changes: only decisions; all: also the scores of every scored user; events: also scores once per
                       event
    reasons_rows_max   the most model rows that the reasons of one step may use
    """

    limits: WindowLimits = WindowLimits()
    policy: Policy = Policy()
    publish: Publish = 'changes'
    reasons_rows_max: int = 2_048


class ReplayRules(StepRules, frozen=True, kw_only=True):
    """Further settings of a replay of recorded files: how to read events, and where to cut the stream into runs.

    block_events_max    the most events of a run
    block_span_ms_max   the longest event time from the first to the last event of a run, in ms
    """

    events: EventRules = EventRules()
    block_events_max: int = 8_000
    block_span_ms_max: int = DAY_MS
