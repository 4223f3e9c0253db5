"""Made-up user records, and a changelog filled with them. A worker that restores it has users with history."""
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
from aiokafka.producer.message_accumulator import BatchBuilder

from stream.core.events import Decoder, Event, EventRules
from stream.core.layout import (
    DAY_DTYPE,
    DAY_MS,
    HEADER,
    HEADER_DTYPE,
    HOUR_MS,
    ROW_DTYPE,
    WindowLimits,
)
from stream.core.user import User, encode, fold
from stream.simulator.shop import SimulatorOptions, simulate
from stream.state.store import LANE_KEY, LaneRecord
from tests.bench.live import changelog_of
from tests.bench.load import BATCH_BYTES_MAX, Shoppers, producing, send_all
from tests.integration.running import Shop

OPEN_SHARE = 0.02           # of made-up users: those who may get an alert of a kind at once


class Pool:
    """Simulated users with `events` events in their windows, from which any number of other users is made.

    A copy has its own ids. Its items and baskets are shifted by one number per copy, so that repeats within a user
    stay repeats, and its times are shifted by whole days. A copy cannot be compressed better than the original. It has
    a tier and had its alerts before, so that its first scores do not raise all of them: only for `OPEN_SHARE` of the
    users the cool-down is over.

    record_bytes   mean length of a record
    """

    def __init__(self, events: int, users_max: int = 200, seed: int = 1) -> None:
        found: dict[str, list[Event]] = defaultdict(list)
        decode, whole = Decoder(EventRules()), 0
        days = 180 if events < 60 else 540
        for line in simulate(SimulatorOptions(shoppers=users_max * 3, days=days, seed=seed)).lines():
            event = decode(line)
            if not isinstance(event, Event):
                continue
            run = found[event.user_id]
            if len(run) < events + (events >> 2):
                run.append(event)
                whole += len(run) == events + (events >> 2)
                if whole == users_max:
                    break
        self._records: list[bytes] = []
        for user_id, run in found.items():
            if len(run) == events + (events >> 2):
                user = User(user_id)
                for offset, event in enumerate(run):
                    event.offset = offset       # below nothing that was folded: sources count together here
                    fold(user, [event], WindowLimits(events_max=events, silence_ms=WindowLimits().silence_ms))
                self._records.append(encode(user))
        assert self._records, 'the simulator made nobody with so many events'
        self.record_bytes = statistics.fmean(map(len, self._records))

    def records(self, count: int, newest_ms: int, step: int, rng: np.random.Generator) -> list[bytes]:
        """`count` different records. Their newest events are up to two days before `newest_ms`."""
        made: list[bytes] = [b''] * count
        kinds = len(self._records)
        for kind in range(min(kinds, count)):
            places = range(kind, count, kinds)
            for place, record in zip(places, self._copies(self._records[kind], len(places), newest_ms, step, rng),
                                     strict=True):
                made[place] = record
        return made

    @staticmethod
    def _copies(record: bytes, count: int, newest_ms: int, step: int, rng: np.random.Generator) -> list[bytes]:
        width = len(record)
        data = np.tile(np.frombuffer(record, np.uint8), (count, 1))
        header = np.ndarray((count,), HEADER_DTYPE, data, 0, (width,))
        events, days = int(header['events'][0]), int(header['days'][0])
        ids_at = HEADER.size + days * DAY_DTYPE.itemsize + int(header['outbox_bytes'][0])
        rows = np.ndarray((count, events), ROW_DTYPE, data, ids_at + 8 * events, (width, ROW_DTYPE.itemsize))
        buckets = np.ndarray((count, days), DAY_DTYPE, data, HEADER.size, (width, DAY_DTYPE.itemsize))
        data[:, ids_at:ids_at + 8 * events] = rng.integers(0, 256, (count, 8 * events), np.uint8)
        for name in ('item', 'basket'):
            moved = rows[name] ^ rng.integers(1, 1 << 32, (count, 1), np.uint32)
            rows[name] = np.where(rows[name] == 0, 0, moved)
        ends = newest_ms - rng.integers(HOUR_MS, 2 * DAY_MS, count)
        shift_days = (ends - header['last_seen_ms']) // DAY_MS
        shift_ms = shift_days * DAY_MS
        rows['ts_ms'] += shift_ms[:, None]
        buckets['day'] += shift_days[:, None].astype(np.uint16)
        for name in ('first_seen_ms', 'last_seen_ms', 'last_order_ms', 'due_ms'):
            header[name] += np.where(header[name] == 0, 0, shift_ms)
        header['next_offset'] = 0
        header['tier'] = 1          # by no model: the first one that scores sets it anew, silently
        for name, cooldown_ms in (('intent_at_ms', DAY_MS), ('churn_at_ms', 7 * DAY_MS)):
            header[name] = newest_ms - rng.integers(0, round(cooldown_ms / (1 - OPEN_SHARE)), count)
        header['step'] = step
        text = data.tobytes()
        return [text[at:at + width] for at in range(0, len(text), width)]


def fill_changelog(of: Shop, shoppers: Shoppers, pool: Pool, records: int, step_users: int = 500, seed: int = 1) -> int:
    """Write a changelog of `records` records, in which the users take turns. Returns its bytes.

    Steps have `step_users` users and end with the lane's record, as the worker writes them.
    """
    topic, now_ms = changelog_of(of), int(time.time() * 1000)
    rng = np.random.default_rng(seed)
    size = 0

    def batches() -> Iterator[tuple[str, int, BatchBuilder]]:
        nonlocal size
        at, step = [0] * of.partitions, 0
        shares = [records * len(numbers) // shoppers.count for numbers in shoppers.of]
        while at != shares:
            step += 1
            for partition, numbers in enumerate(shoppers.of):
                count = min(step_users, len(numbers), shares[partition] - at[partition])
                if not count:
                    continue
                made = pool.records(count, now_ms, step, rng)
                builder = BatchBuilder(BATCH_BYTES_MAX, 0)
                whose = [shoppers.ids[numbers[(at[partition] + index) % len(numbers)]] for index in range(count)]
                at[partition] += count
                lane = LaneRecord(step, 1, [0, 0], [now_ms, now_ms], step - (at[partition] < shares[partition]))
                for key, value in [*zip(whose, made, strict=True), (LANE_KEY, orjson.dumps(_plain(lane)))]:
                    if builder.append(timestamp=now_ms, key=key, value=value) is None:
                        yield topic, partition, builder
                        builder = BatchBuilder(BATCH_BYTES_MAX, 0)
                        builder.append(timestamp=now_ms, key=key, value=value)
                    size += len(key) + len(value)
                yield topic, partition, builder

    async def fill() -> None:
        async with producing(of.brokers) as producer:
            await send_all(producer, batches())
    asyncio.run(fill())
    return size


def _plain(lane: LaneRecord) -> dict[str, Any]:
    return {name: getattr(lane, name) for name in lane.__struct_fields__}
