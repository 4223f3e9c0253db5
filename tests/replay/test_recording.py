"""Recordings: one stream in event-time order, whole, in bounded chunks, however it is sorted."""
import gzip
import io
import os
import resource
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import InputError, UsageError
from stream.replay.recording import Chunk, Recording
from stream.replay.rows import BadRow

T0 = 1_600_000_000_000
LONG_MS = 10**12

# Times in ms after T0; None is a row whose time cannot be read.
times_of_files = st.lists(st.lists(st.none() | st.integers(0, 50), max_size=40), min_size=1, max_size=3)


def line(number: int, after_ms: int | None) -> bytes:
    if after_ms is None:
        return b'no time %d' % number
    return orjson.dumps({'event_id': f'e{number}', 'user_id': 'u', 'ts': T0 + after_ms, 'type': 'view'})


def write_files(folder: Path, files: list[list[int | None]]) -> list[Path]:
    number = 0
    paths = []
    for file, times in enumerate(files):
        lines = [line(number + place, after_ms) for place, after_ms in enumerate(times)]
        number += len(times)
        path = folder / f'{file}.jsonl'
        path.write_bytes(b''.join(text + b'\n' for text in lines))
        paths.append(path)
    return paths


def scanned(paths: list[Path], format_name: str = 'events', **options) -> Recording:
    recording = Recording(paths, format_name, **options)
    recording.scan()
    return recording


def all_chunks(recording: Recording, events_max: int = 1000, span_ms_max: int = LONG_MS) -> list[Chunk]:
    return list(recording.chunks(events_max, span_ms_max))


def stream_of(recording: Recording, **bounds: int) -> list[tuple[int, bytes]]:
    return [pair for chunk in all_chunks(recording, **bounds)
            for pair in zip(chunk.numbers, chunk.values, strict=True)]


def expected_stream(files: list[list[int | None]]) -> list[tuple[int, bytes]]:
    """The rule of the docstrings, written the slow way."""
    times = [after_ms for file in files for after_ms in file]
    filled = []
    for after_ms in times:
        known = [filled[-1]] if filled else [ts for ts in times if ts is not None][:1]
        filled.append(after_ms if after_ms is not None else known[0] if known else 0)
    numbers = sorted(range(len(times)), key=lambda number: filled[number])      # stable
    return [(number, line(number, times[number])) for number in numbers]


# ---- the stream -----------------------------------------------------------------------------------------------------

@given(files=times_of_files, rows_in_memory_max=st.sampled_from([1, 3, 7, 1000]), events_max=st.integers(1, 9),
       span_ms_max=st.integers(0, 60))
def test_blocks_hold_every_row_in_order_within_their_bounds(
    tmp_path_factory, files, rows_in_memory_max, events_max, span_ms_max,
):
    paths = write_files(tmp_path_factory.mktemp('files'), files)
    recording = scanned(paths, rows_in_memory_max=rows_in_memory_max)
    chunks = all_chunks(recording, events_max, span_ms_max)

    stream = [pair for chunk in chunks for pair in zip(chunk.numbers, chunk.values, strict=True)]
    assert stream == expected_stream(files)
    assert recording.rows == len(stream)
    for chunk in chunks:
        assert 1 <= len(chunk.values) <= events_max
        assert 0 <= chunk.last_ms - chunk.first_ms <= span_ms_max
        assert chunk.bad == {}
    for before, after in pairwise(chunks):
        assert before.last_ms <= after.first_ms
        # as long as it may be
        assert len(before.values) == events_max or after.first_ms - before.first_ms > span_ms_max


def test_sorted_unsorted_and_spilled_give_the_same_stream(tmp_path):
    """More rows than one chunk of a spilled run, so that runs are read in turns."""
    times = [(place * 7919) % 5003 for place in range(5000)]
    paths = write_files(tmp_path, [times])
    in_memory = scanned(paths)
    spilled = scanned(paths, rows_in_memory_max=1200)
    assert not in_memory.in_order
    expected = expected_stream([times])
    assert stream_of(in_memory) == stream_of(spilled) == expected

    in_order = tmp_path / 'sorted.jsonl'
    in_order.write_bytes(b''.join(value + b'\n' for _, value in expected))
    recording = scanned([in_order])
    assert recording.in_order
    assert [value for _, value in stream_of(recording)] == [value for _, value in expected]


def test_a_stream_in_order_counts_its_rows_by_ranges(tmp_path):
    recording = scanned(write_files(tmp_path, [[1, 2], [], [2, 9]]))
    assert recording.in_order
    assert [chunk.numbers for chunk in all_chunks(recording, events_max=3)] == [range(3), range(3, 4)]
    assert (recording.first_ms, recording.last_ms) == (T0 + 1, T0 + 9)


def test_files_in_order_whose_times_overlap_are_merged(tmp_path):
    recording = scanned(write_files(tmp_path, [[1, 5], [2, 5, 6]]))
    assert not recording.in_order
    assert [number for number, _ in stream_of(recording)] == [0, 2, 1, 3, 4]


def test_rows_without_a_time_stay_beside_their_neighbours(tmp_path):
    recording = scanned(write_files(tmp_path, [[None, None, 9, None, 3, None]]))
    assert [number for number, _ in stream_of(recording)] == [4, 5, 0, 1, 2, 3]
    assert (recording.first_ms, recording.last_ms) == (T0 + 3, T0 + 9)


def test_the_first_readable_time_may_come_many_rows_later(tmp_path):
    files = [[None] * 10_000, [None, 5, 4]]
    recording = scanned(write_files(tmp_path, files))
    assert (recording.first_ms, recording.last_ms) == (T0 + 4, T0 + 5)
    assert stream_of(recording) == expected_stream(files)


def test_nothing_readable_and_nothing_at_all(tmp_path):
    unreadable = scanned(write_files(tmp_path, [[None, None]]))
    assert (unreadable.rows, unreadable.in_order, unreadable.first_ms, unreadable.last_ms) == (2, True, 0, 0)
    assert len(stream_of(unreadable)) == 2
    empty = scanned(write_files(tmp_path, [[], []]))
    assert (empty.rows, empty.in_order, all_chunks(empty)) == (0, True, [])


def test_both_passes_can_be_repeated(tmp_path):
    recording = scanned(write_files(tmp_path, [[3, 1, 2]]))
    once = stream_of(recording)
    recording.scan()
    assert stream_of(recording) == once


def test_scan_reports_its_progress(tmp_path):
    seen: list[int] = []
    Recording(write_files(tmp_path, [[1] * 9000, [2]]), 'events').scan(seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 9001


# ---- bad rows and ids -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rows_in_memory_max', [1, 1000])
def test_bad_rows_keep_their_place(tmp_path, rows_in_memory_max):
    path = tmp_path / 'clicks.csv'
    path.write_bytes(b'user_id,brand_id,type,visit_datetime\n1,2,0,6-5\n,2,0,6-4\n1,2,0,6-4\n\xff')
    recording = scanned([path], 'tmall', rows_in_memory_max=rows_in_memory_max)
    chunk, = all_chunks(recording)
    assert chunk.numbers == [2, 3, 0, 1]
    assert chunk.bad == {1: BadRow(b'\xff', 'short_row', '1 fields, expected 4'),
                         3: BadRow(b',2,0,6-4', 'no_user', 'the user id is empty')}
    assert [chunk.values[place] for place in chunk.bad] == [b'\xff', b',2,0,6-4']


def test_ids_count_equal_rows_over_all_files_and_are_the_same_in_each_pass(tmp_path):
    paths = [tmp_path / 'a.csv', tmp_path / 'b.csv.gz']
    content = b'user_id,brand_id,type,visit_datetime\n1,2,0,6-5\n1,2,0,6-5\n'
    paths[0].write_bytes(content)
    paths[1].write_bytes(gzip.compress(content))
    recording = scanned(paths, 'tmall')
    ids = [orjson.loads(value)['event_id'] for _, value in stream_of(recording)]
    assert [event_id[-2:] for event_id in ids] == ['-1', '-2', '-3', '-4']
    assert [orjson.loads(value)['event_id'] for _, value in stream_of(recording)] == ids


def test_locate_names_the_file_and_the_row_in_it(tmp_path):
    paths = write_files(tmp_path, [[], [1, 2], [], [3], []])
    recording = scanned(paths)
    assert [recording.locate(number) for number in range(3)] == [(paths[1], 1), (paths[1], 2), (paths[3], 1)]
    for number in (-1, 3):
        with pytest.raises(IndexError):
            recording.locate(number)


# ---- disk -----------------------------------------------------------------------------------------------------------

def test_nothing_is_left_of_a_sort_on_disk(tmp_path):
    spill_dir = tmp_path / 'spill'
    spill_dir.mkdir()
    recording = scanned(write_files(tmp_path, [[*range(500, 0, -1)]]), rows_in_memory_max=10, spill_dir=spill_dir)
    chunks = recording.chunks(1, LONG_MS)
    next(chunks)
    assert list(spill_dir.iterdir()) == []      # not even while it is in use
    chunks.close()
    assert list(spill_dir.iterdir()) == []


def test_a_sort_in_memory_needs_no_folder(tmp_path):
    paths = write_files(tmp_path, [[2, 1]])
    recording = scanned(paths, rows_in_memory_max=2, spill_dir=tmp_path / 'absent')
    assert len(stream_of(recording)) == 2
    with pytest.raises(InputError, match='cannot be sorted on disk') as raised:
        all_chunks(scanned(paths, rows_in_memory_max=1, spill_dir=tmp_path / 'absent'))
    assert 'another folder' in raised.value.do


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, _data):
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr('stream.replay.recording.TemporaryFile', lambda **_: FullDisk())
    with pytest.raises(InputError, match='No space left'):
        all_chunks(scanned(write_files(tmp_path, [[2, 1]]), rows_in_memory_max=1))


def test_many_runs_need_one_open_file(tmp_path):
    """A long recording has more runs than a process may have files open."""
    times = [*range(500, 0, -1)]
    recording = scanned(write_files(tmp_path, [times]), rows_in_memory_max=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(tmp_path, os.O_RDONLY)      # the lowest free number: about as many files are open
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 20, hard))
    try:
        stream = stream_of(recording)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [number for number, _ in stream] == [*range(499, -1, -1)]


# ---- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rows_in_memory_max', [1, 1000])
@pytest.mark.parametrize('times', [[1, 2, 3], [3, 2, 1]])
@pytest.mark.parametrize('changed_file', [0, 1])
@pytest.mark.parametrize('rows_more', [-1, 1])
def test_a_file_that_changes_between_the_passes_is_an_error(
    tmp_path, rows_in_memory_max, times, changed_file, rows_more,
):
    paths = write_files(tmp_path, [times, times])
    recording = scanned(paths, rows_in_memory_max=rows_in_memory_max)
    lines = paths[changed_file].read_bytes().splitlines(keepends=True)
    paths[changed_file].write_bytes(b''.join([*lines, lines[0]] if rows_more == 1 else lines[:-1]))
    with pytest.raises(InputError, match=f'{changed_file}.jsonl changed while it was replayed'):
        all_chunks(recording)


def test_wrong_calls(tmp_path):
    with pytest.raises(UsageError, match='no format') as raised:
        Recording([tmp_path], 'csv')
    assert 'retailrocket' in raised.value.do
    with pytest.raises(UsageError, match='No file'):
        Recording([], 'events')
    with pytest.raises(InputError, match='no file'):
        scanned([tmp_path / 'absent.jsonl'])
    paths = write_files(tmp_path, [[1]])
    with pytest.raises(RuntimeError, match='scan'):
        Recording(paths, 'events').chunks(1, 1)
    for events_max, span_ms_max in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match='no room'):
            scanned(paths).chunks(events_max, span_ms_max)


def test_a_pipe_is_refused_before_it_is_read(tmp_path: Path):
    os.mkfifo(tmp_path / 'pipe')        # to open it would wait for a writer
    with pytest.raises(InputError, match='pipe is not a file') as caught:
        Recording([tmp_path / 'pipe'], 'events').scan()
    assert caught.value.do.startswith('save the rows as a file')


def test_the_null_device_is_an_empty_recording():
    recording = Recording([Path(os.devnull)], 'events')
    recording.scan()
    assert recording.rows == 0
