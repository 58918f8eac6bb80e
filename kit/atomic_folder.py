"""Write a folder atomically: fill a temporary folder next to its destination, then rename it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.errors import Flux2Error, UsageError
from kit.outputs import Output, check_out

UNFINISHED = ".unfinished-"  # between the name of the folder and a random suffix
NEW_SECONDS = 60  # how long a new folder may exist before its creator has locked it


@contextmanager
def building(out: Path, makes: Output, inputs: Iterable[Path | None] = ()) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `out` on success and remove it on failure.

    `kit.outputs.check_out` decides whether `out` may be written; an older result of the same command is replaced. The
    block must write the file `makes.mark` last (for an artifact with `write_manifest`). Raises UsageError for a path
    that cannot be written. Remains of attempts whose process was killed are removed.
    """
    out = check_out(out, makes, inputs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}{UNFINISHED}", dir=out.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}") from None
    temporary.chmod(0o755)
    lock = _lock(temporary)
    try:
        yield temporary
        if not (temporary / makes.mark).is_file():
            raise AssertionError(f"a folder was built without its {makes.mark}")
        if out.exists():
            check_out(out, makes, inputs)  # again: the work may have taken hours
            retired = Path(tempfile.mkdtemp(prefix=f".{out.name}{UNFINISHED}", dir=out.parent))
            os.rename(out, retired / "artifact")
            try:
                os.rename(temporary, out)
            except OSError:
                os.rename(retired / "artifact", out)
                retired.rmdir()
                raise
            shutil.rmtree(retired)
        else:
            os.rename(temporary, out)
    except Flux2Error as error:
        shutil.rmtree(temporary, ignore_errors=True)
        error.args = tuple(a.replace(str(temporary), str(out)) if isinstance(a, str) else a for a in error.args)
        raise  # a message names files as in the finished artifact: the temporary folder is gone
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
    """Lock a folder until the descriptor is closed or this process ends; returns None if another process has the lock.

    A file system without locks counts as locked by another process, so nothing is removed there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(out: Path) -> None:
    """Remove unfinished folders of this name whose creator has ended; a new folder may not be locked yet."""
    for left in out.parent.glob(f".{glob.escape(out.name)}{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > NEW_SECONDS and (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _cannot_write(out: Path, temporary: Path, error: OSError) -> str:
    """Describe in one sentence why an artifact could not be written; files are named as in the finished artifact."""
    names = [Path(os.fsdecode(name)) for name in (error.filename2, error.filename) if isinstance(name, str | bytes)]
    inside = [name.relative_to(temporary) for name in names if name.is_relative_to(temporary)]
    where = f" ({(inside or names)[0]})" if names else ""
    remedy = "; free some space or choose another --out" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"cannot write {out}: {error.strerror}{where}{remedy}"
