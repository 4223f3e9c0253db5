"""The model that comes with the repository. Needs no torch."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from stream.core.events import Decoder, EventRules
from stream.core.features import LENGTHS, Snapshots, batches, features
from stream.core.layout import WindowLimits
from stream.core.scores import collect
from stream.core.user import User, fold, pack_header
from stream.learn.ranking.next_items import verified
from stream.scoring.artefact import load_artefact
from stream.scoring.embedded import EmbeddedScorer

SHOPPER = Path(__file__).parents[2] / 'triton_models' / 'shopper'


def test_the_folder_is_what_its_manifest_says():
    artefact = load_artefact(SHOPPER / '1')
    manifest = json.loads((SHOPPER / '1' / 'manifest.json').read_bytes())
    for name, digest in manifest['repository_files'].items():
        assert hashlib.sha256((SHOPPER / name).read_bytes()).hexdigest() == digest
    labels = (SHOPPER / 'tiers.txt').read_text().split()
    assert tuple(labels) == artefact.manifest.tier_names and len(labels) == 5
    assert len(artefact.manifest.tier_edges) == 4
    assert f'`{artefact.info.sha256}`' in (SHOPPER / 'README.md').read_text()
    assert f'`{artefact.manifest.command}`' in (SHOPPER / 'README.md').read_text()


def test_its_ranking_is_of_this_version():
    assert verified(SHOPPER / '1').parent.parent.name == 'shopper_next'


def test_small_enough_for_a_repository():
    assert (SHOPPER / '1' / 'model.onnx').stat().st_size < 4_000_000


@pytest.fixture(scope='module')
def snapshots(lines) -> Snapshots:
    """Every user of the tiny shop, half of them after a few events only, so that all lengths occur."""
    decode, users, limits = Decoder(EventRules()), {}, WindowLimits()
    for offset, value in enumerate(lines):
        event = decode(value)
        user = users.setdefault(event.user_id, User(event.user_id))
        if len(users) % 2 or user.applied < 3 + len(users) % 40:
            event.offset = offset
            fold(user, [event], limits)
    return Snapshots.join([pack_header(user) for user in users.values()], [user.days for user in users.values()],
                          [user.rows for user in users.values()], [user.last_seen_ms for user in users.values()])


def test_it_scores_real_windows_of_every_length(snapshots):
    scorer = EmbeddedScorer(SHOPPER / '1')
    asked = list(batches(features(snapshots), 256))
    assert {batch.categories.shape[1] for batch in asked} == set(LENGTHS)
    scores = collect(asked, scorer.score_now(asked), len(snapshots))
    assert scores.usable.all()
    assert scores.intent.std() > 0.05 and scores.churn.std() > 0.05     # it tells shoppers apart
    assert np.corrcoef(scores.intent, scores.churn)[0, 1] < 0
