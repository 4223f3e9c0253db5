"""All of stream on this machine without Docker: Kafka, Triton, a worker, and the events of simulated shoppers.

Each process has a folder in build/local with its log and pid file. `down` stops them and removes the folders.
"""
import argparse
import asyncio
import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from deploy.local.install import HERE, PARTS, ROOT, install_kafka, install_triton
from deploy.local.parts import SHIPPED, Kafka, Part, Triton
from deploy.local.processes import HOST, PartError, answers, free_port, recorded, stop_process
from stream.errors import StreamError
from stream.scoring.repository import VARIANTS, write_repository

LOCAL = ROOT / 'build' / 'local'
RANKING = SHIPPED.parents[1] / 'shopper_next' / '1'     # ranks what is bought next; served for other clients of Triton
STREAM = Path(sys.executable).with_name('stream')
ORDER = ('kafka', 'triton', 'worker', 'publisher')     # of starting; stopped in reverse order
SHOPPERS, DAYS, EVENTS_PER_SECOND = 600, 180, 300
WORKER_STOP_SECONDS_MAX = 35.0      # it first finishes the steps in flight
FIRST_ALERT_SECONDS_MAX = 120.0


class Program(Part):
    """A command of stream that runs in the background."""

    def __init__(self, name: str, command: Sequence[str | Path], answers: Callable[[], bool]) -> None:
        self.name = name
        super().__init__(LOCAL / name, tied=False)
        self._arguments, self._ready = [str(STREAM), *map(str, command)], answers

    def _choose_ports(self) -> None:
        """Its ports are in its settings."""

    def _command(self) -> tuple[list[str], dict[str, str]]:
        return self._arguments, {}

    def _answers(self) -> bool:
        return self._ready()


def up(only_parts: bool) -> None:
    """Start everything and wait for the first alert. If something fails, stop everything again."""
    with _locked():
        if running := _running():
            _start_again([name for name in _state().get('parts', ORDER) if name not in running])
            _print_where()
            return
        shutil.rmtree(LOCAL, ignore_errors=True)
        LOCAL.mkdir(parents=True)
        try:
            _start(only_parts)
        except BaseException:
            logs = {path.name: path.read_text(errors='replace')[-2_000:] for path in LOCAL.glob('*/*.log')}
            _stop()
            for name in ('worker.log', 'publisher.log'):
                if logs.get(name):
                    print(f'--- the end of {name} ---\n{logs[name]}', file=sys.stderr)
            raise
    _print_where()


def _start_again(ended: list[str]) -> None:
    """Restart the parts that have stopped, on the same ports and data."""
    if 'publisher' in ended and _published():
        ended.remove('publisher')
    if lost := [name for name in ended if name in ('kafka', 'publisher')]:
        raise PartError(f'{" and ".join(lost)} stopped unexpectedly. See the log in {_near(LOCAL)}.',
                        'run make down, then make up.')
    state = _state()
    if 'triton' in ended:
        _say('Triton has stopped: restarting it')
        triton = Triton(LOCAL / 'triton', tied=False, others=[RANKING])
        triton.port = state['triton_port']      # where the worker looks for it
        triton.start()
    if 'worker' in ended:
        _say('the worker has stopped: restarting it; it continues where it stopped')
        _worker(state['admin']).start()
    print('Already running.' if not ended else 'Running again.')


def _worker(admin: str) -> Program:
    return Program('worker', ['worker', '--config', LOCAL / 'stream.toml'], lambda: answers(f'http://{admin}/ready'))


def _start(only_parts: bool) -> None:
    _say('fetching Kafka and Triton (only once, about a minute) and starting them')
    install_kafka()
    install_triton()
    kafka = Kafka(LOCAL / 'kafka', tied=False).start()
    triton = Triton(LOCAL / 'triton', tied=False, others=[RANKING])
    state = {'brokers': kafka.brokers, 'triton': triton.address, 'triton_port': triton.port, 'parts': ORDER[:2]}
    _write_state(state)
    triton.start()
    if only_parts:
        return
    admin_port, config, events = free_port(), LOCAL / 'stream.toml', LOCAL / 'events.jsonl'
    settings = {
        'brokers': kafka.brokers, 'scorer': 'triton', 'triton': triton.address, 'model': str(SHIPPED),
        'state_dir': str(LOCAL / 'worker' / 'state'), 'admin_host': HOST, 'admin_port': admin_port, 'clock': 'wall'}
    config.write_text(tomli_w.dumps(settings))
    _write_state(state | {'admin': f'{HOST}:{admin_port}', 'parts': ORDER})
    _say('creating the topics, simulating shoppers, starting the worker')
    _stream('topics', '--config', config)
    _stream('simulate', events, '--shoppers', str(SHOPPERS), '--days', str(DAYS), '--noise', '0.002')
    worker = _worker(f'{HOST}:{admin_port}').start()
    publisher = Program('publisher', ['publish', events, '--rate', str(EVENTS_PER_SECOND), '--shift-to-now',
                                      '--json', '--config', config], lambda: True)
    publisher.start()
    _say('waiting for the first alert')
    alert = asyncio.run(_first_alert(kafka.brokers, lambda: worker.running and (publisher.running or _published())))
    if alert is None:
        raise PartError(f'No alert came within {FIRST_ALERT_SECONDS_MAX:.0f} s.', 'see the logs above.')
    print(_one_line(alert))


def _stream(*arguments: str | Path) -> None:
    done = subprocess.run([STREAM, *arguments], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise PartError(f'stream {arguments[0]} failed:\n{done.stderr}', 'see above.')


def down() -> None:
    """Stop everything, in an order that loses nothing, and remove its files."""
    with _locked():
        stopped = _stop()
    print(f'Stopped: {", ".join(stopped)}.' if stopped else 'Nothing is running.')


def _stop() -> list[str]:
    names, state = [], _state()
    for name in reversed(ORDER):
        if process := recorded(LOCAL / name / f'{name}.pid'):
            stop_process(*process, seconds_max=WORKER_STOP_SECONDS_MAX)
            names.append(name)
    for path in Path('/dev/shm').glob(f'stream-triton-{state.get("triton_port", "none")}-*'):
        path.unlink(missing_ok=True)
    shutil.rmtree(LOCAL, ignore_errors=True)
    return names


def status() -> None:
    """Show what is running."""
    running = _running()
    if not running:
        print('Nothing is running.')
        return
    for name in _state().get('parts', ORDER):
        done = 'done: all events are published' if name == 'publisher' and _published() else 'not running: see its log'
        print(f'{name:10} {f"pid {running[name]}" if name in running else done}')
    _print_where()


def alerts(count: int) -> None:
    """Print alerts as they come, oldest first: the first `count`, or until Ctrl-C."""
    async def show() -> None:
        left = count
        async for value in _alerts(_address('brokers'), lambda: True):
            print(_one_line(value), flush=True)
            left -= 1
            if left == 0:
                return

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(show())


def models(variant: str, into: Path, model: Path) -> None:
    """Write a model repository for another Triton server."""
    python_model = HERE / 'model.py' if variant == 'python' else None
    print(f'{variant}: {write_repository(model, into, variant, python_model)}')


def install() -> None:
    """Fetch Kafka and Triton without starting them."""
    print(f'Kafka: {_near(install_kafka())}\nTriton: {_near(install_triton())}')


async def _first_alert(brokers: str, healthy: Callable[[], bool]) -> dict[str, Any] | None:
    """The first alert with reasons. (The first tier of a shopper has none.)"""
    deadline = time.monotonic() + FIRST_ALERT_SECONDS_MAX
    async for value in _alerts(brokers, lambda: healthy() and time.monotonic() < deadline):
        if value['reasons']:
            return value
    return None


def _one_line(value: dict[str, Any]) -> str:
    """An alert in words: time, user, kind, scores, action and reasons."""
    at = datetime.fromtimestamp(value['as_of_ms'] / 1000, UTC).strftime('%Y-%m-%d %H:%M')
    scores = value['scores']
    tier = '' if value['tier'] is None else f'tier {value["tier"]}'
    line = (f'{at}  {value["user_id"]:10} {value["type"]:24} {value.get("state", ""):8} intent '
            f'{scores["purchase_intent"]:.2f} churn {scores["churn"]:.2f} {tier:7} {value["action"] or ""}')
    return line + ''.join(f'\n    {reason["effect"]:+.2f}  {reason["text"]}' for reason in value['reasons'] or ())


async def _alerts(brokers: str, go_on: Callable[[], bool]) -> AsyncIterator[dict[str, Any]]:
    """Values of the alerts topic from its beginning, while `go_on` is true."""
    try:
        async with AIOKafkaConsumer('alerts', bootstrap_servers=brokers, auto_offset_reset='earliest') as consumer:
            while go_on():
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    for record in records:
                        if record.value:
                            yield json.loads(record.value)
    except KafkaError as error:
        raise PartError(f'The alerts cannot be read: {error}.',
                        'check that Kafka runs: python -m deploy.local.stack status.') from error


def _running() -> dict[str, int]:
    return {name: process[0] for name in ORDER if (process := recorded(LOCAL / name / f'{name}.pid'))}


def _published() -> bool:
    """Whether the publisher has sent all events and ended."""
    log = LOCAL / 'publisher' / 'publisher.log'
    return log.exists() and any(line.startswith('{') for line in log.read_text(errors='replace').splitlines())


def _state() -> dict[str, Any]:
    try:
        return json.loads((LOCAL / 'state.json').read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_state(state: dict[str, Any]) -> None:
    (LOCAL / 'state.json').write_text(json.dumps(state) + '\n')


def _address(name: str) -> str:
    if name not in (state := _state()):
        raise PartError('Nothing is running.', 'run make up.')
    return state[name]


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    PARTS.mkdir(parents=True, exist_ok=True)
    with (PARTS / 'stack.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _print_where() -> None:
    state = _state()
    if 'brokers' not in state:
        print('  still starting')
        return
    print(f'  Kafka      {state["brokers"]}\n  Triton     {state["triton"]} (gRPC)')
    if 'admin' in state:
        python = _near(Path(sys.executable))
        print('  topics     clicks, carts in; alerts, dead-letters out\n'
              f'  worker     http://{state["admin"]}/ready, /status, /metrics\n'
              f'  settings   {_near(LOCAL / "stream.toml")}, for any stream command: --config\n'
              f'  logs       {_near(LOCAL)}/*/*.log\n'
              f'  alerts     {python} -m deploy.local.stack alerts\n'
              '  stop       make down')


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _near(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, function in (('up', up), ('down', down), ('status', status), ('alerts', alerts), ('models', models),
                           ('install', install)):
        command = commands.add_parser(name, help=(function.__doc__ or '').strip())
        command.set_defaults(function=function)
        if name == 'up':
            command.add_argument('--only-parts', action='store_true', help='only Kafka and Triton')
        elif name == 'alerts':
            command.add_argument('--count', type=int, default=0)
        elif name == 'models':
            command.add_argument('variant', choices=VARIANTS)
            command.add_argument('into', type=Path)
            command.add_argument('--model', type=Path, default=SHIPPED, help="a version's folder")
    arguments = vars(parser.parse_args())
    del arguments['command']
    try:
        arguments.pop('function')(**arguments)
    except StreamError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
