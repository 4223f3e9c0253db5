"""What a machine may lack. Nothing else lets a test skip: conftest.py fails a test that skips for any other reason."""
from typing import NoReturn

import pytest

MAY_LACK = {
    'real data': 'no real shopping data: its folder is REAL_DATA, or shared/data beside the checkout',
    'docker-compose': 'docker-compose is not installed (Debian: apt-get install docker-compose)',
    'make environment': 'the environment was not made by make',
    'no GPU': 'what happens without a GPU shows on a machine without one only',
}


def skip_without(what: str) -> NoReturn:
    """Skip the test that asks. `what` is a key of MAY_LACK."""
    pytest.skip(MAY_LACK[what])
