"""The scorer that the settings ask for."""
from collections.abc import Callable
from pathlib import Path

from stream.config import SHIPPED_MODEL, Settings
from stream.core.scorer import Scorer
from stream.scoring.artefact import Manifest
from stream.scoring.constant import ConstantScorer

ROOT = Path(__file__).parents[2]


def make_scorer(settings: Settings, warn: Callable[[str], None], off_loop: bool = True) -> Scorer:
    """Make it; Triton is not asked yet.

    warn       told in words where the model was trained on something else than it will see
    off_loop   whether the event loop must stay free while the embedded model runs
    Errors     ModelError where the model's folder is not what its manifest says, or cannot be loaded.
    """
    if settings.scorer == 'constant':
        return ConstantScorer(rows_max=settings.batch_rows_max)
    model = shipped(settings.model)
    scorer = _triton(settings, model) if settings.scorer == 'triton' else _embedded(settings, model, off_loop)
    for line in mismatches(scorer.manifest, settings):
        warn(f'{line}: do not trust its scores.')
    if settings.scorer == 'triton' and settings.fallback == 'embedded':
        from stream.scoring.fallback import FallbackScorer
        return FallbackScorer(scorer, _embedded(settings, model, off_loop))
    return scorer


def shipped(model: Path) -> Path:
    """The model's folder; the shipped one's where it is called from elsewhere: that of this checkout."""
    return ROOT / SHIPPED_MODEL if model == SHIPPED_MODEL and not model.exists() else model


def mismatches(manifest: Manifest, settings: Settings) -> list[str]:
    """Where the model was trained on something else than these settings give it."""
    lines = []
    trained, here = manifest.window, settings.window_limits()
    if (trained.events_max, trained.span_ms) != (here.events_max, here.span_ms):
        lines.append(f'the model was trained on windows of {trained.events_max} events, these hold {here.events_max} '
                     '(or another span)')
    if manifest.currency != settings.currency:
        lines.append(f'the model was trained on amounts in {manifest.currency}, these are in {settings.currency}')
    return lines


# Imported on demand: a replay needs no gRPC, and a worker with Triton no onnxruntime.
def _embedded(settings: Settings, model: Path, off_loop: bool):
    from stream.scoring.embedded import EmbeddedScorer
    return EmbeddedScorer(model, settings.scorer_threads, settings.batch_rows_max, off_loop)


def _triton(settings: Settings, model: Path):
    from stream.scoring.triton import TritonScorer
    return TritonScorer(settings.triton, model, settings.batch_rows_max, settings.triton_timeout_ms,
                        settings.triton_in_flight_max)
