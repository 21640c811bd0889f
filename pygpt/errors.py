"""The errors a user can cause, with the exit code that the command line gives each."""


class PygptError(Exception):
    """Something the user can put right; the message says what, where, and what to do."""

    exit_code = 1


class UsageError(PygptError):
    """A command or call that contradicts itself."""

    exit_code = 2


class DataError(PygptError):
    """A file whose content cannot be used."""

    exit_code = 3


class NumericError(PygptError):
    """A loss, gradient or logit that is not finite."""

    exit_code = 4


class ResourceError(PygptError):
    """Not enough memory, disk or device, or a folder in use by another run."""

    exit_code = 5


class Stopped(PygptError):
    """SIGINT or SIGTERM ended the work in order; nothing is lost."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
