"""The wording of the suite's errors: one line, with the nearest accepted word.

xfv1 has a module of its own for its errors, as neither may need the other.
"""

import difflib
import reprlib
from collections.abc import Iterable

# A line of an error is no longer than this many characters.
LONGEST = 1000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def one_line(text: str) -> str:
    """The text without line breaks and other unprintable characters, cut in its middle if long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"


def shown(value: object) -> str:
    """The value as Python writes it, cut in its middle if long."""
    return _SHORT.repr(value)


def cause(error: BaseException) -> str:
    """An exception's type and message."""
    name, text = type(error).__name__, str(error)
    return f"{name}: {text}" if text else name


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """A question in brackets with the accepted word that is nearest; empty if none is near."""
    by_case = {name.lower(): name for name in accepted}
    near = difflib.get_close_matches(word.lower(), by_case, n=1)
    return f" (did you mean {by_case[near[0]]}?)" if near else ""
