"""Errors split by whose fault they are. Every message ends with what to do."""
import importlib
from typing import Any

_INSTALL = "install it, in the project's folder: .venv/bin/uv pip install -c deploy/constraints.txt -e '.[{}]'"
INSTALL_TRAINING = _INSTALL.format('train') + '.'
INSTALL_REPORT = _INSTALL.format('report') + '.'


class StreamError(Exception):
    """An error that an operator can act on.

    `problem` says what is wrong, `do` what to do about it; the command line prints both and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, problem: str, do: str) -> None:
        super().__init__(f'{problem} Do: {do}')
        self.problem = problem
        self.do = do


class UsageError(StreamError):
    """The command, a setting or a path is wrong: nothing was started."""

    exit_code = 2


class InputError(StreamError):
    """A file as a whole cannot be read (a bad row is a dead letter, never this)."""

    exit_code = 3


class StateError(StreamError):
    """A stored record or store cannot be trusted."""

    exit_code = 4


class ModelError(StreamError):
    """The model's files are missing, changed or give impossible scores."""

    exit_code = 5


class KafkaError(StreamError):
    """The brokers cannot be reached, refuse, or hold topics that do not fit the settings."""

    exit_code = 6


class ScorerUnavailable(ModelError):     # noqa: N818 (a state rather than a mistake)
    """The scorer cannot answer for the moment; nothing of the question was lost, and nothing of it was answered.

    Hold what was to be scored and ask again after `retry_after_ms`: no answer comes earlier.
    """

    def __init__(self, problem: str, do: str, retry_after_ms: int) -> None:
        super().__init__(problem, do)
        self.retry_after_ms = retry_after_ms


class ResponseRefused(ModelError):     # noqa: N818 (what was done about it)
    """An answer that does not fit its question: other rows, names, types or shapes. None of it may be used."""


def extra_module(name: str, what: str, do: str) -> Any:
    """The module of that name, which needs packages of an extra.

    name    a module of stream, or a package
    what    what needs it, as the subject of a sentence in the singular
    do      INSTALL_REPORT, INSTALL_TRAINING, or more than that
    Errors  UsageError where a package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if package == 'stream':
            raise       # a mistake in here, which no install mends
        raise UsageError(f'{what} needs {package}, which is not installed.', do) from error
