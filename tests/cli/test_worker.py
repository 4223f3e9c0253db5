"""The command `worker`: what it does after an error of the worker."""
import subprocess
import sys

STUBBORN = """
import asyncio
import sys
import stream.cli.worker
import stream.engine.worker
from stream.cli.main import main
from stream.errors import KafkaError

async def stubborn():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

async def run(settings):
    asyncio.get_running_loop().task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    raise KafkaError('The broker is frozen.', 'wake it.')

stream.engine.worker.run = run
stream.cli.worker.CLOSE_S_MAX = 0.2
sys.argv = ['stream', 'worker']
main()
"""


def test_the_process_ends_although_a_task_does_not_let_itself_be_cancelled():
    ended = subprocess.run([sys.executable, '-c', STUBBORN], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 6
    assert 'stream: The broker is frozen. Do: wake it.' in ended.stderr
