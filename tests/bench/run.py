"""All benches of the live worker, one after another, and one table of the figures that have a target.

    python -m tests.bench.run [--peers FOLDER] [--only latency,users] [--out build/bench]

`make bench` calls it. With `PEERS=DIR` the benches of the peers' harness are included. Each bench is also a command of
its own, and its docstring says what it measures. All together take about three and a half hours, and nothing else
should run on the machine. Five million users need 15 GB of disk for a while.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.bench.figures import ROOT, harness, say

BENCHES: dict[str, tuple[str, ...]] = {
    'rates': ('rates',),
    'skew': ('skew',),
    'hot_user': ('hot_user',),
    'triton': ('triton',),
    'latency': ('latency', '--scorer', 'triton'),
    'latency-constant': ('latency', '--scorer', 'constant'),
    'restart': ('restart',),
    'recovery': ('recovery',),
    'users': ('users', '--users', '1000000,5000000:4'),
    'disk': ('disk',),
    'scale': ('scale',),
    'scaling': ('scaling', '--workers', '1,4', '--events', '400000', '--runs', '7'),
    'memory': ('memory',),
    'small_models': ('small_models', '--triton'),
}


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('--peers', type=harness, help="folder of the peers' harness")
    made.add_argument('--only', default='', help='names, separated by commas')
    made.add_argument('--out', type=Path, default=ROOT / 'build' / 'bench', help='where each leaves its figures')
    options = made.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    peers = {name: (name, str(options.peers)) for name in ('peers', 'kstreams')} if options.peers else {}
    benches = peers | BENCHES
    if unknown := set(filter(None, options.only.split(','))) - benches.keys():
        made.error(f'no bench {", ".join(sorted(unknown))}; there are: {", ".join(benches)}')
    rows, failed = [], []
    for name, (module, *arguments) in benches.items():
        if options.only and name not in options.only.split(','):
            continue
        figures = options.out / f'{name}.json'
        figures.unlink(missing_ok=True)
        subprocess.run([sys.executable, '-m', f'tests.bench.{module}', *arguments, '--json', str(figures)], cwd=ROOT,
                       check=False)
        if not figures.exists():
            failed.append(name)
            continue
        rows += [(name, figure) for figure in json.loads(figures.read_text())['figures'] if figure['target']]
    say('\n| bench | figure | measured | target | |\n|---|---|---|---|---|')
    for name, figure in rows:
        say(f'| {name} | {figure["name"]} | {figure["value"]:,.4g} {figure["unit"]} | {figure["target"]} | '
            f'{"holds" if figure["holds"] else "does not hold"} |')
    if failed:
        say(f'No figures of: {", ".join(failed)}. See above.')
    return int(bool(failed) or not all(figure['holds'] for _, figure in rows))


if __name__ == '__main__':
    sys.exit(main())
