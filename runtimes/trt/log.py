"""TensorRT's messages in Python's log; imports tensorrt, so only modules that need TensorRT may import it."""

from __future__ import annotations

import logging
import re

import tensorrt as trt

logger = logging.getLogger(__name__)
QUIET = logging.DEBUG
KNOWN = "has Int64 binding"  # a warning about every input of ids
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
LEVELS = {
    trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
    trt.ILogger.Severity.ERROR: logging.ERROR,
    trt.ILogger.Severity.WARNING: logging.WARNING,
    trt.ILogger.Severity.INFO: logging.INFO,
    trt.ILogger.Severity.VERBOSE: logging.DEBUG,
}


class Log(trt.ILogger):
    """Forwards messages and keeps the errors, because TensorRT's functions return no reason when they fail."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: list[str] = []
        self.tables: list[str] = []  # tables of compiled layers, which TensorRT for RTX writes to its log
        self.scratch: int | None = None  # bytes of activations that the plan needs

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        level = QUIET if KNOWN in msg else LEVELS[severity]
        logger.log(level, "%s", msg)
        if "LayerType:" in msg:
            self.tables.append(msg)
        elif found := ACTIVATIONS.search(msg):
            self.scratch = int(found[1])
        if level == logging.ERROR:
            self._errors.append(msg)

    def __str__(self) -> str:
        return "; ".join(self._errors[-3:]) or "TensorRT gives no reason"
