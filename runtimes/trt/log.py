"""TensorRT's messages in Python's log; imports tensorrt, so only modules that need TensorRT may import it."""

from __future__ import annotations

import logging

import tensorrt as trt

logger = logging.getLogger(__name__)
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

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        level = LEVELS[severity]
        logger.log(level, "%s", msg)
        if level == logging.ERROR:
            self._errors.append(msg)

    def __str__(self) -> str:
        return "; ".join(self._errors[-3:]) or "TensorRT gives no reason"
