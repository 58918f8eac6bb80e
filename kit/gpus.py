"""Look GPUs up: by their names in the kit, by what people call them, and by what the driver reports."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping

from kit.errors import UsageError
from kit.gpu_spec import FIRST_CAPABILITY, GB, MIB, TERA, Generation, Gpu, rates
from kit.gpu_table import GPUS

__all__ = ["FIRST_CAPABILITY", "GB", "GPUS", "MIB", "TERA", "Generation", "Gpu", "gpu", "of_device", "rates"]
logger = logging.getLogger(__name__)
_MAKER = re.compile(r"nvidia|geforce|tesla|quadro")
_FORM = re.compile(r"sxm[2-5]?|hbm\d|hgx")  # the form of the cards in the table, where there is more than one
# Names that leave something open, and what they are taken for.
ALIASES: Mapping[str, str] = {
    "a100": "a100-80g",
    "a10080gb": "a100-80g",
    "a10040gb": "a100-40g",
    "h10080gb": "h100",
    "h200141gb": "h200",
    "3090": "rtx3090",
    "4090": "rtx4090",
    "5090": "rtx5090",
    "rtxa6000": "a6000",
    "pro6000": "rtxpro6000",
    "6000pro": "rtxpro6000",
    "rtx6000pro": "rtxpro6000",
    "rtxpro6000blackwell": "rtxpro6000",
}
# Cards that are near one in the table by name only.
OTHERS: Mapping[str, str] = {
    "h100pcie": "the PCIe card has about half the bandwidth of the h100 (SXM)",
    "h100nvl": "the NVL card has other memory than the h100 (SXM)",
    "rtx4090d": "the D card has fewer cores than the rtx4090",
    "rtx5090d": "the D card has lower rates than the rtx5090",
    "rtx3090ti": "the Ti card has other rates than the rtx3090",
    "rtxpro6000maxq": "the Max-Q card has half the power limit of the rtxpro6000",
}
# What follows the name of a card in the name of another one: RTX 3090 Ti, RTX 4090 Laptop GPU.
_ANOTHER = re.compile(r"[ -]?(Ti|D|SUPER|Laptop|Mobile|Max-Q)\b", re.IGNORECASE)


def gpu(name: str) -> Gpu:
    """Look up a GPU by name or by another spelling of it, which is logged.

    Raises UsageError that lists the known names.
    """
    if name in GPUS:
        return GPUS[name]
    plain = _MAKER.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))
    plain = re.sub(r"^(\D+\d+)(80|40)g$", r"\1\2gb", plain)
    spelled = {re.sub(r"[^a-z0-9]", "", known): known for known in GPUS} | dict(ALIASES)
    found = spelled.get(plain) or spelled.get(_FORM.sub("", plain))
    if found is None:
        why = OTHERS.get(plain)
        near = difflib.get_close_matches(plain, spelled, 1)
        hint = f"; {why}" if why else f"; did you mean {spelled[near[0]]}?" if near else ""
        raise UsageError(f"unknown gpu {name!r}; there are: {', '.join(GPUS)}{hint}")
    more = "; the card with 40 GB is a100-40g" if found == "a100-80g" and "80" not in plain else ""
    logger.warning("gpu %r is taken for %s (%s)%s", name, found, GPUS[found].title, more)
    return GPUS[found]


def of_device(device_name: str, memory_bytes: int) -> Gpu | None:
    """Find a GPU by the name and memory that the driver reports; None if it is not listed."""
    fits = [g for g in GPUS.values() if _named(g, device_name)]
    fits = [g for g in fits if abs(g.memory_bytes - memory_bytes) < 0.1 * g.memory_bytes]
    return max(fits, key=lambda g: max(len(w) for w in g.cuda_names if w in device_name), default=None)


def _named(card: Gpu, device_name: str) -> bool:
    """Return whether a driver's name is that of a card and not of another one whose name begins with it."""
    return any(word in device_name and not _ANOTHER.match(device_name.partition(word)[2]) for word in card.cuda_names)
