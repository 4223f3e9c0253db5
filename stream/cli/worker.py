"""The command `worker`, a thin shell as `stream.cli.main`, on the same command line."""
import asyncio
import logging
import os
import signal
import sys
import threading
from typing import Annotated

import typer

from stream.cli.shared import ConfigFile, Overrides, collect_seldom, effective_settings, few_arenas, parsed
from stream.errors import StreamError

CLOSE_S_MAX = 10.0      # how long the event loop may take to close after an error

app = typer.Typer()

# What these have to say about every service and partition is for their developers.
_QUIET = ('faust', 'mode', 'aiokafka', 'stream.engine.faust_app', 'stream.engine.consumer')


@app.command()
def worker(
    config: ConfigFile = None,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option('--verbose', help='Also log what Faust and the Kafka client say.')] = False,
) -> None:
    """Read click and cart events from Kafka, score shoppers and publish alerts, until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))       # nothing has begun yet
    from stream.engine.worker import run
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(levelname)s %(name)s %(message)s')
    if not verbose:
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
    collect_seldom()
    few_arenas()
    with asyncio.Runner() as runner:
        try:
            runner.run(run(effective_settings(config, **parsed(overrides))))
        except StreamError as error:
            _end_soon(error)
            raise


def _end_soon(error: StreamError) -> None:
    """End the process with this error, even if a task of a library does not let itself be cancelled.

    The event loop waits for such a task without limit when it closes.
    """
    def end() -> None:
        sys.stderr.write(f'stream: {error}\n')
        sys.stderr.flush()
        os._exit(error.exit_code)

    timer = threading.Timer(CLOSE_S_MAX, end)
    timer.daemon = True
    timer.start()
