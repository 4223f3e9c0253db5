"""Runs the calls that may block the event loop, those of the stores, in threads."""
import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar('T')


async def in_thread(call: Callable[..., T], *given: Any) -> T:
    """Run a call of a store in a thread. A thread cannot be cancelled, so a cancelled caller waits for its end."""
    task = asyncio.create_task(asyncio.to_thread(call, *given))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
