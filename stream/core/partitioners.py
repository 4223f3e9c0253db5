"""Which partition a producer chooses for a key, and whether a record is on the partition of its key.

A worker owns a partition number of both input topics. A record on another partition than its key's would split the
user over two workers, and neither would have the whole history. Such a record becomes a dead letter, `misrouted`.

    murmur2   (murmur2(key) & 0x7fffffff) % partitions       Java client, Kafka Streams, librdkafka's murmur2_random
    crc32     crc32(key) % partitions                        librdkafka's consistent and consistent_random
    fnv1a     |int32(fnv1a_32(key))| % partitions            librdkafka's fnv1a and fnv1a_random, Sarama's
                                                             NewHashPartitioner

The sign of FNV-1a: librdkafka takes the absolute value of the signed hash, Sarama that of the signed remainder. Both
give the same partition. Sarama's NewReferenceHashPartitioner clears the sign bit instead and is not one of these.

Sources  org.apache.kafka.common.utils.Utils.murmur2; librdkafka rdmurmur2.c, rdfnv1a.c, rdkafka_msg.c (the values of
         its unit tests are in tests/core/test_partitioners.py); Sarama partitioner.go.
"""
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final, Literal
from zlib import crc32

import msgspec

from stream.core.events import Refusal

PartitionerName = Literal['murmur2', 'crc32', 'fnv1a', 'none']
Known = Literal['murmur2', 'crc32', 'fnv1a']

MISROUTED: Final = 'misrouted'
_CACHED_KEYS = 1 << 16
_CHANCE_MAX = 1e-6          # that keys of another partitioner all agree with this one
_MIXED_MIN = 0.5            # share of the keys, for a partitioner that is not the only one

_M = 0x5BD1E995
_SEED = 0x9747B28C
_U32_MAX = 0xFFFF_FFFF
_FNV_OFFSET, _FNV_PRIME = 0x811C9DC5, 0x01000193
_WORDS = [struct.Struct(f'<{count}I') for count in range(65)]     # of keys up to 259 bytes; longer ones are rare


# Not aiokafka.partitioner.murmur2. That one reads byte by byte and takes twice as long: 2.7 us instead of 1.1 us for a
# key of 8 bytes, 10 us instead of 5 us for 36 bytes, and every new user costs one call. It would also load a Kafka
# client into the core: 0.3 s at the start of every replay. A test compares the results of the two.
def murmur2(key: bytes) -> int:
    """MurmurHash2 as the Java client computes it: 32 bits, unsigned."""
    length = len(key)
    h = _SEED ^ length
    count = length >> 2
    words = _WORDS[count] if count < len(_WORDS) else struct.Struct(f'<{count}I')
    for k in words.unpack_from(key):
        k = k * _M & _U32_MAX
        h = h * _M & _U32_MAX ^ (k ^ k >> 24) * _M & _U32_MAX
    if length & 3:
        h = (h ^ int.from_bytes(key[length & ~3:], 'little')) * _M & _U32_MAX
    h = (h ^ h >> 13) * _M & _U32_MAX
    return h ^ h >> 15


def fnv1a(key: bytes) -> int:
    """The absolute value of the signed 32-bit FNV-1a hash, as in librdkafka."""
    h = _FNV_OFFSET
    for byte in key:
        h = (h ^ byte) * _FNV_PRIME & _U32_MAX
    return h if h < 0x8000_0000 else 0x1_0000_0000 - h


_HASHES: Mapping[str, Callable[[bytes], int]] = {
    'murmur2': lambda key: murmur2(key) & 0x7FFF_FFFF,
    'crc32': crc32,
    'fnv1a': fnv1a,
}


@lru_cache(maxsize=_CACHED_KEYS)        # the next event of a user has the same key
def partition(name: Known, key: bytes, partitions: int) -> int:
    """The partition, 0 to `partitions` - 1, that the partitioner `name` chooses for `key`."""
    return _HASHES[name](key) % partitions


def misrouted(name: PartitionerName, key: bytes, found: int, partitions: int) -> Refusal | None:
    """A refusal if `key` is on partition `found` but belongs on another one. None if it belongs there.

    name         of the partitioner; with `none` nothing is checked
    partitions   of the topic
    """
    if name == 'none' or (chosen := partition(name, key, partitions)) == found:
        return None
    return Refusal(MISROUTED, f'on partition {found} of {partitions}, where {name} would have chosen {chosen}')


class Detection(msgspec.Struct, frozen=True):
    """What a sample of keys says about the producers' partitioner.

    verdict     the partitioner; `none`: none of the known ones; None: too few keys to tell
    keys        distinct keys in the sample
    shares      partitioner -> share of the keys that are on the partition that it chooses
    """

    verdict: PartitionerName | None
    keys: int
    shares: dict[Known, float]


def keys_needed(partitions: int) -> int | None:
    """How many distinct keys are needed to tell partitioners apart. None: no number is enough with one partition."""
    return None if partitions < 2 else math.ceil(-math.log(_CHANCE_MAX) / math.log(partitions))


def detect(sample: Iterable[tuple[bytes, int]], partitions: int) -> Detection:
    """Find out which partitioner chose the partitions of `sample`, pairs of a key and its partition.

    By chance two partitioners agree on one key in `partitions` (murmur2 and crc32 on 13 % of keys with 8 partitions),
    so many keys decide together. A partitioner that chose for more than half of the keys is the verdict even if others
    were used too: its share then is below 1.
    """
    places: dict[bytes, set[int]] = {}
    for key, found in sample:
        places.setdefault(key, set()).add(found)
    shares: dict[Known, float] = {}
    for name in ('murmur2', 'crc32', 'fnv1a'):
        right = sum(found == {partition(name, key, partitions)} for key, found in places.items())
        shares[name] = right / len(places) if places else 0.0
    needed = keys_needed(partitions)
    if needed is None or len(places) < needed:
        return Detection(None, len(places), shares)
    best = max(shares, key=lambda name: shares[name])
    chance = 1 / partitions
    # With few partitions chance alone is near one half. The share must be far above chance too.
    margin = 6 * math.sqrt(chance * (1 - chance) / len(places))
    is_known = shares[best] == 1 or shares[best] > max(_MIXED_MIN, chance + margin)
    return Detection(best if is_known else 'none', len(places), shares)
