"""The protocol of engines: how a part is run, whatever the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kit.ports import Ports

Array = npt.NDArray[np.generic]


class Engine(Protocol):
    """Runs one exported part: arrays by port name in, arrays by port name out.

    Read-only means unchanged: an array that is not writeable when it is passed in never changes afterwards. An engine
    may keep it on its device and skip the upload when the same object is passed again. A caller that wants other values
    passes a new array. Writeable arrays are read at every call.

    Engines do not change their inputs, and an output does not change when the engine runs again.
    """

    ports: Ports

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every array has the batch as its first axis.

        Raises EngineError if the runtime fails or an input does not fit its port.
        """
        ...
