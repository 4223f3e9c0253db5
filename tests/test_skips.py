"""The list of tests that may skip names tests that exist."""
import ast
from pathlib import Path

import pytest

from tests.skips import LACKS, may_skip

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('test', [test for lack in LACKS.values() for test in lack.tests])
def test_each_listed_test_exists(test: str):
    file, _, name = test.partition('::')
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in functions, f'{test} is listed in tests/skips.py, but does not exist. Do: list its new name.'


def test_a_test_may_skip_for_its_own_reason_only():
    for lack in LACKS.values():
        for test in lack.tests:
            assert may_skip(test, lack.reason)
            assert not may_skip(test, 'no time')
    assert not may_skip('tests/test_skips.py::test_each_listed_test_exists', LACKS['real data'].reason)
