"""Errors that a user can cause, each with the exit code of its family.

The command line prints the message of a `UserError` as it stands, without a traceback. A message is one paragraph:
what was found, where, what is allowed, what to do.

    UserError
      RecipeError        2
      BudgetExceeded     3
      MachineError       4
        Unreachable      4
        LostRank         75, 4, or that of the failed rank
      DataError          5
      Stopped            75
"""


class UserError(Exception):
    """Base of every error that is not a fault of hfpipe; `exit_code` is what the process ends with."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe or the arguments are wrong."""

    exit_code = 2


class BudgetExceeded(UserError):
    """A suite lost more than its budget allows."""

    exit_code = 3


class MachineError(UserError):
    """This machine or account cannot do it: memory, disk, network, access."""

    exit_code = 4


class Unreachable(MachineError):
    """A server does not answer, which may pass; `why` is the cause without the rest of the message."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why

    def __reduce__(self) -> tuple[type["Unreachable"], tuple[str, str]]:
        return type(self), (str(self), self.why)  # ranks tell each other


class DataError(UserError):
    """The data is bad: a missing column, nothing to train on, too many dirty rows."""

    exit_code = 5


class DamagedFileError(DataError, ValueError):
    """A file cannot be read as what it is; a ValueError too, for those who know another way to go on."""


class Stopped(UserError):
    """Stopped by a signal with a checkpoint saved, or a rank was lost; the same command continues."""

    exit_code = 75


class LostRank(MachineError):
    """Another rank is gone (exit code 75 where a checkpoint is there, else 4), or has failed (with its own code)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type["LostRank"], tuple[str, int]]:
        return type(self), (str(self), self.exit_code)


def exit_codes() -> dict[int, str]:
    """Returns the meaning of every exit code: the beginning of the docstring of its family."""
    codes = {0: "done", 1: "a fault of hfpipe"}
    for family in UserError.__subclasses__():
        words = (family.__doc__ or "").replace(":", ".").replace(";", ".").partition(".")[0]
        codes[family.exit_code] = words[:1].lower() + words[1:]
    return dict(sorted(codes.items()))
