"""A limit on how long a block of code may take, even one that never lets go of Python's lock."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator

from tests.harness.wording import one_line

USAGE_ERROR = 4
# How much later than by its own line the process is ended by faulthandler, with the stack.
GRACE = 30.0


@contextlib.contextmanager
def time_limit(what: str, seconds: float) -> Iterator[None]:
    """End the process, with one line and status 4, if the block takes longer than some seconds.

    After a tenth of them a line says that the block is still running. Both lines need Python's
    lock; where the block holds it, faulthandler ends the process a little later.
    """
    thread = threading.get_ident()

    def say(text: str) -> None:
        sys.stderr.write(one_line(text) + "\n")
        sys.stderr.flush()

    def end() -> None:
        frame = sys._current_frames()[thread]
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        say(f"ERROR: {what}: not done after {seconds:g} s, at {where}")
        os._exit(USAGE_ERROR)

    soon = f"{what}: still busy after {seconds / 10:g} s, is ended after {seconds:g} s"
    timers = [threading.Timer(seconds / 10, say, [soon]), threading.Timer(seconds, end)]
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for timer in timers:
            timer.cancel()
