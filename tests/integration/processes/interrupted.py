"""The command line, with a fault at one call of a function: `interrupted.py WHAT[@RANK] MODULE:FUNCTION NTH WHEN ...`.

WHAT is a signal, ENOSPC or the name of an exception; without a rank, it is on all of them. WHEN is before or after.
"""

import builtins
import errno
import os
import signal
import sys
from functools import reduce, wraps
from importlib import import_module

from sdsearch_lightning.__main__ import end_process, main


def strike(what):
    if what in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "ENOSPC":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise getattr(builtins, what)("injected")


if __name__ == "__main__":
    what, target, nth, when, *argv = sys.argv[1:]
    what, _, rank = what.partition("@")
    is_here = rank in ("", os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, import_module(module))
    original, calls = getattr(owner, name), 0

    @wraps(original)
    def interrupted(*args, **kwargs):
        global calls
        calls += 1
        if is_here and calls == int(nth) and when == "before":
            strike(what)
        result = original(*args, **kwargs)
        if is_here and calls == int(nth) and when == "after":
            strike(what)
        return result

    setattr(owner, name, interrupted)
    end_process(main(argv))
