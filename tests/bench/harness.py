"""Runs the peers' harness with our worker among its peers. Started by `tests.bench.peers`, with the peers' interpreter.

    python harness.py FOLDER OUR_PYTHON ROOT [the harness's own arguments]

Nothing of the harness is changed on disk; its table of peers gets three entries, and our messages' names are mapped to
the ones that it checks: `events_seen` (up to its window of 64) is n, `as_of_ms` last_ts.
"""
import json
import os
import sys
import types

FOLDER, PYTHON, ROOT = sys.argv[1:4]
sys.path.insert(0, FOLDER)
os.chdir(FOLDER)
import run  # noqa: E402 - the harness, from FOLDER


def loads(text):
    value = json.loads(text)
    if isinstance(value, dict) and 'events_seen' in value:
        value['n'], value['last_ts'] = min(64, value['events_seen']), value['as_of_ms']
    return value


def peer(job, per):
    return {'cmd': [PYTHON, os.path.join(ROOT, 'tests', 'bench', 'peer.py')], 'env': {'JOB': job, 'PYTHONPATH': ROOT},
            'per': per, 'durable': True}


run.PEERS['stream'] = peer('full', 'user per step')
run.PEERS['stream-events'] = peer('events', 'event')
run.PEERS['stream-peers-job'] = peer('peers', 'user per step')
run.json = types.SimpleNamespace(loads=loads, dumps=json.dumps, dump=json.dump)
sys.argv[1:] = sys.argv[4:]
run.main()
