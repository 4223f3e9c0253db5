"""The suite itself: its list of skips, and how its processes end."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import LACKS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('name', [name for lack in LACKS.values() for name in lack.tests])
def test_every_test_that_may_skip_exists(name: str):
    path, _, test = name.partition('::')
    assert (ROOT / path).exists(), f'{path} has moved'
    assert test in {getattr(node, 'name', '') for node in ast.parse((ROOT / path).read_text()).body}


def test_a_crash_of_a_process_ends_the_run_and_names_the_test(tmp_path: Path):
    options = re.search(r'-m pytest (-n 2 .*)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    assert options
    (tmp_path / 'test_a.py').write_text('import os\ndef test_one(): pass\ndef test_crash(): os._exit(1)\n')
    (tmp_path / 'test_b.py').write_text('def test_two(): pass\n')
    (tmp_path / 'test_c.py').write_text('def test_three(): pass\n')
    done = subprocess.run([sys.executable, '-m', 'pytest', *options[1].split(), '-p', 'no:cacheprovider', '.'],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout
    assert 'FAILED test_a.py::test_crash' in done.stdout
