"""Digests of the weights of a deployment by their content, so that weights changed after deployment are not served.

The manifest's digest of a weight file covers its header and size only: reading 60 GB at every start would take minutes.
So the content is read once, and its sha256 is kept in contents.json with the file's size, modification time and inode.
A start compares these three, and reads again what differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from kit.artifact import CONTENTS, MANIFEST, Manifest, digest
from kit.atomic_file import write_file
from kit.errors import ArtifactError, Flux2Error, UsageError

logger = logging.getLogger(__name__)
Verify = Literal["quick", "full"]
CHUNK = 8 << 20  # bytes read at a time
NICE = 19  # of the background thread, the lowest priority
LEFT = 1 << 28  # bytes of disk that a copy leaves free
Progress = Callable[[int, int], None]  # bytes done, bytes in total


@dataclass(frozen=True)
class Content:
    """What was found when a file was last seen; `digest` is empty until its content has been read."""

    bytes: int
    mtime_ns: int
    inode: int
    digest: str = ""

    @classmethod
    def of(cls, path: Path) -> Content:
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def same_file(self, other: Content) -> bool:
        """Return whether size, modification time and inode agree."""
        return replace(self, digest="") == replace(other, digest="")


@dataclass(frozen=True)
class Checked:
    """What a check found: the facts of `serve run --json`."""

    files: int  # weight files of the deployment
    read: int  # files whose content was read now
    pending: tuple[str, ...]  # files whose content has never been read
    seconds: float


def weight_files(manifest: Manifest) -> list[str]:
    """List the files whose content the manifest does not cover."""
    return [name for name in manifest.files if name.endswith(".safetensors")]


def check(deployment: Path, manifest: Manifest, how: Verify = "quick") -> Checked:
    """Compare the weights with contents.json; raises ArtifactError that names the first file that differs.

    Content is read where size, modification time or inode differ, and of every file with "full".
    """
    start, known, names, read = time.monotonic(), read_contents(deployment), weight_files(manifest), 0
    found = dict(known)
    for name in names:
        path, old = deployment / name, known.get(name)
        now = Content.of(path)
        if old is not None and not old.digest and not old.same_file(now):
            logger.warning("%s: changed or copied since it was deployed, before its content was first read", path)
        if how == "full" or (old is not None and old.digest and not old.same_file(now)):
            read += 1
            now = replace(now, digest=content_digest(path))
            if old is not None and old.digest not in ("", now.digest):
                raise ArtifactError(
                    f"{path}: its content differs from that in {CONTENTS}, so the weights were changed after "
                    f"deployment; run `serve repository` again, or delete {deployment / CONTENTS} to accept the change"
                )
            found[name] = now
    if found != known:
        with _lock(deployment) as locked:
            if locked:
                write_contents(deployment, found)
    pending = tuple(name for name in names if name not in found or not found[name].digest)
    return Checked(len(names), read, pending, time.monotonic() - start)


class Reader:
    """Reads the content of files in a thread of lowest priority, at most half of the time, and records the digests."""

    def __init__(self, deployment: Path, names: tuple[str, ...]) -> None:
        self._deployment, self._names = deployment, names
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if names:
            self._thread.start()

    def stop(self) -> None:
        """End the thread; files that it has finished stay recorded."""
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        """Wait until every file has been read."""
        if self._names:
            self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        if not os.access(self._deployment, os.W_OK):
            logger.warning(
                "%s is read-only: no digests of the weights can be kept, so changed weights are noticed by the known "
                "answer only; run `serve run --verify full` once where it can be written",
                self._deployment,
            )
            return
        try:
            with _lock(self._deployment) as locked:
                if locked:  # otherwise another server reads the same files
                    self._read()
        except (OSError, Flux2Error) as error:
            logger.warning("%s: the weights could not be read (%s)", self._deployment, error)

    def _read(self) -> None:
        for name in self._names:
            path = self._deployment / name
            before = Content.of(path)
            found = content_digest(path, self._pause)
            if self._stop.is_set():
                return
            if not before.same_file(Content.of(path)):
                logger.warning("%s: changed while the server runs; restart it to check the file", path)
                continue
            known = {**read_contents(self._deployment), name: replace(before, digest=found)}
            if not write_contents(self._deployment, known):
                return

    def _pause(self, seconds: float) -> bool:
        return self._stop.wait(seconds)


def content_digest(path: Path, pause: Callable[[float], bool] = lambda seconds: False) -> str:
    """Return the sha256 of a file; `pause` is told how long each chunk took and may end the work by returning True."""
    sha = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        start = time.monotonic()
        while count := stream.readinto(buffer):
            sha.update(view[:count])
            if pause(time.monotonic() - start):
                break
            start = time.monotonic()
    return sha.hexdigest()


def read_contents(deployment: Path) -> dict[str, Content]:
    """Return what contents.json says; nothing if it is absent or belongs to another manifest.

    Raises ArtifactError if it cannot be read.
    """
    path = deployment / CONTENTS
    try:
        raw = json.loads(path.read_bytes())
        if raw["manifest"] != digest(deployment / MANIFEST):
            return {}
        return {name: Content(**entry) for name, entry in raw["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); delete it, and it is made again") from None


def write_contents(deployment: Path, contents: Mapping[str, Content]) -> bool:
    """Replace contents.json atomically; returns False, with a warning, where it cannot be written."""
    path = deployment / CONTENTS
    raw = {
        "manifest": digest(deployment / MANIFEST),
        "files": {name: asdict(contents[name]) for name in sorted(contents)},
    }
    try:
        write_file(path, json.dumps(raw, indent=1) + "\n", sync=True)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the weights are read again at the next start", path, error.strerror)
        return False
    return True


@contextlib.contextmanager
def _lock(deployment: Path) -> Iterator[bool]:
    """Lock contents.json while it is made; yields False if another process has the lock."""
    folder = os.open(deployment, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        os.close(folder)


def check_space(out: Path, files: list[Path]) -> int:
    """Return the bytes of files to copy; raises UsageError if the disk of `out` has no room for them."""
    needed = sum(path.stat().st_size for path in files)
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed + LEFT > free:
        raise UsageError(
            f"--copy needs {needed / 1e9:.1f} GB in {place}, which has {free / 1e9:.1f} GB free; free some space, "
            "choose another --out, or leave --copy out to link the files"
        )
    return needed


def copy_file(source: Path, target: Path, report: Callable[[int], None] = lambda count: None) -> Content:
    """Copy a file and its times, and read its content on the way; `report` receives the bytes of each chunk."""
    sha = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            sha.update(chunk)
            writer.write(chunk)
            report(len(chunk))
    shutil.copystat(source, target)
    return replace(Content.of(target), digest=sha.hexdigest())
