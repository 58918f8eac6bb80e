"""Store the results of all runs on a card in one JSON file: rows by id and their shares of the ceilings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.atomic_file import write_file
from kit.errors import UsageError

Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Read earlier results; a missing file is empty. Raises UsageError for a file that this benchmark did not write."""
    if not path.is_file():
        return {"benchmark": "gpu", "rows": []}
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        ours = facts["benchmark"] == "gpu" and isinstance(facts["rows"], list)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UsageError(f"{path} holds no results of this benchmark; choose another file with --into")
    return facts


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write results atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(facts, indent=1) + "\n")


def merge(facts: dict[str, Any], device: dict[str, Any], settings: dict[str, Any], rows: list[Row], date: str) -> None:
    """Add rows to results.

    Raises UsageError if they were measured on another card, with another torch or other settings, because their shares
    and ratios would not be comparable.
    """
    check_same(facts, "device", device)
    check_same(facts, "settings", settings)
    facts |= {"device": device, "settings": settings}
    fresh = {row["id"]: row | {"date": date} for row in rows}
    kept = [fresh.pop(row["id"], row) for row in facts["rows"]]
    facts["rows"] = kept + list(fresh.values())


def check_same(facts: dict[str, Any], name: str, new: dict[str, Any]) -> None:
    """Raise UsageError if existing results have other facts of this name."""
    old = facts.get(name, new)
    if old != new:
        raise UsageError(
            f"the results so far have {name} {_short(old, new)}; this run has {_short(new, old)}: choose another "
            "file with --into"
        )


def _short(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """List the differing facts."""
    return ", ".join(f"{key}={value}" for key, value in mine.items() if other.get(key) != value)


def add_shares(facts: dict[str, Any]) -> None:
    """Add to every timed row its rate and its share of the bf16 and fp8 ceilings measured on this card."""
    rows = {row["id"]: row for row in facts["rows"]}
    ceilings = {}
    for name in ("bf16", "fp8"):
        row = rows.get(f"ceiling/{name}/matmul", {})
        if row.get("state") == "measured":
            ceilings[name] = row["flops"] / row["median"]
    facts["ceilings"] = ceilings
    for row in facts["rows"]:
        if row.get("flops"):
            row["rate"] = row["flops"] / row["median"]
            row["share"] = {name: row["rate"] / ceiling for name, ceiling in ceilings.items()}


def finished(facts: dict[str, Any]) -> set[str]:
    """Return the ids that need no further run: measured, or known to be unavailable here."""
    return {row["id"] for row in facts["rows"] if row["state"] != "failed"}
