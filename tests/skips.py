"""All tests that may skip, and what the machine lacks then. conftest.py fails any other test that skips.

Without the [train] extra, the files of the training tests skip as a whole too. `make test` installs that extra.
"""
from dataclasses import dataclass
from typing import NoReturn

import pytest


@dataclass(frozen=True)
class Lack:
    """Why these tests skip, and their node ids."""

    reason: str
    tests: tuple[str, ...]


LACKS = {
    'real data': Lack(
        'no real shopping data in REAL_DATA, nor in shared/data beside the checkout',
        ('tests/learn/judging/test_bgnbd.py::test_the_published_parameters_of_cdnow',
         'tests/learn/judging/test_tasks.py::test_cdnow_as_published')),
    'docker-compose': Lack(
        'docker-compose is not installed (Debian: apt-get install docker-compose)',
        ('tests/deploy/test_docker.py::test_compose_accepts_it',
         'tests/deploy/test_docker.py::test_the_gpu_takes_the_cpus_place')),
    'an environment of make': Lack(
        'the environment was not made by make',
        ('tests/test_readme.py::test_make_demo',)),
    'a machine without a GPU': Lack(
        'the machine has a GPU, and the test shows what is said without one',
        ('tests/deploy/test_gpu_bench.py::test_without_a_gpu_it_says_so',)),
}


def skip_without(what: str) -> NoReturn:
    """Skip the test that asks. `what` is a key of LACKS."""
    pytest.skip(LACKS[what].reason)


def may_skip(test: str, reason: str) -> bool:
    """Whether a test, by its node id, is listed for that reason."""
    return any(lack.reason == reason and test in lack.tests for lack in LACKS.values())
