"""The local Triton serves the exported graph: the same scores as in the process, and a bounded queue."""
import concurrent.futures
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from deploy.local.parts import Triton
from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS, TYPE_VOCABULARY, Batch
from stream.core.scores import OUTPUT_NAMES
from stream.scoring.artefact import load_artefact
from stream.scoring.embedded import EmbeddedScorer

SHIPPED = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'
TYPES = {'categories': 'INT32', 'numbers': 'FP32', 'counters': 'FP32', 'row_id': 'INT64'}


def made_up_batch(rows: int, length: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    filled = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    categories = rng.integers(1, TYPE_VOCABULARY, (rows, length, 3)).astype(np.int32) * filled[..., None]
    numbers = rng.random((rows, length, SLOT_NUMBERS), np.float32) * filled[..., None]
    return Batch(categories, numbers.astype(np.float32), rng.random((rows, COUNTERS), np.float32),
                 rng.permutation(rows)[:, None].astype(np.int64))


def asked(batch: Batch) -> list[grpc.InferInput]:
    inputs = []
    for name, kind in TYPES.items():
        array = getattr(batch, name)
        tensor = grpc.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


@pytest.fixture
def client(triton: Triton):
    with grpc.InferenceServerClient(triton.address) as made:
        yield made


@pytest.mark.parametrize('rows', [1, 100, 256])
@pytest.mark.parametrize('length', LENGTHS)
def test_it_gives_the_scores_of_the_embedded_copy(client, rows: int, length: int):
    batch = made_up_batch(rows, length, seed=rows)
    answer = client.infer('shopper', asked(batch), client_timeout=20)
    wanted = EmbeddedScorer(SHIPPED).score_now([batch])[0]
    assert (answer.as_numpy('row_id_out') == batch.row_id).all()
    for name in OUTPUT_NAMES:
        np.testing.assert_allclose(answer.as_numpy(name), getattr(wanted, name), rtol=1e-5, atol=1e-5)


def test_many_at_once_each_get_their_own_rows(client):
    batches = [made_up_batch(1 + number % 5, LENGTHS[number % 4], number) for number in range(40)]
    embedded = EmbeddedScorer(SHIPPED)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda batch: client.infer('shopper', asked(batch), client_timeout=20), batches))
    for batch, answer in zip(batches, answers, strict=True):
        assert (answer.as_numpy('row_id_out') == batch.row_id).all()
        np.testing.assert_allclose(answer.as_numpy('churn'), embedded.score_now([batch])[0].churn, rtol=1e-5, atol=1e-5)


def test_the_configuration_names_the_graph(client):
    config = client.get_model_config('shopper').config
    assert config.parameters['sha256'].string_value == load_artefact(SHIPPED).info.sha256


def test_only_the_outputs_that_were_asked_for(client):
    wanted = [grpc.InferRequestedOutput('churn'), grpc.InferRequestedOutput('row_id_out')]
    answer = client.infer('shopper', asked(made_up_batch(3, 8, 1)), outputs=wanted, client_timeout=20)
    assert answer.as_numpy('churn').shape == (3, 1)
    assert answer.as_numpy('expected_spend') is None


def test_a_bad_request_fails_alone(client):
    batch = made_up_batch(2, 8, 1)
    batch.counters = batch.counters[:, :-1]
    with pytest.raises(InferenceServerException, match='counters'):
        client.infer('shopper', asked(batch), client_timeout=20)
    assert client.infer('shopper', asked(made_up_batch(2, 8, 1)), client_timeout=20).as_numpy('churn').shape == (2, 1)


def test_a_full_queue_refuses_at_once_and_goes_on(tmp_path: Path):
    server = Triton(tmp_path / 'triton', queue_requests_max=2)
    with server, grpc.InferenceServerClient(server.address) as client:
        batch = asked(made_up_batch(256, 64, 1))

        def ask(_: int) -> str | None:
            try:
                client.infer('shopper', batch, client_timeout=60)
            except InferenceServerException as error:
                return error.status()
            return None

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(16)))
        assert set(answers) == {None, 'StatusCode.UNAVAILABLE'}
        assert ask(0) is None


def test_no_request_is_left_waiting(client):
    """With a bounded queue, Triton's batcher slept 500 ms several times in as many requests."""
    batch, seconds = asked(made_up_batch(1, 8, 1)), []
    for _ in range(400):
        started = time.monotonic()
        client.infer('shopper', batch, client_timeout=20)
        seconds.append(time.monotonic() - started)
    assert sum(each > 0.45 for each in seconds) <= 1        # one may be the machine's
