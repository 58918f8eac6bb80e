"""What is installed for what: extras bring what their commands import, and no more is asked of anyone."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from kit.commands import ROOMS
from kit.extras import BRINGS, NEEDS, extra_for
from tests.test_architecture import FLOOR

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
IMPORTED_AS = {
    "flip-evaluator": {"flip_evaluator"},
    "grpcio": {"grpc"},
    "onnx-ir": {"onnx_ir"},
    "opentelemetry-exporter-otlp-proto-http": {"opentelemetry"},
    "opentelemetry-sdk": {"opentelemetry"},
    "pillow": {"PIL"},
    "protobuf": {"google"},
    "scikit-image": {"skimage"},
    "tensorrt-cu13": {"tensorrt"},
    "tensorrt-rtx-cu13-bindings": {"tensorrt_rtx_bindings"},
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": {"onnxruntime_ep_nv_tensorrt_rtx"},
    "transformers": {"transformers", "tokenizers"},  # pins its own tokenizers
}
NO_EXTRA = {"triton_python_backend_utils", "torchao"}  # Triton's own; and what one benchmark compares with
INDIRECT = {"nvidia-pytriton", "jinja2"}  # started as a program; imported by transformers
COMMANDS = [(f"{room} {name}", module) for room in ROOMS for name, (module, _) in ROOMS[room].commands.items()]
MODELS = sorted((ROOT / "model_repository").glob("*/1/model.py"))


def provided(extra: str) -> set[str]:
    """Return what an extra lets one import, the extras that it includes among it."""
    found: set[str] = set()
    for requirement in EXTRAS[extra]:
        name, inner = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement).groups()  # type: ignore[union-attr]
        if name == "flux2-deploy":
            found |= {package for other in inner.split(",") for package in provided(other)}
        else:
            found |= IMPORTED_AS.get(name, {name})
    return found


def imports(tree: ast.Module, name: str, inside_functions: bool) -> Iterator[str]:
    """Yield the dotted names that a module imports; of `from a import b` both a and a.b."""
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            head = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*head, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif inside_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return found if found.is_file() else None


def packages_of(start: Path, everywhere: bool) -> set[str]:
    """Return the packages that running a file imports.

    Modules are followed from one to the next: what they import at their head, or everywhere in them; of the first file
    the imports inside functions count in either case, since a command imports its work when it runs.
    """
    seen: set[Path] = set()
    found: set[str] = set()
    waiting = [(start, ".".join(start.relative_to(ROOT).with_suffix("").parts))]
    while waiting:
        file, name = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for target in imports(ast.parse(file.read_text()), name, everywhere or file == start):
            top = target.split(".")[0]
            if top in FLOOR:
                parents = [target.rsplit(".", n)[0] for n in range(target.count(".") + 1)]
                waiting += [(path, module) for module in parents if (path := file_of(module)) is not None]
            elif top not in sys.stdlib_module_names:
                found.add(top)
    return found - NO_EXTRA


@pytest.mark.parametrize("extra", BRINGS)
def test_the_table_of_imports_says_what_pyproject_says(extra: str) -> None:
    assert provided(extra) - INDIRECT == BRINGS[extra]


@pytest.mark.parametrize(("command", "module"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_the_extra_of_a_command_brings_what_it_imports(command: str, module: str) -> None:
    file = file_of(module)
    assert file is not None
    extra = NEEDS.get(command, NEEDS.get(command.split()[0]))
    own = BRINGS[extra] if extra else frozenset()
    optional = {"tensorrt"} if command.startswith("benchmarks") else set()  # benchmarks that take either runtime
    assert packages_of(file, everywhere=False) - optional <= own
    for package in packages_of(file, everywhere=True):
        assert extra_for(command, package), f"{command} may import {package}, which no extra brings"


@pytest.mark.parametrize("model", MODELS, ids=[model.parts[-3] for model in MODELS])
def test_serve_brings_what_the_models_of_a_deployment_import(model: Path) -> None:
    assert packages_of(model, everywhere=False) <= BRINGS["serve"]


def test_a_client_needs_no_torch_an_exporter_no_flip_a_server_no_exporter() -> None:
    assert "torch" not in provided("client")
    assert not {"flip_evaluator", "skimage", "scipy"} & provided("export")
    assert not {"diffusers", "onnxscript", "flip_evaluator"} & provided("serve")
    assert PROJECT["project"]["dependencies"] == []


def test_only_the_cpu_server_holds_numpy_back() -> None:
    capped = [extra for extra, needs in EXTRAS.items() if any(re.match(r"numpy.*<", need) for need in needs)]
    assert capped == ["cpu-server"]


def test_every_package_of_the_repository_is_installed() -> None:
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts) for room in FLOOR for file in (ROOT / room).rglob("__init__.py")
    }
    assert folders == {name for name in PROJECT["tool"]["setuptools"]["packages"] if file_of(name)}


def test_the_lock_satisfies_every_extra_that_make_env_installs() -> None:
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines()[1:])
    names = {name.lower().replace("_", "-") for name in locked}
    wanted = {
        match[0]
        for extra in ("client", "export", "serve", "quality", "cpu-server", "chart", "train", "dev")
        for need in EXTRAS[extra]
        if (match := re.match(r"[\w-]+", need)) and match[0] != "flux2-deploy"
    }
    assert {name.lower().replace("_", "-") for name in wanted} <= names
    assert locked["numpy"].startswith("1.26")


def test_optimum_belongs_to_one_distribution_only() -> None:
    """With two, diffusers warns at every import, whoever uses it."""
    assert metadata.packages_distributions()["optimum"] == ["optimum"]
