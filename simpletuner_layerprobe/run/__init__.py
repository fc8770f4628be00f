"""The run folder: the only code that knows its format."""
