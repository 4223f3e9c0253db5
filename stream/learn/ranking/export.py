"""Export the ranking of what is bought next as a separate graph, beside the graph of the scores.

    <repository>/<name>_next/config.pbtxt             Triton's configuration, ONNX Runtime backend
    <repository>/<name>_next/<version>/model.onnx
    <repository>/<name>_next/<version>/ranking.json   the SHA-256 of the graph, its tensors, how many days are next

Of each column that it ranks ('item', 'category'):

    own_item, item_numbers    in: see stream.learn.ranking.past_items
    candidates                in: int32 [rows, c], buckets of the first column, 0 for none
    item_scores               out: probability that a purchase of the next days is of a bucket, [rows, buckets]
    own_item_scores           out: probability of each of the user's own items, part of its bucket's, [rows, m]
    candidate_scores          out: probabilities of the candidates, [rows, c]

Why a graph of its own: see stream.learn.ranking.ranker.
"""
import json
import tempfile
import warnings
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import torch

from stream.errors import ModelError
from stream.learn.dataset import NEXT_DAYS
from stream.learn.inference import run
from stream.learn.ranking.next_items import CANDIDATES, ROWS_MAX, ranking_dir, score_names, tensor_names
from stream.learn.ranking.past_items import BUCKETS, OWN_NUMBERS
from stream.learn.ranking.ranker import Recommender
from stream.scoring.artefact import WEIGHTS, sha256
from stream.scoring.repository import CONFIG_FILE, RANKING_MANIFEST, Served, Tensor, triton_config

OPSET = 17
TOLERANCE = 1e-5
_ROWS, _LENGTH, _CANDIDATES = 5, 7, 3


def inputs(recommender: Recommender) -> dict[str, Tensor]:
    """The graph's inputs, one row each."""
    found = {}
    for column in recommender.columns:
        own, numbers = tensor_names(column)
        found |= {own: Tensor('int32', (-1,)), numbers: Tensor('float32', (-1, OWN_NUMBERS))}
    return found | {CANDIDATES: Tensor('int32', (-1,))}


def outputs(recommender: Recommender) -> dict[str, Tensor]:
    """The graph's outputs, one row each."""
    found = {}
    for column in recommender.columns:
        scores, own_scores = score_names(column)
        found |= {scores: Tensor('float32', (BUCKETS[column],)), own_scores: Tensor('float32', (-1,))}
    return found | {'candidate_scores': Tensor('float32', (-1,))}


def export_ranking(recommender: Recommender, version_dir: Path) -> Path:
    """Write it beside an exported version of the model. Returns the version's folder.

    Errors   ModelError where the graph does not give torch's chances.
    """
    target = ranking_dir(version_dir)
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / WEIGHTS
        write_ranking(recommender, graph)
        content = graph.read_bytes()
    target.mkdir(parents=True, exist_ok=True)
    (target / WEIGHTS).write_bytes(content)
    served = Served(target.parent.name, target.name, {WEIGHTS: sha256(target / WEIGHTS)}, inputs(recommender),
                    outputs(recommender), ROWS_MAX)
    (target.parent / CONFIG_FILE).write_text(triton_config(served, warm=False))
    (target / RANKING_MANIFEST).write_text(json.dumps(
        msgspec.to_builtins(served) | {'next_days': NEXT_DAYS, 'opset': OPSET}, indent=1) + '\n')
    return target


def write_ranking(recommender: Recommender, path: Path) -> None:
    """As ONNX, for any number of rows, own buckets and candidates; compared with torch. Errors: as above."""
    asked = inputs(recommender)
    example = _some(recommender, _ROWS, _LENGTH)
    lengths = {CANDIDATES: 'candidates', 'candidate_scores': 'candidates'} | {
        name: f'own_{column}s' for column in recommender.columns
        for name in (*tensor_names(column), score_names(column)[1])}
    with warnings.catch_warnings():
        # As in stream.learn.export.
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)    # pyright: ignore[reportPrivateImportUsage]
        torch.onnx.export(
            recommender, tuple(example.values()), path, dynamo=False, opset_version=OPSET, input_names=list(asked),
            output_names=list(outputs(recommender)),
            dynamic_axes={name: {0: 'rows'} | ({1: lengths[name]} if name in lengths else {})
                          for name in (*asked, *outputs(recommender))})
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for rows, length in ((_ROWS, _LENGTH), (1, 1), (3, 200)):
        feed = _some(recommender, rows, length)
        got = run(session, None, {name: part.numpy() for name, part in feed.items()})
        with torch.no_grad():
            expected = recommender(*feed.values())
        worst = max(float(np.abs(mine - theirs.numpy()).max()) for mine, theirs in zip(got, expected, strict=True))
        if not worst <= TOLERANCE:
            raise ModelError(f'The exported ranking and torch differ by {worst:.1e}, at most {TOLERANCE:.0e} is '
                             'allowed.', do='use the releases that pyproject.toml names.')


def _some(recommender: Recommender, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs as they may come: each row's own buckets once, then padding."""
    rng = np.random.default_rng(rows * length)
    feed = {}
    for column in recommender.columns:
        own = np.stack([rng.choice(BUCKETS[column] - 1, length, replace=False) + 1 for _ in range(rows)])
        own[0, (length + 1) // 2:] = 0
        numbers = rng.exponential(0.5, (rows, length, OWN_NUMBERS)) * (own > 0)[..., None]
        for name, part in zip(tensor_names(column), (own.astype(np.int32), numbers.astype(np.float32)), strict=True):
            feed[name] = torch.from_numpy(part)
    candidates = rng.integers(0, min(BUCKETS.values()), (rows, _CANDIDATES)).astype(np.int32)
    return feed | {CANDIDATES: torch.from_numpy(candidates)}
