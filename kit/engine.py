"""How a part is run: the protocol that every runtime implements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kit.ports import Ports

Array = npt.NDArray[np.generic]


class Engine(Protocol):
    """Runs one exported part: arrays by port name in, arrays by port name out.

    An array that is not writeable never changes after it was passed in. An engine may therefore keep such an array on
    its device and skip the copy when the very same object comes again; a caller that wants to change values passes a
    new array. Engines do not change their inputs.
    """

    ports: Ports

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every array has the batch as its first axis.

        Raises EngineError when the runtime fails or an input does not fit its port.
        """
        ...
