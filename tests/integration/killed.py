"""The command line, killed with SIGKILL at one call of one function: `killed.py MODULE:FUNCTION NTH before|after ...`."""

import os
import signal
import sys
from functools import reduce, wraps
from importlib import import_module

from sdsearch_lightning.__main__ import main

if __name__ == "__main__":
    target, nth, when, *argv = sys.argv[1:]
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, import_module(module))
    original, calls = getattr(owner, name), 0

    @wraps(original)
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(nth) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)
    sys.exit(main(argv))
