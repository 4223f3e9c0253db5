"""The suite itself: its list of skips."""
import ast
from pathlib import Path

import pytest

from tests.skips import LACKS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('name', [name for lack in LACKS.values() for name in lack.tests])
def test_every_test_that_may_skip_exists(name: str):
    path, _, test = name.partition('::')
    assert (ROOT / path).exists(), f'{path} has moved'
    assert test in {getattr(node, 'name', '') for node in ast.parse((ROOT / path).read_text()).body}
