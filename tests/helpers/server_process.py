"""The real server process, with a retriever whose answers are known."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

from helpers.paths import ROOT

SCRIPT = """
import json, sys, time
from sdsearch_lightning.retrieval.server.limits import ServerLimits
from sdsearch_lightning.retrieval.server.process import serve
from sdsearch_lightning.types import Passage

class Echo:
    def prepare(self):
        print("prepared")

    def search(self, queries, k):
        time.sleep(float(queries[0]) if queries[0][0].isdigit() else 0.005)
        return [[Passage(f"{i}", f"{query} {i}" + " word" * 100 * (query == "long")) for i in range(k)]
                for query in queries]

serve(Echo(), port=int(sys.argv[1]), limits=ServerLimits(**json.loads(sys.argv[2])))
assert "torch" not in sys.modules
print("ended")
"""


class Server:
    """A process that serves `Echo` with these limits: `1.5` as the first query takes 1.5 s, `long` finds 100 words."""

    def __init__(self, port: int = 0, **limits: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, str(port), json.dumps(limits)],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "prepared\n"
        line = self.process.stdout.readline()
        ready = re.fullmatch(r"sdsearch: serving Echo at (http://127.0.0.1:(\d+)/retrieve)\n", line)
        assert ready, line + self.process.communicate(timeout=10)[1]
        self.url, self.port = ready[1], int(ready[2])

    def end(self, number: int) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err
