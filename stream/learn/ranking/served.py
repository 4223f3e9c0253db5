"""The exported ranking of what is bought next, asked for everybody of some examples. Needs no torch."""
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stream.errors import ModelError
from stream.learn.dataset import Examples, History
from stream.learn.ranking.item_names import Ranked
from stream.learn.ranking.past_items import BUCKETS, OWN_NUMBERS, past
from stream.learn.served import session_of
from stream.scoring.artefact import WEIGHTS
from stream.scoring.repository import RANKING_MANIFEST, load_ranking

CANDIDATES = 'candidates'
ROWS_MAX = 64           # at once: each row is answered with the chances of all buckets


def ranking_dir(version_dir: Path) -> Path:
    """Where the ranking of an exported version of the scores' model lies."""
    return version_dir.parent.with_name(f'{version_dir.parent.name}_next') / version_dir.name


def tensor_names(column: str) -> tuple[str, str]:
    """The graph's inputs of a column."""
    return f'own_{column}', f'{column}_numbers'


def score_names(column: str) -> tuple[str, str]:
    """The graph's outputs of a column: of all buckets, of the user's own."""
    return f'{column}_scores', f'own_{column}_scores'


def verified(version_dir: Path) -> Path:
    """The graph of the ranking beside a version. Errors: ModelError where there is none, it has been changed, or it was
    made by a version of stream that counted otherwise."""
    folder = ranking_dir(version_dir)
    if not (folder / RANKING_MANIFEST).is_file():
        raise ModelError(f'The model in {version_dir} has no ranking of items beside it: {folder} is missing.',
                         do='train and export one from events that name items, with this version.')
    served, graph = load_ranking(folder), folder / WEIGHTS
    for column, count in BUCKETS.items():
        (own, numbers), (scores, _) = tensor_names(column), score_names(column)
        if own in served.inputs and (served.inputs[numbers].row_shape != (-1, OWN_NUMBERS)
                                     or served.outputs[scores].row_shape != (count,)):
            raise ModelError(f'{graph} ranks by other numbers or buckets than this version has.',
                             do='train and export the model again.')
    return graph


def rankings(graph: Path, history: History, examples: Examples) -> Iterator[dict[str, Ranked]]:
    """By column, row by row of the examples."""
    session = session_of(graph)
    given = {entry.name for entry in session.get_inputs()}
    columns = [column for column in BUCKETS if tensor_names(column)[0] in given]
    names = [name for column in columns for name in score_names(column)]
    for at in range(0, len(examples), ROWS_MAX):
        rows = np.arange(at, min(at + ROWS_MAX, len(examples)))
        feed = {CANDIDATES: np.zeros((len(rows), 1), np.int32)}
        before = {column: past(history, examples, rows, column) for column in columns}
        for column, part in before.items():
            feed |= zip(tensor_names(column), part.padded(np.arange(len(rows))), strict=True)
        answers = dict(zip(names, session.run(names, feed), strict=True))
        for row in range(len(rows)):
            found = {}
            for column, part in before.items():
                scores, own_scores = score_names(column)
                own = part.hashes[part.starts[row]:part.starts[row + 1]]
                found[column] = Ranked(answers[scores][row], own, answers[own_scores][row, :len(own)])
            yield found
