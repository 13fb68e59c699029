"""A folder that is either finished or not there: named by what it depends on, built under a lock, resumed after a kill.

    <root>/<fingerprint>/               manifest.json and what was built
    <root>/.<fingerprint>.unfinished/   what a killed build left; the next one goes on from it
    <root>/.<fingerprint>.lock          held by who builds

The fingerprint covers everything that the contents depend on, so a folder cannot be stale: another corpus or encoder
makes another folder. It appears by one rename, so it cannot be half written either.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdsearch_lightning.errors import ConfigError, DataError, SDSearchError
from sdsearch_lightning.files import sync, sync_names, telling_full_disk, write_text
from sdsearch_lightning.retrieval.jsonl import require_file

_MANIFEST = "manifest.json"


class IndexFolder:
    """One index below `root`.

    Args:
        root: folder that holds any number of indexes.
        identity: everything that the contents depend on; JSON values.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.root, self.identity = root, dict(identity)
        self.path = root / _digest(json.dumps(self.identity, sort_keys=True).encode())[:16]

    @property
    def is_finished(self) -> bool:
        """Whether it can be opened."""
        return is_finished(self.path)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What a finished folder tells of itself: its identity, and what `write` returned."""
        return read_manifest(self.path)

    def build(self, write: Callable[[Path], Mapping[str, Any]]) -> None:
        """Has `write` fill the folder, unless it is finished; a second process waits and finds it done.

        Args:
            write: gets the unfinished folder, in which an earlier, killed call may have left a part, and returns what
                the manifest is to tell beside the identity.
        """
        if self.is_finished:  # no lock, then: the folder may be one that can only be read
            return
        with self._alone():
            if self.is_finished:  # by the process before us
                return
            unfinished = self.root / f".{self.path.name}.unfinished"  # no draft: what is in it is kept
            is_new = not unfinished.exists()
            unfinished.mkdir(exist_ok=True)
            try:
                with telling_full_disk(unfinished):
                    told = self.identity | dict(write(unfinished))
            except SDSearchError:
                if is_new:  # else it holds hours of somebody's work, perhaps
                    shutil.rmtree(unfinished)
                raise
            write_text(unfinished / _MANIFEST, json.dumps(told, indent=2) + "\n")
            sync(unfinished)
            unfinished.rename(self.path)
            sync_names(self.root)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for a lock, which a dead process gives up. Its file stays: a lock that is moved or removed is none."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / f".{self.path.name}.lock").open("w")
        except OSError as error:
            raise ConfigError(f"index_path: expected a folder to write to, found {self.root} ({error}).") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def is_finished(folder: Path) -> bool:
    """Whether it is a finished index; other programs have manifests too."""
    return (folder / _MANIFEST).is_file() and re.fullmatch("[0-9a-f]{16}", folder.absolute().name) is not None


def finished_folders(root: Path) -> list[Path]:
    """Finished indexes below `root`, or `root` itself where it is one."""
    return [
        folder for folder in (root, *sorted(path.parent for path in root.glob(f"*/{_MANIFEST}"))) if is_finished(folder)
    ]


def choose_manifest(root: Path, corpus: Path, encoder: str | None = None, backend: str | None = None) -> dict[str, Any]:
    """The manifest of the one dense index below `root` that fits.

    Args:
        root: folder of indexes, or one of them.
        corpus: the file it must have been built from.
        encoder: identity of the encoder it must have been built with; None: any.
        backend: "faiss" or "torch", which must be able to read it; None: any.

    Raises:
        ConfigError: none fits, or more than one; the message says what is there.
    """
    manifests = [manifest for path in finished_folders(root) if "encoder_name" in (manifest := read_manifest(path))]
    digest = CorpusFile.read(corpus, root).digest
    fitting = [
        manifest
        for manifest in manifests
        if manifest["corpus"] == digest
        and encoder in (None, manifest["encoder"])
        and backend in (None, manifest["backend"])
    ]
    if len(fitting) == 1:
        return fitting[0]
    wanted = f"expected one index of {corpus}" + (f" by encoder {encoder[:40]!r}" if encoder else "")
    shown = _described(manifests, digest)
    if fitting:
        raise ConfigError(f"index_path: {wanted} in {root}, found {len(fitting)}: {shown}. Name one of their folders.")
    build = f"sdsearch index --corpus_path {corpus} --index_path {root} --encoder ..."
    raise ConfigError(f"index_path: {wanted} in {root}, found {shown or 'none'}. Build it: {build}")


def described(root: Path) -> str:
    """The dense indexes below `root`: of which file, by which encoder, of which kind; "" without any."""
    manifests = [manifest for path in finished_folders(root) if "encoder_name" in (manifest := read_manifest(path))]
    return _described(manifests)


def _described(manifests: Sequence[Mapping[str, Any]], digest: str | None = None) -> str:
    def told(manifest: Mapping[str, Any]) -> str:
        same = "" if digest is None else f" ({'same' if manifest['corpus'] == digest else 'other'} contents)"
        kind = f"{manifest['encoder_name']!r}, {manifest['factory']}, for {manifest['backend']}"
        return f"{manifest['corpus_file']}{same} by {kind}"

    return "; ".join(map(told, manifests))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        DataError: it is damaged.
    """
    try:
        return _Manifest(json.loads((folder / _MANIFEST).read_text(encoding="utf-8")), file=folder / _MANIFEST)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder / _MANIFEST}: expected a JSON object ({error}). Delete the folder; it is built again."
        ) from error


class _Manifest(dict[str, Any]):
    """A manifest, in which a damaged key is an error for the user."""

    def __init__(self, values: Any, file: Path) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise DataError(
            f"{self.file}: expected the key {key!r}, found {list(self)}. Delete the folder; it is built again."
        )


@dataclass(frozen=True)
class CorpusFile:
    """A corpus as it was when its digest was taken."""

    path: Path
    digest: str
    """SHA-256 of its bytes."""
    stamp: list[Any]
    """Changes whenever the file does; the time in it is that of the last change of any kind, which nobody can set."""

    @classmethod
    def read(cls, path: Path, root: Path) -> CorpusFile:
        """The file; its digest is taken from a manifest below `root` where it has not been touched since.

        Raises:
            DataError: there is no such file.
        """
        require_file(path)
        stamp = _stamp(path)
        for manifest in map(read_manifest, finished_folders(root)):
            if manifest.get("corpus_stamp") == stamp:
                return cls(path, str(manifest["corpus"]), stamp)
        return cls(path, _digest_file(path), stamp)

    def check(self) -> None:
        """Raises DataError where the file has changed since: what was read is not what the digest says."""
        if _stamp(self.path) != self.stamp:
            raise DataError(f"{self.path}: expected a file that stays as it is, but it changed while it was indexed.")


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_ctime_ns]


def digest_folder(folder: Path) -> str:
    """Of the names and contents of all its files but hidden ones."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [name for name in files if not any(part.startswith(".") for part in name.parts)]
    return _digest("".join(f"{name.as_posix()} {_digest_file(folder / name)}\n" for name in visible).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
