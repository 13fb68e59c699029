"""A corpus of a million passages: built, killed half-way, built on, mapped and searched, by the command line.

python -m benchmarks.bench_retrieval_scale [--passages 1000000] [--folder F]
"""

from __future__ import annotations

from benchmarks.harness import ROOT, THREADS, Bar, Report, pin_threads

pin_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

from benchmarks.bench_retrieval import write_corpus  # noqa: E402
from sdsearch_lightning.retrieval import DenseRetriever  # noqa: E402


def main() -> int:
    """Runs it; 1 where a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where corpus and index are kept; default: a temporary one")
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)  # what the measured process does
    options = parser.parse_args()
    if options.search:
        print(json.dumps(search(options.search / "corpus.jsonl", options.search / "index")))
        return 0
    report = Report("bench_retrieval_scale", {"passages": options.passages})
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        corpus, index = folder / "corpus.jsonl", folder / "index"
        if not corpus.is_file():
            write_corpus(corpus, options.passages)
        kept = build_half(corpus, index, options.passages // 2)
        report.add("scale", Bar.counted("passages encoded at the kill / all", kept / options.passages, 0.4, 0.7))
        output = build(corpus, index)
        going_on = next(line for line in output.splitlines() if "going on at passage" in line)
        resumed = int(going_on.split("passage ")[1].split(" of")[0].replace(",", ""))
        report.add("scale", Bar.counted("passages not encoded again / those at the kill", resumed / kept, 1.0))
        told = json.loads(run("benchmarks.bench_retrieval_scale", "--search", str(folder)).stdout.splitlines()[-1])
        report.add("scale", Bar.counted("passages that find themselves / 256 asked", told["found"], 1.0))
        share = told["private_bytes"] / told["index_bytes"]
        note = f"index {told['index_bytes'] / 1e9:.2f} GB, private memory {told['private_bytes'] / 1e9:.3f} GB more"
        report.add("scale", Bar.counted("private memory of opening and searching / index", share, at_most=0.1), note)
    return report.finish()


def build_half(corpus: Path, index: Path, num_passages: int) -> int:
    """Starts a build and kills it with SIGKILL once it has noted `num_passages`; how many it had noted."""
    with subprocess.Popen(command(corpus, index), cwd=ROOT, env=os.environ | THREADS) as process:
        while True:
            time.sleep(0.2)
            if process.poll() is not None:
                raise RuntimeError("the build ended before it could be killed; --folder holds a finished index?")
            if noted(index) >= num_passages:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return noted(index)


def noted(index: Path) -> int:
    """Passages that an unfinished build has encoded, by its own note."""
    return max((json.loads(note.read_text())["rows"] for note in index.glob(".*.unfinished/encoded.json")), default=0)


def build(corpus: Path, index: Path) -> str:
    """Builds to the end; what it says."""
    return run(*command(corpus, index)[2:]).stderr


def command(corpus: Path, index: Path) -> list[str]:
    """The command line of the build."""
    paths = ("--corpus_path", str(corpus), "--index_path", str(index))
    return [sys.executable, "-m", "sdsearch_lightning", "index", *paths]


def run(*module: str) -> subprocess.CompletedProcess[str]:
    """`python -m module ...`, in a process of its own."""
    command = [sys.executable, "-m", *module]
    return subprocess.run(command, cwd=ROOT, env=os.environ | THREADS, capture_output=True, text=True, check=True)


def search(corpus: Path, index: Path) -> dict[str, float]:
    """Opens a finished index and asks it for 256 of its own passages."""
    retriever = DenseRetriever.from_index(corpus, index)
    with corpus.open() as file:
        step = 1000
        asked = [json.loads(line) for row, line in enumerate(file) if row % step == 0][:256]
    retriever._load_encoder(retriever.folder).encode_queries(["warm"])  # libraries and encoder are not the index
    before = private_bytes()
    found = retriever.search([row["contents"] for row in asked], 3)
    return {
        "found": float(np.mean([hits[0].id == row["id"] for hits, row in zip(found, asked, strict=True)])),
        "private_bytes": private_bytes() - before,
        "index_bytes": retriever.index_file.stat().st_size,
    }


def private_bytes() -> int:
    """Memory of this process that is neither a file's nor shared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(main())
