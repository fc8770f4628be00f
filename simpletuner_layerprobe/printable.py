"""Text that a terminal shows and does not act on: names in a run, a file or an option may be anything."""


def printable(text: str) -> str:
    """The text on one line, with controls, newlines, bidi overrides and the like escaped as in Python; "é" stays."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
