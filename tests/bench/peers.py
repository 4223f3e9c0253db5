"""Our worker and other stream processors with the peers' job on one broker: ratios of rates, and CPU per event.

    python -m tests.bench.peers FOLDER [--events 400000 --runs 7 --slow-events 30000 --streams kstreams-1t-cache]

FOLDER is the peers' harness. Its README says what it measures, and what differs between the peers. It is copied to
build/bench and gets an environment there, and our worker becomes three more peers. The runs of a call are interleaved.
A ratio is the median, over the runs, of the rates of one round. Quix Streams and idiomatic Faust have a round of their
own with fewer events, because they take minutes; the start of a worker counts for more there.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.figures import ROOT, Report, harness, main, parser, say
from tests.bench.live import broker

STREAMS = ('kstreams-1t-nocache', 'kstreams-1t-cache', 'kstreams-2t-nocache', 'kstreams-2t-cache',
           'kstreams-2t-dsl-cache')
PACKED = 'aiokafka-durable-packed'
QUICK = (PACKED, 'stream', 'stream-events', 'stream-peers-job')
SLOW = ('stream', 'quix', 'faust')


def prepared(folder: Path) -> Path:
    """A copy of the harness with its environment and jars; made once for each version of its files."""
    copy = ROOT / 'build' / 'bench' / 'peers'
    ready = copy / 'ready'
    newest = max(path.stat().st_mtime for path in folder.rglob('*'))
    if ready.exists() and ready.stat().st_mtime > newest:
        return copy
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns('target', '.venv*'), copy_function=shutil.copyfile)
    uv = Path(sys.executable).with_name('uv')
    subprocess.run([uv, 'venv', '--quiet', '--python', sys.executable, copy / '.venv'], check=True)
    subprocess.run([uv, 'pip', 'install', '--quiet', '--python', copy / '.venv' / 'bin' / 'python', '-r',
                    copy / 'requirements.txt'], check=True)
    subprocess.run(['mvn', '-q', '-B', '-f', copy / 'kstreams' / 'pom.xml', 'package'], check=True)
    ready.touch()
    return copy


def rounds(copy: Path, brokers: str, peers: tuple[str, ...], events: int, runs: int) -> dict[str, list[dict[str, Any]]]:
    """The harness's measurements: peer -> one entry per round. Errors: SystemExit where a run failed or was wrong."""
    results = copy / 'results.json'
    python = copy / '.venv' / 'bin' / 'python'
    environment = {name: value for name, value in os.environ.items() if not name.startswith('STREAM_')}
    subprocess.run([python, ROOT / 'tests' / 'bench' / 'harness.py', copy, sys.executable, ROOT,
                    '--peers', ','.join(peers), '--events', str(events), '--runs', str(runs), '--out', results],
                   check=True, env=environment | {'KAFKA': brokers, 'PY': str(python)})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    for row in sorted(json.loads(results.read_text())['rows'], key=lambda row: row['run']):
        if row['error'] or row['users_wrong']:
            raise SystemExit(f'{row["peer"]}: {row["error"] or str(row["users_wrong"]) + " users wrong"}')
        found[row['peer']].append(row)
    return found


def bench(options: argparse.Namespace) -> int:
    report = Report('peers', options)
    copy = prepared(options.folder)
    with broker() as (brokers, _):
        streams = options.streams.split(',')
        quick = rounds(copy, brokers, (*QUICK, *streams), options.events, options.runs)
        slow = rounds(copy, brokers, SLOW, options.slow_events, options.runs)

    def rates(name: str, of: dict[str, list[dict[str, Any]]] = quick) -> list[float]:
        return [row['events_s'] for row in of[name]]

    def ratio(what: str, ours: list[float], theirs: list[float], at_least: float) -> None:
        report.spread(what, [our / their for our, their in zip(ours, theirs, strict=True)], 'x', at_least=at_least)

    for name in quick:
        report.spread(f'{name}: rate', rates(name), 'events/s')
    best = max(streams, key=lambda name: statistics.median(rates(name)))
    per_event = [name for name in streams if 'dsl' not in name]
    best_per_event = max(per_event, key=lambda name: statistics.median(rates(name)))
    say(f'best Kafka Streams variant: {best}; with one output per event: {best_per_event}')
    ratio(f"peers' job and message / {PACKED}", rates('stream-peers-job'), rates(PACKED), 0.85)
    ratio(f'our full message / {PACKED}', rates('stream'), rates(PACKED), 0.6)
    ratio('our full message / best Kafka Streams variant', rates('stream'), rates(best), 1.0)
    ratio('our full message / Quix Streams', rates('stream', slow), rates('quix', slow), 4.0)
    ratio('our full message / idiomatic Faust', rates('stream', slow), rates('faust', slow), 30.0)
    ratio('one output per event / best Kafka Streams variant with one', rates('stream-events'), rates(best_per_event),
          1.0)
    report.spread('our full message: CPU per million events',
                  [row['cpu_s'] / options.events * 1e6 for row in quick['stream']], 's', at_most=15)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('folder', type=harness, help="the peers' harness")
    made.add_argument('--events', type=int, default=400_000)
    made.add_argument('--slow-events', type=int, default=30_000, help='where Quix Streams and Faust take part')
    made.add_argument('--streams', default=','.join(STREAMS), help='variants of Kafka Streams')
    made.add_argument('--runs', type=int, default=7)
    main(bench, made.parse_args())
