"""The one exception that users are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, where, and what to do.

    The command line prints it as one sentence and exits with code 2; in Python it is raised as it is.
    """


def printable(text: str) -> str:
    """User text for a terminal: control characters, which could move the cursor or worse, become `�`."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ` Did you mean 'graddot' or 'gradcos'?`, or the whole list where nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f" Known: {', '.join(known[:12]) or 'none'}{more}."
