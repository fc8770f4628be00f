"""Probe-only epochs for SimpleTuner: which transformer blocks change the hidden states, and by how much.

Importing this package imports nothing heavy: no torch, no numpy, no SimpleTuner.
"""

__version__ = "0.1.0"


class ProbeError(Exception):
    """An error for the user: one line that says what was found, what was expected and what to do.

    The command line prints it on stderr without a traceback and exits with 1.
    """
