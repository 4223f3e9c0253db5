"""The events of a run: simulated shoppers whose time continues from chunk to chunk, with noise and invalid records.

Memory is that of one chunk. The same options give the same records in the same order.
"""
import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from stream.simulator.shop import SimulatorOptions, simulate
from tests.chaos.log import Topic
from tests.chaos.reference import DAY_MS

START_MS = 1_735_689_600_000        # 2025-01-01
_CART_TYPES = (b'"type":"add_to_cart"', b'"type":"remove_from_cart"', b'"type":"purchase"', b'"type":"refund"')
# Users whose ids are hard on somebody: two Unicode forms of one name, many bytes, what looks like a path or a lane.
_NAMES = {'u000003': 'é', 'u000004': 'e\N{COMBINING ACUTE ACCENT}', 'u000005': '買い物' * 40, 'u000006': '../../etc',
          'u000007': '\N{REPLACEMENT CHARACTER}lane', 'u000008': ' '}


class Input(NamedTuple):
    """A record to send. `partition` None: the one that murmur2 chooses; `timestamp_ms` 0: the time of sending."""

    topic: Topic
    key: bytes | None
    value: bytes | None
    partition: int | None = None
    timestamp_ms: int = 0
    headers: tuple[tuple[str, bytes], ...] = ()


def records(seed: int, shoppers: int, days: int = 30, noise: float = 0.02, poison: float = 0.002) -> Iterator[Input]:
    """An endless sequence of records.

    shoppers   of each chunk; they are the same users in every chunk, so that windows fill
    days       of simulated time in a chunk
    noise      share of rows that are repeated, delayed or broken
    poison     share of additional records that no sane producer sends
    """
    rng = random.Random(seed)
    for chunk in itertools.count():
        simulation = simulate(SimulatorOptions(shoppers, days, seed * 1_000 + chunk, START_MS + chunk * days * DAY_MS,
                                               noise=noise))
        prefix = b'"event_id":"c%d-e' % chunk
        for line in simulation.lines():
            yield _input(line.replace(b'"event_id":"e', prefix, 1))
            if rng.random() < poison:
                yield _poison(rng, line)


def _input(line: bytes) -> Input:
    topic: Topic = 'carts' if any(kind in line for kind in _CART_TYPES) else 'clicks'
    at = line.find(b'"user_id":"')
    end = line.find(b'"', at + 11)
    if at < 0 or end < 0:
        return Input(topic, b'nobody', line)
    user_id = line[at + 11:end].decode()
    name = _NAMES.get(user_id)
    if name is not None:
        line = line.replace(user_id.encode(), name.encode(), 1)
    return Input(topic, (name or user_id).encode(), line)


def _poison(rng: random.Random, line: bytes) -> Input:
    given = _input(line)
    good = {'event_id': f'p{rng.getrandbits(48):x}', 'user_id': 'poison', 'ts': START_MS, 'type': 'view'}
    text = orjson.dumps(good)
    key: bytes | None = b'poison'
    headers: tuple[tuple[str, bytes], ...] = (('Faust-Ag-ReplyTo', b'alerts'), ('trace', b'\x00\xff'))
    value: bytes | None
    match rng.randrange(18):
        case 0:
            value = None
        case 1:
            value = b''
        case 2:
            value = text[:-1] + b',"text":"\xff\xfe"}'
        case 3:
            value = b'[' * 100_000
        case 4:
            value = text[:-1] + b',"price":1e999}'
        case 5:
            value = text[:-1] + b',"query":"\\ud800"}'
        case 6:
            value = text[:-1] + b',"quantity":' + b'9' * 5_000 + b'}'
        case 7:
            value, key = text, None
        case 8:
            value, key = text, b'somebody else'
        case 9:
            value = orjson.dumps(good | {'ts': 4_000_000_000_000})
        case 10:
            value = orjson.dumps(good | {'ts': -1})
        case 11:
            value = text + b'{}'
        case 12:
            value = orjson.dumps([good])
        case 13:
            value = orjson.dumps(good | {'rating': '5'})
        case 14:        # of a key given twice the last one counts: this one is valid
            value = b'{"user_id":"nobody",' + text[1:]
        case 15 | 16 if line.endswith(b'}') and b'NaN' not in line:     # older than any window: late
            event = orjson.loads(given.value or b'')
            old = {'event_id': good['event_id'], 'ts': max(event['ts'] - 450 * DAY_MS, START_MS - 420 * DAY_MS)}
            return given._replace(value=orjson.dumps(event | old))
        case _:         # where another partitioner would have put it, mostly
            return given._replace(partition=0, headers=headers)
    return Input(given.topic, key, value, None if key is not None else 0, headers=headers)
