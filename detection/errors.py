"""What goes wrong because of the user's input, as opposed to a bug."""


class UserError(Exception):
    """A mistake in the input: one line that names it and says what to do.

    The scripts print the line and exit with status 1; any other exception is a bug and keeps its
    traceback.
    """


def first_line(error: Exception) -> str:
    """The first line of what an error says, for a message of one line; else the error's class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
