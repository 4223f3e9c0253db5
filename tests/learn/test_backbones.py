"""Every backbone, tuned in every way, goes from a recording to a checkpoint, a graph, two scorers: the same scores.

What a checkpoint was made from is gone before it is exported, and one Triton serves all of the models.
"""
# ruff: noqa: E402  (the imports below need torch: skip first)
import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from deploy.local.parts import Triton
from stream.core.features import COUNTERS, Batch
from stream.core.scores import OUTPUT_NAMES
from stream.learn import dataset
from stream.learn.backbones import BackboneOptions
from stream.learn.checkpoint import Checkpoint, load
from stream.learn.export import export
from stream.learn.judging import evaluate
from stream.learn.text.readers import TEXT_BACKBONES
from stream.learn.text.tuning import PREFIX_BACKBONES
from stream.learn.train import train
from stream.scoring.embedded import EmbeddedScorer
from stream.scoring.triton import TritonScorer
from tests.learn.pretrained import save_tiny, windows

TUNINGS = {'freeze': 'freeze:embeddings,layers=1', 'lora': 'lora', 'ia3': 'ia3', 'prefix': 'prefix'}
CASES = ['events', *(f'{name}-{tuning}' for name in TEXT_BACKBONES for tuning in TUNINGS
                     if tuning != 'prefix' or name in PREFIX_BACKBONES)]
TIERS = {'events': 7, 'bert-freeze': 2}
WITH_CATALOGUE = ('events', 't5-lora', 'gpt2-prefix')


@dataclass(frozen=True)
class Made:
    """A trained model, and where it is exported."""

    kept: Checkpoint
    version_dir: Path
    card: str


class Models(dict[str, Made]):
    """All of the models by name, each trained and exported when it is first asked for.

    All at once they would take longer than one test may.
    """

    def __init__(self, make: Callable[[str], Made]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, case: str) -> Made:
        self[case] = self._make(case)
        return self[case]


@pytest.fixture(scope='module')
def made(lines, tiny_fit, tiny_options, tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp('backbones')
    items = {event['item_id']: event['category'] for event in map(json.loads, lines) if event.get('item_id')}
    texts = '\n'.join(json.dumps({'item_id': item, 'category': category, 'text': f'{category} {item}'})
                      for item, category in items.items())

    def make(case: str) -> Made:
        name, _, tuning = case.partition('-')
        with TemporaryDirectory() as scratch:       # gone before the export
            catalogue = Path(scratch) / 'items.jsonl'
            catalogue.write_text(texts)
            source = str(save_tiny(name, Path(scratch) / f'{name}-tiny', positions=64)) if tuning else ''
            options = tiny_fit(
                examples=dataset.ExampleOptions(2, 1.0), rows_per_epoch=80, epochs=2, tiers=TIERS.get(case, 5),
                refund=case != 'events', backbone=BackboneOptions(
                    name, source, TUNINGS.get(tuning, 'full'),
                    catalogue=str(catalogue) if case in WITH_CATALOGUE else None))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(evaluate, 'RESAMPLES', 4)     # intervals are others' concern
                train(tiny_options(fit=options, refit=False), folder / case)
        version_dir = export(folder / case, folder / 'repository', case)
        return Made(load(folder / case), version_dir, (version_dir.parent / 'README.md').read_text())

    return Models(make)


@pytest.fixture(scope='module')
def server(made, tmp_path_factory) -> Iterator[Triton]:
    first, *others = (made[case].version_dir for case in CASES)
    with Triton(tmp_path_factory.mktemp('triton') / 'triton', first, others=others) as part:
        yield part


def batches(kept: Checkpoint) -> list[Batch]:
    """Windows of the recording, and made-up ones: full, of one slot, without any, longer than the text may be."""
    made_up = []
    for filled, length in (([8, 1, 0], 8), ([64, 40, 2], 64)):
        counters = torch.rand((3, COUNTERS), generator=torch.Generator().manual_seed(length))
        made_up.append((*windows(filled, length), counters, torch.arange(3)[:, None]))
    real = [tuple(batch[name][:16] for name in ('categories', 'numbers', 'counters', 'row_id'))
            for batch in kept.windows.values()]
    return [Batch(*(part.numpy() for part in parts)) for parts in (*real, *made_up)]


# First, so that each of these tests makes one model: the server needs them all.
@pytest.mark.parametrize('case', CASES)
def test_the_card_names_backbone_source_and_tuning(case, made):
    name, _, tuning = case.partition('-')
    card = made[case].card
    assert f'backbone `{name}`' in card
    assert ('`items.jsonl`' in card) == (case in WITH_CATALOGUE)
    if tuning:
        assert f'from `{name}-tiny`, tuning `{TUNINGS[tuning]}`' in card
        assert f'the weights of `{name}-tiny`, which it started from, have one of their own' in card
        assert 'never for a credit decision' in card


@pytest.mark.parametrize('case', CASES)
def test_both_scorers_give_torchs_scores(case, made, server):
    kept, version_dir = made[case].kept, made[case].version_dir
    asked = batches(kept)
    embedded = EmbeddedScorer(version_dir)

    async def through_triton():
        scorer = TritonScorer(server.address, version_dir)
        try:
            return await scorer.score(asked)
        finally:
            await scorer.close()

    answers = zip(asked, embedded.score_now(asked), asyncio.run(through_triton()), strict=True)
    for batch, mine, theirs in answers:
        with torch.no_grad():
            wanted = kept.model(*map(torch.from_numpy, (batch.categories, batch.numbers, batch.counters,
                                                        batch.row_id)))
        for name, output in zip(OUTPUT_NAMES, wanted, strict=False):
            np.testing.assert_allclose(getattr(mine, name), output.numpy(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(getattr(theirs, name), getattr(mine, name), rtol=1e-5, atol=1e-5)


def test_the_window_matters_to_every_model(made):
    """Else parity would say nothing of the backbone."""
    for case in CASES:
        kept, (batch, *_) = made[case].kept, batches(made[case].kept)
        with torch.no_grad():
            logits = kept.model.window_logits(torch.from_numpy(batch.categories), torch.from_numpy(batch.numbers))
        assert (logits - logits[:1]).abs().max() > 1e-3, case
        assert kept.model.mix.max() > 0, case


def test_tiers_and_the_risk_head_are_as_asked_for(made):
    manifest = json.loads((made['events'].version_dir / 'manifest.json').read_bytes())
    assert manifest['tier_names'] == ['nothing', *(f'tier {tier}' for tier in range(1, 7))]
    assert 'refund' not in manifest['outputs'] and '`refund`' not in made['events'].card
    assert 'nothing = nothing; some = 0.00 and more' in made['bert-freeze'].card
    others = json.loads((made['bert-lora'].version_dir / 'manifest.json').read_bytes())
    assert len(others['tier_names']) == 5 and 'refund' in others['outputs']


def test_long_texts_are_scored_few_at_once(made, server):
    for case, rows in (('events', 256), ('t5-ia3', 16)):
        version_dir = made[case].version_dir
        assert EmbeddedScorer(version_dir).rows_max == TritonScorer(server.address, version_dir).rows_max == rows
        assert f'max_batch_size: {rows}' in (version_dir.parent / 'config.pbtxt').read_text()
