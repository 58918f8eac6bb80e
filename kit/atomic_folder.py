"""Fill a folder that appears whole or not at all: built beside its place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.artifact import MANIFEST
from kit.errors import UsageError

UNFINISHED = ".unfinished-"  # between the name of what is built and the letters that make it unique
NEW_SECONDS = 60  # for so long a folder may be there without the lock that its maker takes


@contextmanager
def building(out: Path, proof: str = MANIFEST) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `out` when the block ends well, remove it when it does not.

    `proof` is the file by which a finished folder is known. An older one at `out` is replaced; any other non-empty
    folder is refused. The block itself must write that file last (an artifact's with `write_manifest`). Raises
    UsageError for a path that cannot be written. What a killed process left of an earlier attempt is removed.
    """
    out = out.absolute()
    if out.exists() and not (out / proof).is_file() and (not out.is_dir() or any(out.iterdir())):
        what = "is not an artifact" if proof == MANIFEST else f"has no {proof}"
        raise UsageError(f"{out} exists and {what}; choose another --out or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}{UNFINISHED}", dir=out.parent))
    except OSError as error:
        raise UsageError(f"cannot write below {out.parent}: {error.strerror}") from None
    temporary.chmod(0o755)
    lock = _lock(temporary)
    try:
        yield temporary
        if not (temporary / proof).is_file():
            raise AssertionError(f"a folder was built without its {proof}")
        if out.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{out.name}{UNFINISHED}", dir=out.parent))
            os.rename(out, retired / "artifact")
            os.rename(temporary, out)
            shutil.rmtree(retired)
        else:
            os.rename(temporary, out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(_cannot_write(out, temporary, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed, or this process ends in any way; None where another has it.

    A file system without locks counts as locked by another: nothing is removed there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(out: Path) -> None:
    """Remove unfinished folders of this name whose maker no longer runs; a new one may not be locked yet."""
    for left in out.parent.glob(f".{glob.escape(out.name)}{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > NEW_SECONDS and (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _cannot_write(out: Path, temporary: Path, error: OSError) -> str:
    """Say in one sentence why an artifact could not be written; files are named as they would stand in it."""
    names = [Path(os.fsdecode(name)) for name in (error.filename2, error.filename) if isinstance(name, str | bytes)]
    inside = [name.relative_to(temporary) for name in names if name.is_relative_to(temporary)]
    where = f" ({(inside or names)[0]})" if names else ""
    remedy = "; free some space or choose another --out" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"cannot write {out}: {error.strerror}{where}{remedy}"
