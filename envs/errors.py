"""The one kind of error a person can cause, and the guess at what they meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what a person asked for, in one sentence that names the valid or nearest choices."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns "Did you mean X?" with the choice closest to `word`, or "" when none is close."""
    wanted = word.casefold()
    by_lower = {choice.casefold(): choice for choice in choices}

    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, wanted, candidate).ratio()

    contained = [c for c in by_lower if len(wanted) > 1 and wanted in c or len(c) > 2 and c in wanted]
    close = difflib.get_close_matches(wanted, by_lower, n=1)
    if wanted in by_lower:
        best = wanted
    elif contained and not (close and likeness(close[0]) > 0.85):
        best = max(contained, key=lambda choice: (likeness(choice), choice))  # of several versions the latest
    elif close:
        best = close[0]
    else:
        return ""
    return f"Did you mean {by_lower[best]}?"
