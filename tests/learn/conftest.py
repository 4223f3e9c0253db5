"""One tiny shop and one tiny training for all tests of this folder; both are made when first asked for."""
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.core.events import EventRules
from stream.learn import dataset
from stream.simulator.shop import SimulatorOptions, simulate
from tests.skips import skip_without

SHOP = SimulatorOptions(shoppers=120, days=240, seed=5)


@pytest.fixture(scope='session')
def lines() -> list[bytes]:
    return list(simulate(SHOP).lines())


@pytest.fixture(scope='session')
def history(lines) -> dataset.History:
    return dataset.read(lines, EventRules())


@pytest.fixture(scope='session')
def tiny_fit():
    """A function that gives options for a fit of seconds."""
    pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')
    from stream.learn.backbones import EncoderOptions
    from stream.learn.fit import FitOptions

    def options(**changes) -> FitOptions:
        return FitOptions(**{
            'seed': 3, 'epochs': 3, 'batch_rows': 32, 'rows_per_epoch': 400, 'learning_rate': 3e-3,
            'examples': dataset.ExampleOptions(4, 4.0),
            'encoder': EncoderOptions(hidden=16, layers=1, heads=2, intermediate=32)} | changes)

    return options


@pytest.fixture(scope='session')
def tiny_options(lines, tiny_fit):
    """A function that gives options for a training of seconds."""
    from stream.learn.train import TrainOptions

    def options(**changes) -> TrainOptions:
        return TrainOptions(**{'events': lines, 'source': 'a tiny shop', 'command': 'pytest', 'seed': 3,
                               'fit': tiny_fit()} | changes)

    return options


@pytest.fixture(scope='session')
def checkpoint(tiny_options, tmp_path_factory) -> Path:
    """The directory of a tiny checkpoint. Read only."""
    from stream.learn.train import train

    out = tmp_path_factory.mktemp('checkpoint')
    train(tiny_options(), out)
    return out


@pytest.fixture
def two_threads() -> Iterator[int]:
    """How many threads torch has until the end of the test: more than the one that training sets for itself."""
    torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder of real shopping data: REAL_DATA, else shared/data beside the checkout. Skips where there is none."""
    checkout = Path(__file__).parents[2]
    folder = Path(os.environ.get('REAL_DATA', checkout.parent / 'shared' / 'data'))
    if not folder.is_dir():
        skip_without('real data')
    return folder
