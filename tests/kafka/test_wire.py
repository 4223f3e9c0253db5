"""Requests are the bytes that aiokafka's structs make, and responses are read as its structs read them."""
from io import BytesIO
from typing import Any

import pytest
from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol import fetch, produce
from aiokafka.protocol.api import RequestHeader_v1
from hypothesis import given
from hypothesis import strategies as st

from stream.kafka import wire
from stream.kafka.requests import FetchRequest, ProduceRequest

INT32 = st.integers(0, 2**31 - 1)
INT64 = st.integers(-1, 2**63 - 1)
CODE = st.integers(-1, 120)
TOPIC = st.text('abcdefghijklmnopqrstuvwxyz.-_', min_size=1, max_size=30)
FETCH_VERSIONS, PRODUCE_VERSIONS = range(4, 12), range(3, 9)


def lists(part: Any, size_max: int = 4) -> Any:
    return st.dictionaries(TOPIC, st.lists(part, min_size=1, max_size=size_max), max_size=3)


def struct_of(module: Any, name: str, version: int) -> Any:
    return getattr(module, f'{name}_v{version}')


@pytest.mark.parametrize('version', FETCH_VERSIONS)
@given(lists(st.tuples(INT32, INT64)))
def test_a_fetch_request(version: int, topics: dict[str, list[tuple[int, int]]]):
    request = FetchRequest((200, 1, 50 << 20, 1, 1 << 20), {name.encode(): parts for name, parts in topics.items()})
    request.prepare({1: (0, version)})
    theirs = fetch.FetchRequest(200, 1, 50 << 20, 1, [
        (name, [(number, offset, 1 << 20) for number, offset in parts]) for name, parts in topics.items()], rack_id='')
    built: Any = theirs.build(struct_of(fetch, 'FetchRequest', version))
    assert request.encode() == built.encode()
    assert request.build_request_header(7, 'me').encode() == RequestHeader_v1(built, 7, 'me').encode()


@st.composite
def fetched(draw: Any) -> Any:
    return draw(lists(st.tuples(INT32, CODE, INT64, INT64, INT64, st.lists(st.tuples(INT64, INT64), max_size=3), INT32,
                                st.binary(max_size=100))))


@pytest.mark.parametrize('version', FETCH_VERSIONS)
@given(fetched())
def test_a_fetch_response(version: int, topics: dict[str, list[Any]]):
    def fields(number: int, code: int, end: int, stable: int, begin: int, aborted: Any, replica: int,
               data: bytes) -> Any:
        return (number, code, end, stable, *([begin] if version >= 5 else []), aborted,
                *([replica] if version >= 11 else []), data)
    head = (0, 0, 0) if version >= 7 else (0,)
    response = struct_of(fetch, 'FetchResponse', version)(
        *head, [(name, [fields(*part) for part in parts]) for name, parts in topics.items()]).encode()
    failed, found = FetchRequestOf(version).decode(BytesIO(b'head' + response))
    assert failed == 0
    assert found == [((name, number), code, end, stable, aborted or None, data) for name, parts in topics.items()
                     for number, code, end, stable, _, aborted, _, data in parts]
    for size in range(len(response)):
        with pytest.raises(ValueError, match='too early'):
            wire.fetch_response(response[:size], 0, version)


def FetchRequestOf(version: int) -> FetchRequest:  # noqa: N802
    return FetchRequest((0, 0, 0, 0, 0), {}).prepare({1: (0, version)})


@pytest.mark.parametrize('version', PRODUCE_VERSIONS)
@given(lists(st.tuples(INT32, st.binary(max_size=200))))
def test_a_produce_request(version: int, topics: dict[str, list[tuple[int, bytes]]]):
    request = ProduceRequest(30_000, {name.encode(): [(number, bytearray(data)) for number, data in parts]
                                      for name, parts in topics.items()})
    request.prepare({0: (0, version)})
    built = struct_of(produce, 'ProduceRequest', version)(None, -1, 30_000, list(topics.items()))
    assert request.encode() == built.encode()
    assert request.build_request_header(7, 'me').encode() == RequestHeader_v1(built, 7, 'me').encode()


@pytest.mark.parametrize('version', PRODUCE_VERSIONS)
@given(lists(st.tuples(INT32, CODE, INT64, INT64, INT64, st.sampled_from([None, 'no', 'why not']))))
def test_a_produce_response(version: int, topics: dict[str, list[Any]]):
    def fields(number: int, code: int, offset: int, time: int, begin: int, text: str | None) -> Any:
        return (number, code, offset, time, *([begin] if version >= 5 else []),
                *([[(0, 'one record')], text] if version >= 8 else []))
    response = struct_of(produce, 'ProduceResponse', version)(
        [(name, [fields(*part) for part in parts]) for name, parts in topics.items()], 0).encode()
    request = ProduceRequest(0, {}).prepare({0: (0, version)})
    assert request.decode(BytesIO(b'head' + response)) == [
        (name.encode(), number, code, offset, (text or 'one record').encode() if version >= 8 else None)
        for name, parts in topics.items() for number, code, offset, _, _, text in parts]
    for size in range(len(response)):
        with pytest.raises(ValueError, match='too early'):
            wire.produce_response(response[:size], 0, version)


@pytest.mark.parametrize('offered', [{}, {1: (12, 17)}, {1: (0, 3)}])
def test_a_broker_of_other_versions_is_refused(offered: dict[int, tuple[int, int]]):
    with pytest.raises(IncompatibleBrokerVersion, match='Fetch'):
        FetchRequest((0, 0, 0, 0, 0), {}).prepare(offered)


def test_lists_that_are_absent_are_empty():
    head = b'\0\0\0\0' + b'\0\0\0\1' + b'\0\1a' + b'\0\0\0\1'
    part = b'\0\0\0\2' + b'\0\0' + bytes(7) + b'\7' + bytes(7) + b'\6' + b'\xff\xff\xff\xff' + b'\xff\xff\xff\xff'
    assert wire.fetch_response(head + part, 0, 4) == (0, [(('a', 2), 0, 7, 6, None, b'')])


@pytest.mark.parametrize('count', [2**31 - 1, 1000])
def test_a_count_that_cannot_be_true_is_refused(count: int):
    with pytest.raises(ValueError, match='too early'):
        wire.produce_response(count.to_bytes(4, 'big') + bytes(20), 0, 3)
