"""The stand-in for TensorRT compared with the real bindings: the same names, signatures and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.runtimes.bindings import typings
from tests.runtimes.bindings.load import misspellings
from tests.runtimes.bindings.real import VERSIONS, folder, interface, make_stubs
from tests.runtimes.bindings.signatures import signatures
from tests.runtimes.bindings.strict import StrictModule


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> Any:
    return StrictModule(interface(request.param))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_committed_type_stubs_are_those_of_the_real_bindings(version: str) -> None:
    assert typings.path(version).read_text() == typings.stub(interface(version)), "python -m tests.bindings.typings"


def test_the_real_bindings_say_what_the_two_versions_have() -> None:
    old, new = (interface(version) for version in VERSIONS)
    assert "FP8" in old["enums"]["BuilderFlag"]
    assert "FP8" not in new["enums"]["BuilderFlag"], "TensorRT 11 has no precision flags"
    assert "device_memory_size" in old["classes"]["ICudaEngine"]["properties"]
    assert "device_memory_size" not in new["classes"]["ICudaEngine"]["properties"]
    for found in (old, new):
        assert found["enums"]["BuilderFlag"]["STRIP_PLAN"]
        assert found["classes"]["IStreamWriter"]["overrides"] == {"write": ["data"]}


def test_signatures_are_read_from_docstrings_with_overloads_defaults_and_cpp_names() -> None:
    doc = (
        "f(*args, **kwargs)\nOverloaded function.\n\n"
        "1. f(self: tensorrt_bindings.tensorrt.A, b: nvinfer1::v_1_0::B, c: E = <E.X: 0>) -> bool\n\n    Text.\n\n"
        "2. f(self: tensorrt_bindings.tensorrt.A, d: list[tuple[int, bool]] = None) -> nvonnxparser::IParserError\n"
    )
    first, second = signatures(doc)
    assert first == {
        "parameters": [{"name": "b", "type": "B", "optional": False}, {"name": "c", "type": "E", "optional": True}],
        "returns": "bool",
    }
    assert second["parameters"] == [{"name": "d", "type": "list[tuple[int, bool]]", "optional": True}]
    assert second["returns"] == "ParserError"
    assert signatures("no signature here") == []


def _subclass(trt: Any, base: str, **methods: Callable[..., Any]) -> Any:
    return type("Mine", (getattr(trt, base),), methods)


MISTAKES: dict[str, Callable[[Any], object]] = {
    "a class": lambda trt: trt.Bilder,
    "a method": lambda trt: trt.create("Builder").create_netwerk(),
    "a flag": lambda trt: trt.BuilderFlag.STRIP_PLANS,
    "a nested enum member": lambda trt: trt.ILogger.Severity.WARN,
    "an argument's name": lambda trt: trt.create("Builder").create_network(flag=1),
    "a missing argument": lambda trt: trt.create("IOptimizationProfile").set_shape("x", (1,), (1,)),
    "a surplus argument": lambda trt: trt.create("IBuilderConfig").add_optimization_profile(
        trt.create("IOptimizationProfile"), 1
    ),
    "an argument's class": lambda trt: trt.OnnxParser(trt.create("Builder"), trt.Logger()),
    "text for a number": lambda trt: trt.create("IExecutionContext").set_tensor_address("x", "0"),
    "a flag of another enum": lambda trt: trt.create("IBuilderConfig").set_flag(trt.MemoryPoolType.WORKSPACE),
    "an unknown property": lambda trt: setattr(trt.create("IBuilderConfig"), "builder_optimisation_level", 3),
    "a read-only property": lambda trt: setattr(trt.create("ICudaEngine"), "num_layers", 3),
    "a property's class": lambda trt: setattr(trt.create("IBuilderConfig"), "builder_optimization_level", "3"),
    "what has no constructor": lambda trt: trt.ICudaEngine(),
    "an override": lambda trt: _subclass(trt, "IProgressMonitor", step_completed=lambda self, phase_name, step: True),
    "an override's arguments": lambda trt: _subclass(trt, "IStreamWriter", write=lambda self: 0),
    "a base that was not initialized": lambda trt: setattr(
        trt.create("IBuilderConfig"),
        "progress_monitor",
        _subclass(trt, "IProgressMonitor", __init__=lambda self: None)(),
    ),
    "a behaviour that the real class does not have": lambda trt: trt.behave("Builder", "create_netwerk", print),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_stand_in_refuses(trt: Any, mistake: str) -> None:
    with pytest.raises((AttributeError, TypeError)):
        MISTAKES[mistake](trt)


def test_the_stand_in_takes_what_is_right(trt: Any) -> None:
    logger = trt.Logger(min_severity=trt.ILogger.Severity.ERROR)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    config = builder.create_builder_config()
    config.progress_monitor = _subclass(trt, "IProgressMonitor", step_complete=lambda self, phase_name, step: True)()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", min=(1, 2), opt=(1, 2), max=(1, 2))
    assert config.add_optimization_profile(profile) == 0
    assert trt.OnnxParser(network, logger).parse(b"model") is True
    assert trt.called("Builder", "create_network") == [{"flags": flags}]


def test_a_misspelling_is_made_of_every_attribute_keyword_and_override() -> None:
    text = "class A(trt.B):\n    def write(self):\n        self.go(size=self.size, other=1)\n"
    made = dict(misspellings(text, {"B", "write", "size"}))
    assert set(made) == {"line 1: .B", "line 2: def write", "line 3: size=", "line 3: .size"}
    assert made["line 3: size="].splitlines()[2] == "        self.go(sizex=self.size, other=1)"


def test_without_the_bindings_or_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no TensorRT bindings; `make env` fetches them"):
        folder("1.2.3.4")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="no C compiler"):
        make_stubs("11", tmp_path)
