"""Probe-only epochs for SimpleTuner: which transformer blocks change the hidden states, and by how much.

Importing this package imports nothing heavy: no torch, no numpy, no SimpleTuner.
"""

__version__ = "0.1.0"
