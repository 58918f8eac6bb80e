"""The parts of README and docs that are written from the code: python -m benchmarks.generated_docs [--check].

A page holds a generated part between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from kit.cli import report
from kit.commands import ROOMS, Help, Parser
from kit.errors import CheckFailed
from kit.variants import VARIANTS, Variant
from pipeline.edit_fields import MIN_STRENGTH
from pipeline.request import ENCODINGS, FIELDS, FORMATS, Limits, check
from serve.metrics import METRICS
from serve.settings import Tuning

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
RULE_FILE = Path("tests/test_architecture.py")


def main(argv: list[str] | None = None) -> int:
    """Write the generated parts, or with --check fail when one is stale; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.generated_docs", description=__doc__, formatter_class=Help)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")

    def step() -> None:
        args = parser.parse_args(argv)
        stale = {page: text for page, text in current(ROOT).items() if text != page.read_text()}
        if stale and args.check:
            names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
            raise CheckFailed(f"stale: {names}; run python -m benchmarks.generated_docs")
        for page, text in stale.items():
            page.write_text(text)
            print(f"written: {page.relative_to(ROOT)}")

    return report(step, False)


def pages(root: Path) -> list[Path]:
    """Return README and the pages of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def current(root: Path) -> dict[Path, str]:
    """Return the text that every page should have; raises CheckFailed for a part that is not known."""
    made: dict[str, str] = {}

    def renew(page: Path, match: re.Match[str]) -> str:
        name = match[2]
        if name not in PARTS:
            raise CheckFailed(f"{page}: unknown generated part {name!r}; there are: {', '.join(PARTS)}")
        if name not in made:
            made[name] = PARTS[name]()
        return f"{match[1]}{made[name]}\n{match[4]}"

    return {page: BLOCK.sub(partial(renew, page), page.read_text()) for page in pages(root)}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Lay a Markdown table out."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def request_fields() -> str:
    """Describe every request field: its type, its default, what is allowed by default, and its meaning."""
    limits = Limits()
    allowed: Mapping[str, str] = {
        "prompt": f"not empty; at most {VARIANTS['klein-4b'].text_tokens} tokens with the chat template",
        "seed": "0 to 2^63-1",
        "negative_prompt": "base variants only",
        "width": f"multiples of 16, {limits.min_side} to {limits.max_side}; area at most {limits.max_pixels:,}",
        "height": "as `width`",
        "steps": f"1 to {limits.max_steps}",
        "guidance": f"0 to {limits.max_guidance:g}; exactly 1 for klein",
        "num_images": f"1 to {limits.max_images}",
        "output_format": ", ".join(FORMATS),
        "response_encoding": ", ".join(ENCODINGS),
        "sigmas": "decreasing, above 0 and at most 1; as many as `steps`",
        "images": "at most 4 for klein, 10 for dev",
        "mask": "klein and klein-base",
        "strength": f"{MIN_STRENGTH:g} to 1",
    }
    rows = [
        (
            f"`{field.name}`",
            field.type.removeprefix("TYPE_") + (" list" if field.many else ""),
            _default(field.name),
            allowed.get(field.name, ""),
            field.about,
        )
        for field in FIELDS
    ]
    return table(("field", "type", "default", "allowed", "meaning"), rows)


def _default(name: str) -> str:
    """Say what a field becomes when it is left out, by variant where variants differ."""
    fixed = {"prompt": "required", "seed": "random", "images": "none", "mask": "none"}
    if name in fixed:
        return fixed[name]
    found: dict[str, list[str]] = {}
    for variant in VARIANTS.values():
        found.setdefault(_shown(variant, name), []).append(variant.name)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} for {', '.join(names)}" for value, names in found.items())


def _shown(variant: Variant, name: str) -> str:
    value = getattr(check({"prompt": "x"}, variant, Limits()), name)
    return (
        "empty"
        if value == ""
        else "evenly spaced"
        if value == ()
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def limits() -> str:
    """Describe the options of `serve repository` that bound requests and machine use."""
    rows = [
        (f"`--{field.name.replace('_', '-')}`", _number(field.default), str(field.metadata.get("about", "")))
        for owner in (Limits, Tuning)
        for field in fields(owner)
        if "about" in field.metadata
    ]
    return table(("option", "default", "meaning"), rows)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def rule() -> str:
    """Quote the import rule from the test that holds it."""
    for node in ast.parse((ROOT / RULE_FILE).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "RULE":
            return f"```\n{ast.literal_eval(node.value)}\n```"
    raise CheckFailed(f"{RULE_FILE}: has no RULE")


def commands() -> str:
    """List every command with what it is for."""
    rows = [
        (f"`{name} {command}`", about) for name, room in ROOMS.items() for command, (_, about) in room.commands.items()
    ]
    return table(("command", "what it does"), rows)


def tree() -> str:
    """List every module with the first line of its docstring."""
    rooms = re.split(r" < |, ", rule().strip("`\n"))
    return "```\n" + "\n".join(line for room in rooms for line in _folder(ROOT / room, 0)) + "\n```"


def _folder(folder: Path, depth: int) -> Iterator[str]:
    """Yield a line for a folder with modules, then those below it."""
    files = [file for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]
    built = folder / "build" if folder.name == "optimum_plugin" else None  # what an installation left behind
    below = [p for p in sorted(folder.iterdir()) if p.is_dir() and p != built and any(p.rglob("*.py"))]
    init = folder / "__init__.py"
    yield _line(depth, f"{folder.name}/", _about(init) if init.is_file() else "")
    for file in files:
        yield _line(depth + 1, file.name, _about(file))
    for path in below:
        yield from _folder(path, depth + 1)


def _line(depth: int, name: str, about: str) -> str:
    return f"{'  ' * depth}{name:<{32 - 2 * depth}}{about}".rstrip()


def _about(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def metrics() -> str:
    """List the metrics that the models of a deployment export."""
    rows = ((f"`{m.name}`{f' by {m.label}' if m.label else ''}", m.kind, m.about) for m in METRICS)
    return table(("metric", "type", "meaning"), rows) + "\n"


PARTS: Mapping[str, Callable[[], str]] = {
    "fields": request_fields,
    "limits": limits,
    "metrics": metrics,
    "rule": rule,
    "commands": commands,
    "tree": tree,
}


if __name__ == "__main__":
    sys.exit(main())
