"""Our worker as a peer in the peers' harness: the process of `stream worker`, with the log lines it waits for.

    JOB=full     our message per scored user; decoding, outbox, metrics and everything else on
    JOB=events   our message per event
    JOB=peers    the peers' job and message: a window of 64 events, {user_id, n, last_ts}; no scores, the rest as usual

The harness passes settings in the environment: APP_ID, STATE_DIR, EVENTS, COMMIT_S, KAFKA. Its topics keep their names.
Our topics (alerts, dead letters, changelog) are named after APP_ID.
"""
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import ClassVar

import orjson

from stream.cli.shared import collect_seldom
from stream.config import load_settings
from stream.core.decide import Kind
from stream.core.driver import Step
from stream.core.outbox import Message, pack_messages
from stream.core.step_scorer import Scored, StepScorer
from stream.engine import assignment, beat, worker
from stream.engine.beat import Beats
from stream.engine.blocks import Block
from stream.engine.lane import Lane, StepOutput
from stream.engine.publisher import Sending

JOB, APP, EVENTS = os.environ['JOB'], os.environ['APP_ID'], int(os.environ['EVENTS'])
NO_ID = b'0' * 32       # the peers' message has none
PUBLISH = {'full': 'all', 'events': 'events', 'peers': 'all'}[JOB]


class TellingLane(Lane):
    """Says when the first event is taken up, and when the last one is done."""

    told: ClassVar[dict[str, float]] = {}
    handled = 0

    def admit(self, block: Block) -> None:
        self.tell('first')
        super().admit(block)

    def finish(self, output: StepOutput) -> None:
        before = sum(self.done)
        super().finish(output)
        TellingLane.handled += sum(self.done) - before
        if TellingLane.handled >= EVENTS:
            self.tell('handled')

    def tell(self, what: str) -> None:
        if what not in self.told:
            self.told[what] = time.time()
            sys.stdout.write(f'@{json.dumps({what: self.told[what]})}\n')
            sys.stdout.flush()


class PeersBeats(Beats):
    """Sends the peers' message as it is, without headers."""

    async def _begin_messages(self, lane: Lane, messages: Sequence[Message]) -> list[Sending]:
        return [await self._tools.publisher.begin(self._rules.scores, lane.number, [
            (message.key, message.value, ()) for message in messages])] if messages else []


class PeersScorer(StepScorer):
    """Says what the peers say of a window, and scores nobody."""

    async def score(self, steps: Sequence[Step]) -> list[Scored]:
        return [self._said(step) for step in steps]

    def _said(self, step: Step) -> Scored:
        outboxes = []
        for entry in step.touched:
            user = entry.user
            value = orjson.dumps({'user_id': user.user_id, 'n': len(user.ids) // 8, 'last_ts': user.last_seen_ms})
            messages = [Message(Kind.SCORES, NO_ID, user.user_id.encode(), user.last_seen_ms, value)]
            user.outbox = pack_messages(messages)
            outboxes.append((user, messages))
        return Scored([], None, outboxes, 0)


def main() -> None:
    assignment.Lane = TellingLane
    if JOB == 'peers':
        assignment.Beats, beat.StepScorer = PeersBeats, PeersScorer
    settings = load_settings(
        brokers=os.environ['KAFKA'], group=APP, clicks_topic='bench.clicks', carts_topic='bench.carts',
        alerts_topic=f'{APP}-alerts', scores_topic='bench.updates', dead_letters_topic=f'{APP}-dead', scorer='constant',
        publish=PUBLISH, state_dir=os.environ['STATE_DIR'], admin_port=0,
        commit_interval_ms=int(float(os.environ['COMMIT_S']) * 1000), window_events_max=64 if JOB == 'peers' else 128)
    collect_seldom()
    asyncio.run(worker.run(settings))


if __name__ == '__main__':
    main()
