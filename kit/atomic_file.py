"""Write a file atomically: beside its destination, then renamed to it."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_file(path: Path, content: bytes | str, sync: bool = False) -> None:
    """Replace a file by new content at once, so that a reader finds the old content or the new one, never a part.

    `sync` waits until the content is on the disk. Raises OSError; nothing of the attempt is left then.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        with beside.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
