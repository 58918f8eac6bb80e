"""The results page: docs/results.md and its plots, from the files of benchmarks/results.

Each result is shown with its command, machine, versions, commit and date, and as the benchmark itself prints it. With
--check nothing is written: it fails if the page is stale, or if a table of the docs has a number that no result behind
it has.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.report.drift import strays
from benchmarks.report.plots import PLOTS
from kit.commands import ROOMS
from kit.errors import CheckFailed, UsageError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = Path("docs") / "results.md"
PICTURES = Path("docs") / "plots"
ABSOLUTE = re.compile(r"(?<![\w.])/(?:[\w.-]+/)+([\w.-]+)")  # a path of the machine that measured
LONG = 30  # lines of a table that is folded
HEAD = (
    "# Results\n\nWritten by `python -m benchmarks report` from `benchmarks/results/`, which holds the JSON of each "
    "run; what the numbers mean is told in [benchmarks](benchmarks.md). Ratios come from runs in turn on one machine. "
    "Absolute times are comparable only within one result.\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="the files of --save")
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help="folder that gets docs/results.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is stale")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write or check the page; raises CheckFailed if --check finds something."""
    results = read_results(args.results)
    files = render(results)
    stale = [str(path) for path, text in files.items() if _text(args.out / path) != text]
    docs = sorted((args.out / "docs").glob("*.md")) if args.check else []
    wrong = [f"{page.name}, {stray}" for page in docs if page.name != PAGE.name for stray in strays(page, args.results)]
    if args.check and (stale or wrong):
        found = [f"stale: {', '.join(stale)}; run python -m benchmarks report"] if stale else []
        raise CheckFailed("; ".join(found + [f"no result has {text}" for text in wrong[:5]]))
    for path in stale:
        (args.out / path).parent.mkdir(parents=True, exist_ok=True)
        (args.out / path).write_text(files[Path(path)])
    return {"results": len(results), "written": stale, "page": str(PAGE)}


def table(facts: dict[str, Any]) -> str:
    """Tell what was written."""
    return "\n".join([f"{facts['results']} results", *(f"written: {path}" for path in facts["written"])])


def read_results(folder: Path) -> dict[str, Any]:
    """Read all results by name; raises UsageError if a file is none."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path}: not a result of a benchmark ({error})") from None
    if not found:
        raise UsageError(f"{folder} has no results; benchmarks write them with --save")
    return found


def render(results: Mapping[str, Any]) -> dict[Path, str]:
    """Return the page and its plots by path."""
    files: dict[Path, str] = {}
    shown: dict[str, list[str]] = {}
    for name, (beside, draw) in PLOTS.items():
        if (picture := draw(results)) is not None:
            files[PICTURES / f"{name}.svg"] = picture
            first = next(result for result in results if result.startswith(beside))
            shown.setdefault(first, []).append(f"![{name.replace('_', ' ')}](plots/{name}.svg)\n")
    sections = [HEAD, *(section(name, facts, shown.get(name, [])) for name, facts in results.items())]
    return {PAGE: "\n".join(sections), **files}


def section(name: str, facts: Mapping[str, Any], pictures: list[str]) -> str:
    """Return the part of the page for one result."""
    text = _plain(shown(facts)).rstrip()
    block = ["```", text, "```", ""]
    if text.count("\n") >= LONG:
        block = ["<details><summary>Table</summary>", "", *block[:-1], "", "</details>", ""]
    return "\n".join([f"## {name}", "", origin(facts), "", *pictures, *block])


def origin(facts: Mapping[str, Any]) -> str:
    """Say by what, where, with what and when a result was made, as far as the file tells."""
    machine = facts.get("machine") or {
        "cpu": facts.get("cpu"),
        "date": facts.get("date"),
        "commit": facts.get("commit"),
    }
    if isinstance(machine, str):
        machine = {"cpu": machine}
    versions = machine.get("versions") or facts.get("versions") or {}
    parts = [
        f"`{_plain(facts['command'])}`" if facts.get("command") else "",
        _cpu(machine.get("cpu")),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{machine['memory_gb']} GB" if machine.get("memory_gb") else "",
        str(machine.get("date") or facts.get("date") or ""),
        f"commit {machine['commit']}" if machine.get("commit") else "",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
        f"load average before {facts['load_average_before']}" if "load_average_before" in facts else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def shown(facts: Mapping[str, Any]) -> str:
    """Return a result as its benchmark prints it, or its single numbers if the benchmark has no table."""
    words = str(facts.get("command", "")).split()
    commands = ROOMS["benchmarks"].commands
    if words[:3] == ["python", "-m", "benchmarks"] and len(words) > 3 and words[3] in commands:
        return str(import_module(commands[words[3]][0]).table(dict(facts)))
    return "\n".join(f"{name}: {value:g}" for name, value in numbers(facts, ""))


def numbers(value: Any, name: str) -> list[tuple[str, float]]:
    """Return the single numbers of a result with the path of their names; lists are left out."""
    if isinstance(value, Mapping):
        inside = ((f"{name} {key}".strip(), inner) for key, inner in value.items() if key != "machine")
        return [pair for path, inner in inside for pair in numbers(inner, path)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [(name, float(value))] if is_number else []


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _cpu(value: Any) -> str:
    """Return the name of a CPU; reports of the gate have an object with its name and features."""
    if isinstance(value, Mapping):
        return f"{value['name']} ({', '.join(value['features'])})"
    return str(value or "")


def _plain(text: str) -> str:
    """Leave the folders of the measuring machine out."""
    return ABSOLUTE.sub(r"\1", text)
