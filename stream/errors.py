"""Errors split by whose fault they are. Every message ends with what to do."""


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
