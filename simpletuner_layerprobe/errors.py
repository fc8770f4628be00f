"""The errors that this package raises for its users."""


class ProbeError(Exception):
    """An error for the user: one line that says what was found, what was expected and what to do.

    The command line prints it on stderr without a traceback and exits with 1.
    """
