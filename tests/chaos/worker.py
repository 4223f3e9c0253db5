"""`stream worker`, which can be told to die at a named point: before, during or after a stage of a beat.

    python -m tests.chaos.worker ORDERS worker --config FILE

ORDERS is a file that appears when the process shall die: JSON with `stage`, `calls`, `when` and `delay_ms`. From then
on the calls of that stage are counted, over all lanes, and at the `calls`-th one the process kills itself with SIGKILL,
so that nothing in it notices. Before that it renames the file, to the suffix `.done`. The product knows nothing of it.
"""
import functools
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Stage -> class and method, in the order of a beat.
POINTS = {
    'take_over': ('stream.engine.beat', 'Beats', '_take_over'),
    'read': ('stream.engine.beat', 'Beats', '_read'),
    'score': ('stream.engine.beat', 'Beats', '_score'),
    'changelog': ('stream.engine.beat', 'Beats', '_changelog'),
    'outputs': ('stream.engine.beat', 'Beats', '_outputs'),
    'done': ('stream.engine.beat', 'Beats', '_done'),
    'write': ('stream.engine.beat', 'Beats', '_write'),
    'commit': ('stream.engine.consumer', 'BlockConsumer', '_commit'),
}


class Executioner:
    """Counts the calls of the stage that the orders name, as soon as there are orders."""

    def __init__(self, orders: Path) -> None:
        self._orders = orders
        self._stage = ''
        self._when = ''
        self._left = 0
        self._delay_s = 0.0

    def before(self, stage: str) -> bool:
        """A call of a stage begins. Returns True if the process must die when it ends."""
        if not self._stage and self._orders.exists():
            try:
                order = json.loads(self._orders.read_text())
            except ValueError:
                return False        # still being written
            self._stage, self._when = order['stage'], order['when']
            self._left, self._delay_s = order['calls'], order['delay_ms'] / 1000
        if stage != self._stage:
            return False
        self._left -= 1
        if self._left:
            return False
        if self._when == 'before':
            self.die()
        if self._when == 'during':
            threading.Timer(self._delay_s, self.die).start()
        return self._when == 'after'

    def die(self) -> None:
        """Die."""
        self._orders.rename(self._orders.with_suffix('.done'))
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()        # nothing more happens


def wrap(method: Callable, stage: str, executioner: Executioner) -> Callable:
    """The method, with its calls counted."""
    if inspect.iscoroutinefunction(method):
        @functools.wraps(method)
        async def counted_async(*args: Any, **kwargs: Any) -> Any:
            last = executioner.before(stage)
            result = await method(*args, **kwargs)
            if last:
                executioner.die()
            return result
        return counted_async

    @functools.wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        last = executioner.before(stage)
        result = method(*args, **kwargs)
        if last:
            executioner.die()
        return result
    return counted


def main() -> None:
    """Wrap the stages, then run the command line."""
    executioner = Executioner(Path(sys.argv.pop(1)))
    for stage, (module, owner, name) in POINTS.items():
        kind = getattr(__import__(module, fromlist=[owner]), owner)
        setattr(kind, name, wrap(getattr(kind, name), stage, executioner))
    from stream.cli.main import main as stream_main
    sys.argv[0] = 'stream'
    stream_main()


if __name__ == '__main__':
    main()
