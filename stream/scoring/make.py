"""The scorer that the settings ask for."""
from collections.abc import Callable
from pathlib import Path

from stream.config import SHIPPED_MODEL, Settings
from stream.core.scorer import Scorer
from stream.scoring.artefact import Manifest
from stream.scoring.constant import ConstantScorer

ROOT = Path(__file__).parents[2]


def make_scorer(settings: Settings, warn: Callable[[str], None] | None, off_loop: bool = True) -> Scorer:
    """Make the scorer. It does not connect to Triton yet.

    warn       is called with each mismatch between the model's training data and the settings; None: nobody is told
    off_loop   whether the event loop must stay free while the embedded model runs
    Errors     ModelError if the model's folder does not match its manifest, or cannot be loaded.
    """
    if settings.scorer == 'constant':
        return ConstantScorer(rows_max=settings.batch_rows_max)
    model = shipped(settings.model)
    scorer = _triton(settings, model) if settings.scorer == 'triton' else _embedded(settings, model, off_loop)
    for line in mismatches(scorer.manifest, settings):
        if warn is not None:
            warn(f'{line}: do not trust its scores.')
    if settings.scorer == 'triton' and settings.fallback == 'embedded':
        from stream.scoring.fallback import FallbackScorer
        return FallbackScorer(scorer, _embedded(settings, model, off_loop))
    return scorer


def shipped(model: Path) -> Path:
    """The model's folder. The default is found in this checkout even if the working directory is another one."""
    return ROOT / SHIPPED_MODEL if model == SHIPPED_MODEL and not model.exists() else model


def mismatches(manifest: Manifest, settings: Settings) -> list[str]:
    """Differences between the model's training data and these settings, each as a clause."""
    lines = []
    trained, here = manifest.window, settings.window_limits()
    if (trained.events_max, trained.span_ms) != (here.events_max, here.span_ms):
        lines.append(f'the model was trained on windows of {trained.events_max} events, but these hold '
                     f'{here.events_max} (or their span differs)')
    if manifest.currency != settings.currency:
        lines.append(f'the model was trained on amounts in {manifest.currency}, but these are in {settings.currency}')
    return lines


# Imported on demand: a replay does not need gRPC, and a worker with Triton does not need onnxruntime.
def _embedded(settings: Settings, model: Path, off_loop: bool):
    from stream.scoring.embedded import EmbeddedScorer
    return EmbeddedScorer(model, settings.scorer_threads, settings.batch_rows_max, off_loop)


def _triton(settings: Settings, model: Path):
    from stream.scoring.triton import TritonScorer
    return TritonScorer(settings.triton, model, settings.batch_rows_max, settings.triton_timeout_ms,
                        settings.triton_in_flight_max)
