"""The figures of a bench: each has a name, a unit and, where one is set, a target.

    python -m tests.bench.NAME [--json FILE] [--set SETTING=VALUE ...]

A bench prints one line per figure and says whether its target holds. The exit code is 1 if one does not hold. Targets
are meant for the default sizes. `--json` writes the same figures to a file.
"""
import argparse
import json
import logging
import signal
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
T = TypeVar('T')


@dataclass
class Figure:
    """One number. `holds` is None if there is no target."""

    name: str
    value: float
    unit: str
    target: str = ''
    holds: bool | None = None

    def __str__(self) -> str:
        verdict = {None: '', True: f'   target {self.target}: met', False: f'   target {self.target}: NOT MET'}
        return f'{self.name:<58} {_number(self.value):>12} {self.unit}{verdict[self.holds]}'


class Report:
    """The figures of one bench, printed as they come."""

    def __init__(self, bench: str, options: argparse.Namespace) -> None:
        self.figures: list[Figure] = []
        self._bench = bench
        self._options = options
        say(f'== {bench}: ' + ' '.join(f'{name}={value}' for name, value in vars(options).items() if name != 'json'))

    def add(self, name: str, value: float, unit: str, at_most: float | None = None,
            at_least: float | None = None) -> None:
        """A figure and, with one of the bounds, its target."""
        figure = Figure(name, float(value), unit)
        if at_most is not None:
            figure.target, figure.holds = f'<= {_number(at_most)}', bool(value <= at_most)
        elif at_least is not None:
            figure.target, figure.holds = f'>= {_number(at_least)}', bool(value >= at_least)
        self.figures.append(figure)
        say(str(figure))

    def spread(self, name: str, values: Sequence[float], unit: str, **target: float) -> None:
        """The median as a figure, with the smallest and the largest in its name."""
        self.add(f'{name} ({_number(min(values))} .. {_number(max(values))}, {len(values)} runs)',
                 statistics.median(values), unit, **target)

    def end(self) -> int:
        """Write the JSON, if asked to; return the exit code."""
        if self._options.json:
            sizes = {name: value for name, value in vars(self._options).items() if name != 'json'}
            Path(self._options.json).write_text(json.dumps(
                {'bench': self._bench, 'options': sizes, 'figures': [vars(figure) for figure in self.figures]},
                indent=2, default=str) + '\n')
        return int(any(figure.holds is False for figure in self.figures))


def _number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 1000 or value == int(value) else f'{value:,.3g}'


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A bench's command line, with what all of them take."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('--json', help='write the figures there')
    made.add_argument('--set', dest='settings', action='append', default=[], metavar='NAME=VALUE',
                      help='any setting of the worker')
    return made


def several(kind: Callable[[str], T], allowed: Collection[T] = ()) -> Callable[[str], list[T]]:
    """The type of an option whose values are separated by commas. `allowed` are its only values, if given."""
    def parsed(text: str) -> list[T]:
        try:
            values = [kind(part) for part in text.split(',')]
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text} is not a list of numbers, such as 1,2') from None
        if wrong := [str(value) for value in values if allowed and value not in allowed]:
            raise argparse.ArgumentTypeError(f'no {", ".join(wrong)}; choose from {", ".join(map(str, allowed))}')
        return values
    return parsed


def harness(text: str) -> Path:
    """The type of an option that names the folder of the peers' harness."""
    folder = Path(text).resolve()
    if not (folder / 'kstreams').is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the folder of the peers' harness: it has no folder kstreams")
    return folder


def main(bench: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> None:
    """Run it; SIGTERM ends it as Ctrl-C does, so that whatever it started is stopped."""
    logging.getLogger('aiokafka').setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(bench(options))
