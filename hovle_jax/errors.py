"""The one exception a user is meant to read: one line that says what is wrong and what to do."""


class UserError(Exception):
    """Bad input: a file, a row, a tensor or a config key, named, with the fix.

    The command line prints it as one line and exits with status 1; nothing else is lost.
    """


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
