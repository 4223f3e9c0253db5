"""How the processes of the suite end."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
