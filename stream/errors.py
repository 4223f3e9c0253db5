"""Errors, divided by their cause. Every message ends with what to do."""
import importlib
from typing import Any

_INSTALL = "install it, in the project's folder: .venv/bin/uv pip install -c deploy/constraints.txt -e '.[{}]'"
INSTALL_TRAINING = _INSTALL.format('train') + '.'
INSTALL_REPORT = _INSTALL.format('report') + '.'


class StreamError(Exception):
    """An error that an operator can act on.

    `problem` says what is wrong, and `do` what to do about it. The command line prints both and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, problem: str, do: str) -> None:
        super().__init__(f'{problem} Do: {do}')
        self.problem = problem
        self.do = do


class UsageError(StreamError):
    """The command, a setting or a path is wrong. Nothing was started."""

    exit_code = 2


class InputError(StreamError):
    """A whole file cannot be read. A bad row is never this error: it becomes a dead letter."""

    exit_code = 3


class StateError(StreamError):
    """A stored record, or a whole store, cannot be trusted."""

    exit_code = 4


class ModelError(StreamError):
    """The model's files are missing or changed, or the model returns impossible scores."""

    exit_code = 5


class KafkaError(StreamError):
    """The brokers cannot be reached, refuse a request, or have topics that do not fit the settings."""

    exit_code = 6


class ScorerUnavailable(ModelError):     # noqa: N818 (a state rather than a mistake)
    """The scorer cannot answer for the moment. It has scored no part of the request.

    Keep the request and send it again after `retry_after_ms`. An earlier retry gets no answer.
    """

    def __init__(self, problem: str, do: str, retry_after_ms: int) -> None:
        super().__init__(problem, do)
        self.retry_after_ms = retry_after_ms


class ResponseRefused(ModelError):     # noqa: N818 (the caller's reaction rather than a mistake)
    """A response does not match its request: other rows, names, types or shapes. No part of it may be used."""


def extra_module(name: str, what: str, do: str) -> Any:
    """Import a module that needs packages of an extra.

    name    a module of stream, or a package
    what    what needs the module: the singular subject of the error's sentence
    do      the advice of the error: INSTALL_REPORT, INSTALL_TRAINING, or a text that includes one of them
    Errors  UsageError if a package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if package == 'stream':
            raise       # a defect of stream itself, which no installation can fix
        raise UsageError(f'{what} needs {package}, which is not installed.', do) from error
