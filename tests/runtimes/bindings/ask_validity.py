"""Ask the real TensorRT for RTX whether a file is a plan for this machine; test_trt_rtx runs it as a process."""

from __future__ import annotations

import sys
from pathlib import Path

from kit.compilers import COMPILERS, activate


def main() -> int:
    trt = activate(COMPILERS["tensorrt-rtx"])
    from runtimes.trt.log import Log
    from runtimes.trt.rtx import require_valid

    log, path = Log(), Path(sys.argv[1])
    require_valid(trt.Runtime(log), path.read_bytes(), path, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
