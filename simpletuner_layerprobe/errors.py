"""The errors that this package raises for its users, by kind, so that a caller need not read their text."""


class ProbeError(Exception):
    """An error for the user: one line that says what was found, what was expected and what to do.

    The command line prints it on stderr without a traceback and exits with 1.
    """


class RunError(ProbeError):
    """A run folder, its records or an article file: missing, damaged, another run's, or refused by the disk."""


class ConfigError(ProbeError):
    """What the user asked for: options, readings, budgets, a LyCORIS config."""


class SeamError(ProbeError):
    """SimpleTuner is not what this version was written for, or is set to something that cannot be probed."""


class ModelError(ProbeError):
    """A model or family whose blocks are not known, or are not as the table says."""
