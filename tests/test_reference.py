"""The committed reference pages are those of the code."""
import pytest

from stream.config import Settings
from stream.errors import StreamError
from stream.metrics import Metrics
from tests.reference import COMMAND, PARTS, ROOT, exit_codes, pages

PAGES = {path.relative_to(ROOT).as_posix(): text for path, text in pages().items()}


@pytest.mark.parametrize('name', PAGES)
def test_the_page_is_not_stale(name: str):
    path = ROOT / name
    assert path.exists() and path.read_text() == PAGES[name], f'{name} is stale. Do: {COMMAND}'


def test_every_setting_is_there_under_a_heading():
    page = PAGES['deploy/SETTINGS.md']
    assert all(f'| `{name}`<br>`STREAM_{name.upper()}` |' in page for name in Settings.model_fields)
    assert next(iter(Settings.model_fields)) in PARTS


def test_every_metric_is_there():
    page = PAGES['deploy/METRICS.md']
    served = {family.name for family in Metrics().registry.collect() if family.name.startswith('stream_')}
    assert len(served) > 20
    assert all(f'`{name}' in page for name in served)


def test_every_exit_code_is_there_once():
    codes = [code for code, _ in exit_codes()]
    assert len(codes) == len(set(codes))
    assert {kind.exit_code for kind in StreamError.__subclasses__()} <= set(codes)
    assert all(f'| {code} | ' in PAGES['stream/cli/COMMANDS.md'] for code in codes)
