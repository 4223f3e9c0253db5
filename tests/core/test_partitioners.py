"""Partitioners: the published values of each, and what a sample of keys says about who wrote it."""
import random
from hashlib import md5

import pytest
from aiokafka.partitioner import murmur2 as peer_murmur2
from hypothesis import given
from hypothesis import strategies as st

from stream.core.partitioners import MISROUTED, detect, fnv1a, keys_needed, misrouted, murmur2, partition

TEXT = b'PreAmbleWillBeRemoved,ThePrePartThatIs'
KEYS = [b'kafka', b'giberish123456789', b'1234', b'234', b'34', b'4', TEXT, TEXT[1:], TEXT[2:], TEXT[3:], b'']
# librdkafka's unit tests (rdmurmur2.c from the Java client, rdfnv1a.c from Sarama's).
MURMUR2 = [0xD067CF64, 0x8F552B0C, 0x9FC97B14, 0xE7C009CA, 0x873930DA, 0x5A4B5CA1, 0x78424F1C, 0x4A62B377, 0xE0E4E09E,
           0x62B8B43F, 0x106E08D9]
FNV1A = [0x0D33C4E1, 0x77A58295, 0x023BDD03, 0x2DEA3CD2, 0x740FA83E, 0x310CA263, 0x65CBD69C, 0x6E49C79A, 0x69EED356,
         0x6ABCC023, 0x7EE3623B]


def test_hashes_have_the_published_values():
    assert [murmur2(key) for key in KEYS] == MURMUR2
    assert [fnv1a(key) for key in KEYS] == FNV1A


@given(st.binary(max_size=300))
def test_murmur2_agrees_with_another_implementation(key: bytes):
    assert murmur2(key) == peer_murmur2(key) & 0xFFFF_FFFF


def test_murmur2_agrees_on_keys_of_every_length_up_to_the_longest():
    draw = random.Random(3)
    for length in (*range(270), 1023, 1024, 65_537):
        key = draw.randbytes(length)
        assert murmur2(key) == peer_murmur2(key) & 0xFFFF_FFFF, length


def test_partitions_follow_the_clients_rules():
    assert partition('murmur2', b'kafka', 7) == (0xD067CF64 & 0x7FFF_FFFF) % 7 != 0xD067CF64 % 7
    assert partition('crc32', b'123456789', 10) == 0xCBF43926 % 10      # the check value of CRC-32
    assert partition('fnv1a', b'giberish123456789', 10) == 0x77A58295 % 10
    # 32 bits of FNV-1a of the second key have their sign bit set: the absolute value, not the bit cleared.
    assert 0x77A58295 == (1 << 32) - 0x885A7D6B != 0x885A7D6B & 0x7FFF_FFFF


@given(st.binary(max_size=40), st.integers(1, 5000), st.sampled_from(['murmur2', 'crc32', 'fnv1a']))
def test_a_partition_exists(key: bytes, partitions: int, name):
    assert 0 <= partition(name, key, partitions) < partitions


def test_two_partitioners_agree_on_an_eighth_of_the_keys():
    keys = [b'u%d' % number for number in range(20_000)]
    same = sum(partition('murmur2', key, 8) == partition('crc32', key, 8) for key in keys) / len(keys)
    assert 0.115 < same < 0.135


def test_a_key_elsewhere_is_refused_with_both_places():
    right = partition('crc32', b'ada', 8)
    assert misrouted('crc32', b'ada', right, 8) is None
    refusal = misrouted('crc32', b'ada', (right + 1) % 8, 8)
    assert refusal is not None
    assert refusal.reason == MISROUTED
    assert refusal.detail == f'on partition {(right + 1) % 8} of 8, where crc32 would have chosen {right}'
    assert misrouted('none', b'ada', (right + 1) % 8, 8) is None


def sample(name, keys: int, partitions: int = 8) -> list[tuple[bytes, int]]:
    return [(key, partition(name, key, partitions)) for key in (b'u%d' % number for number in range(keys))]


@pytest.mark.parametrize('name', ['murmur2', 'crc32', 'fnv1a'])
@pytest.mark.parametrize('partitions', [2, 3, 8, 100])
def test_a_sample_of_keys_gives_its_partitioner_away(name, partitions: int):
    found = detect(sample(name, 100, partitions), partitions)
    assert (found.verdict, found.keys, found.shares[name]) == (name, 100, 1.0)


def test_a_few_keys_are_too_few_and_one_partition_says_nothing():
    needed = keys_needed(8)
    assert needed == 7
    assert detect(sample('crc32', needed - 1), 8).verdict is None
    assert detect(sample('crc32', needed), 8).verdict == 'crc32'
    assert detect(sample('crc32', 3) * 100, 8).keys == 3        # repeats of a key are one key
    assert keys_needed(1) is None
    assert detect(sample('crc32', 1000, 1), 1).verdict is None
    assert detect([], 8).verdict is None


def test_a_majority_is_the_verdict_and_its_share_tells_of_the_others():
    keys = [b'u%d' % number for number in range(1000)]
    mixed = [(key, partition('murmur2' if number % 10 else 'crc32', key, 8)) for number, key in enumerate(keys)]
    found = detect(mixed, 8)
    assert found.verdict == 'murmur2'
    assert 0.9 <= found.shares['murmur2'] < 0.93


@pytest.mark.parametrize('partitions', [2, 8])
def test_another_rule_is_none_of_them(partitions: int):
    draw = random.Random(7)
    pairs = [(b'u%d' % number, draw.randrange(partitions)) for number in range(500)]
    assert detect(pairs, partitions).verdict == 'none'
    by_md5 = [(key, md5(key).digest()[0] % partitions) for key, _ in pairs]
    assert detect(by_md5, partitions).verdict == 'none'


def test_a_key_on_several_partitions_follows_no_partitioner():
    pairs = [(b'u%d' % (number % 50), number % 8) for number in range(500)]
    found = detect(pairs, 8)
    assert (found.verdict, found.keys) == ('none', 50)
