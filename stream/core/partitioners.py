"""Which partition a producer puts a key on, and whether a record lies where its key belongs.

Both input topics are read by partition number, so a user whose key lies on another partition than the shop's
partitioner would choose is split over two workers, and neither has the whole history: such a record is a dead letter,
`misrouted`.

    murmur2   (murmur2(key) & 0x7fffffff) % partitions       Java client, Kafka Streams, librdkafka's murmur2_random
    crc32     crc32(key) % partitions                        librdkafka's consistent and consistent_random
    fnv1a     |int32(fnv1a_32(key))| % partitions            librdkafka's fnv1a and fnv1a_random, Sarama's
                                                             NewHashPartitioner

The sign of FNV-1a: librdkafka takes the absolute value of the signed hash and Sarama that of the signed remainder,
which is the same; Sarama's NewReferenceHashPartitioner clears the sign bit instead and is not one of these.

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
_CHANCE_MAX = 1e-6          # that keys of no partitioner all lie where this one puts them
_MIXED_MIN = 0.5            # of the keys, for a partitioner that is not alone

_M = 0x5BD1E995
_SEED = 0x9747B28C
_U32_MAX = 0xFFFF_FFFF
_FNV_OFFSET, _FNV_PRIME = 0x811C9DC5, 0x01000193
_WORDS = [struct.Struct(f'<{count}I') for count in range(65)]     # ids have 256 characters at most, mostly fewer bytes


def murmur2(key: bytes) -> int:
    """32 bits of MurmurHash2 as the Java client computes it, unsigned."""
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
    """The absolute value of the signed 32-bit FNV-1a hash, as librdkafka has it."""
    h = _FNV_OFFSET
    for byte in key:
        h = (h ^ byte) * _FNV_PRIME & _U32_MAX
    return h if h < 0x8000_0000 else 0x1_0000_0000 - h


_HASHES: Mapping[str, Callable[[bytes], int]] = {
    'murmur2': lambda key: murmur2(key) & 0x7FFF_FFFF,
    'crc32': crc32,
    'fnv1a': fnv1a,
}


@lru_cache(maxsize=_CACHED_KEYS)        # a user's next event asks again
def partition(name: Known, key: bytes, partitions: int) -> int:
    """The partition, 0 to `partitions` - 1, on which the partitioner `name` puts `key`."""
    return _HASHES[name](key) % partitions


def misrouted(name: PartitionerName, key: bytes, found: int, partitions: int) -> Refusal | None:
    """A refusal if `key` lies on partition `found` and belongs on another one; None if it lies right.

    partitions   of the topic; `name` none: nothing is checked
    """
    if name == 'none' or (wanted := partition(name, key, partitions)) == found:
        return None
    return Refusal(MISROUTED, f'on partition {found} of {partitions}, where {name} would have chosen {wanted}')


class Detection(msgspec.Struct, frozen=True):
    """What a sample of keys says about the producers' partitioner.

    verdict     the partitioner; `none`: not one that is known here, or no key decides; None: too few keys to tell
    keys        distinct keys in the sample
    shares      partitioner -> share of the keys that lie where it puts them
    scattered   keys that lie on more than one partition
    """

    verdict: PartitionerName | None
    keys: int
    shares: dict[Known, float]
    scattered: int

    @property
    def ranking(self) -> list[Known]:
        """The partitioners, the likeliest first."""
        return sorted(self.shares, key=lambda name: -self.shares[name])


def keys_needed(partitions: int) -> int | None:
    """So many distinct keys decide on a partitioner; None: no number does, because there is one partition only."""
    return None if partitions < 2 else math.ceil(-math.log(_CHANCE_MAX) / math.log(partitions))


def detect(sample: Iterable[tuple[bytes, int]], partitions: int) -> Detection:
    """Find out which partitioner chose the partitions of `sample`, pairs of a key and the partition it lies on.

    Two partitioners agree on one key of `partitions` by chance (murmur2 and crc32 on 13 % where there are 8), so keys
    decide together. A partitioner that has put more than half of the keys is the verdict even where others took part:
    its share says so.
    """
    places: dict[bytes, set[int]] = {}
    for key, found in sample:
        places.setdefault(key, set()).add(found)
    shares: dict[Known, float] = {}
    for name in ('murmur2', 'crc32', 'fnv1a'):
        right = sum(found == {partition(name, key, partitions)} for key, found in places.items())
        shares[name] = right / len(places) if places else 0.0
    scattered = sum(len(found) > 1 for found in places.values())
    needed = keys_needed(partitions)
    if needed is None or len(places) < needed:
        return Detection(None, len(places), shares, scattered)
    best = max(shares, key=lambda name: shares[name])
    chance = 1 / partitions
    # Where there are few partitions chance alone is near one half: the share must also lie far above it.
    margin = 6 * math.sqrt(chance * (1 - chance) / len(places))
    is_known = shares[best] == 1 or shares[best] > max(_MIXED_MIN, chance + margin)
    return Detection(best if is_known else 'none', len(places), shares, scattered)
