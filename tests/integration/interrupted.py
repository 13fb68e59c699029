"""The command line, sent a signal at one call of one function: `interrupted.py SIGNAL MODULE:FUNCTION NTH WHEN ...`."""

import os
import signal
import sys
from functools import reduce, wraps
from importlib import import_module

from sdsearch_lightning.__main__ import main

if __name__ == "__main__":
    number, target, nth, when, *argv = sys.argv[1:]
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, import_module(module))
    original, calls = getattr(owner, name), 0

    @wraps(original)
    def interrupted(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(nth) and when == "before":
            os.kill(os.getpid(), signal.Signals[number])
        result = original(*args, **kwargs)
        if calls == int(nth) and when == "after":
            os.kill(os.getpid(), signal.Signals[number])
        return result

    setattr(owner, name, interrupted)
    sys.exit(main(argv))
