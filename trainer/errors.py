"""The errors a user can cause. Each message says: field or path (value), the rule, the fix.

`run_recipe` and the command line print them without a traceback and exit with code 2.
Anything else that escapes is a defect of samestep and keeps its traceback.
"""


class SamestepError(Exception):
    """Base of all errors that are the user's to fix: exit code 2, no traceback."""


class ConfigError(SamestepError):
    """A setting is unknown, malformed, out of range, without effect or unsupported. Holds every problem found, not the first."""

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class DataError(SamestepError):
    """Input data is missing or malformed; names file and line where there is one."""


class TextError(DataError):
    """A text that a model cannot answer; `number` is its place, from 1, among those that it was given with."""

    def __init__(self, number: int, words: str) -> None:
        """words: the text in brackets, the rule, the fix."""
        self.number, self.words = number, words
        super().__init__(f"text {number} {words}")


class CheckpointError(SamestepError):
    """A saved model, adapter or run directory is missing, incomplete or does not fit."""


class BackendError(SamestepError):
    """The backend asked for cannot run here, or another one would run in its place."""


class DivergedError(SamestepError):
    """Training cannot go on: the loss or the gradient is no longer finite."""


class AlreadyFinished(Exception):  # noqa: N818  (news, not a mistake)
    """The run directory holds this very run, finished. Said on rank 0; exit code 0."""
