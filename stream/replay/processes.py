"""Shards of a replay, each in a process of its own. They end with this process, however it ends.

The processes are spawned, not forked: a fork would copy threads' locks in whatever state they are. Signals of the
terminal go to this process only; it ends the others.
"""
import asyncio
import gc
import os
import signal
import threading
import traceback
from collections import deque
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.resource_tracker import ensure_running
from queue import SimpleQueue
from types import TracebackType
from typing import Self, cast

from stream.errors import StreamError
from stream.replay.account import Sums
from stream.replay.shard import Shard, ShardRecipe
from stream.replay.shard_messages import (
    Explain,
    Explained,
    Failed,
    Finish,
    Order,
    Reply,
    Result,
    Share,
    decode_order,
    decode_reply,
    encode,
)

_JOIN_S = 10.0


class ShardProcesses:
    """Processes that hold the shards of a replay. Use it in a `with` statement."""

    def __init__(self, count: int, recipe: ShardRecipe) -> None:
        """Starts the processes. They load the model while the replay reads its first rows."""
        self.count = count
        self._connections: list[Connection] = []
        self._open: list[Connection] = []       # those of the processes that have not sent their last reply
        self._processes = []
        self._ready: deque[Connection] = deque()
        context = get_context('spawn')
        ensure_running()        # Python starts this helper before the first process, and unblocks SIGINT as it does so
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])     # a process inherits what is blocked
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(recipe, number, theirs, gc.get_threshold()), daemon=True,
                                          name=f'shard {number + 1}')
                self._connections.append(cast(Connection, ours))
                self._open.append(cast(Connection, ours))
                process.start()
                self._processes.append(process)
                theirs.close()      # so that the end of the process is the end of the stream
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> list[int | None]:
        """The ids of the processes."""
        return [process.pid for process in self._processes]

    def send(self, shard: int, order: Order) -> None:
        """Give an order to a shard. Errors: StreamError if its process has ended."""
        try:
            self._connections[shard].send_bytes(encode(order))
        except OSError as error:
            raise self._why_gone(shard) from error

    def receive(self) -> tuple[int, Result | Explained | Sums]:
        """The next reply of any shard, and the number of the shard.

        Errors   StreamError if a process has ended, or what the shard raised.
        """
        if not self._ready:
            self._ready.extend(cast(list[Connection], wait(self._open)))
        connection = self._ready.popleft()
        shard = self._connections.index(connection)
        try:
            reply: Reply = decode_reply(connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._why_gone(shard) from error
        if isinstance(reply, Failed):
            raise _error(reply)
        if isinstance(reply, Sums):
            self._open.remove(connection)       # the process ends now, which is no failure
        return shard, reply

    def close(self) -> None:
        """End all processes. One that is done ends by itself; the others are told to."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_JOIN_S)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _why_gone(self, shard: int) -> Exception:
        """The error that the process has left behind, or the way in which it ended."""
        with suppress(EOFError, OSError):
            while self._connections[shard].poll():
                reply: Reply = decode_reply(self._connections[shard].recv_bytes())
                if isinstance(reply, Failed):
                    return _error(reply)
        process = self._processes[shard]
        process.join(_JOIN_S)
        code = process.exitcode
        how = f'with exit code {code}' if code is None or code >= 0 else f'by {signal.Signals(-code).name}'
        return StreamError(
            f'Process {shard + 1} of the {self.count} that score the events was ended {how}.',
            'see whether memory ran out (`dmesg`): fewer --workers need less, and so does --state rocksdb. No output '
            'was written.')


def _error(failed: Failed) -> Exception:
    kinds = {kind.exit_code: kind for kind in (StreamError, *StreamError.__subclasses__())}
    if failed.exit_code not in kinds:
        return RuntimeError(f'A process that scores events failed:\n{failed.problem}')
    return kinds[failed.exit_code](failed.problem, failed.do)


# In the process of a shard.


def _serve(recipe: ShardRecipe, number: int, connection: Connection, collect_after: tuple[int, int, int]) -> None:
    gc.set_threshold(*collect_after)
    orders: SimpleQueue[Order] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    try:
        asyncio.run(_work(recipe.make(number), connection, orders))
        return
    except StreamError as error:
        failed = Failed(error.exit_code, error.problem, error.do)
    except Exception:       # noqa: BLE001 (the other side raises it)
        failed = Failed(0, traceback.format_exc(), '')
    with suppress(OSError):     # the replay may have been stopped
        connection.send_bytes(encode(failed))


def _listen(connection: Connection, orders: SimpleQueue[Order]) -> None:
    """Take orders off the connection at once, so that no side waits for the other one to read."""
    with suppress(EOFError, OSError):
        while True:
            orders.put(order := decode_order(connection.recv_bytes()))
            if isinstance(order, Finish):
                return
    os._exit(1)     # the replay was stopped or killed: nobody wants the rest


async def _work(shard: Shard, connection: Connection, orders: SimpleQueue[Order]) -> None:
    while True:
        order = orders.get()
        if isinstance(order, Share):
            connection.send_bytes(encode(await shard.take(order)))
        elif isinstance(order, Explain):
            connection.send_bytes(encode(await shard.explain(order)))
        else:
            connection.send_bytes(encode(shard.finish()))
            return
