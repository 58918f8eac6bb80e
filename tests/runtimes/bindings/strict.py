"""A stand-in for the module `tensorrt` that has exactly the names and signatures of NVIDIA's bindings of one version.

What pybind11 refuses, it refuses: an unknown name or enum member, a missing, surplus or misspelled argument, a value of
the wrong class, writing what is read-only, constructing what only TensorRT makes, an instance whose base `__init__` was
not called. It also refuses what pybind11 would let pass in silence: a public method of a subclass that overrides
nothing, or with another number of arguments than TensorRT calls it with. What a method returns is the test's choice
(`behave`); without one it is the emptiest value of the declared type.
"""

from __future__ import annotations

import enum
import inspect
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

Behaviour = Callable[..., Any]


class StrictModule(ModuleType):
    """The module; `calls` lists every call as (class, method, arguments by name)."""

    def __init__(self, interface: Mapping[str, Any]) -> None:
        super().__init__("tensorrt")
        self.__version__ = interface["version"]
        self.interface = interface
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.behaviours: dict[tuple[str, str], Behaviour] = {}
        self.types = _Types(self)

    def __getattr__(self, name: str) -> type:
        """Define a class or enum when it is asked for; raises AttributeError for what the real module does not have."""
        interface = self.__dict__["interface"]
        if name not in interface["classes"] and name not in interface["enums"]:
            raise AttributeError(f"module 'tensorrt' has no attribute {name!r}")
        return self.types[name]

    def behave(self, cls: str, attribute: str, behaviour: Behaviour) -> None:
        """Choose what a method or property gives; it is called with the instance and the arguments by name."""
        described = self.interface["classes"][cls]
        if attribute not in described["methods"] and attribute not in described["properties"]:
            raise AttributeError(f"the real {cls} has no {attribute!r}")
        self.behaviours[cls, attribute] = behaviour

    def create(self, name: str) -> Any:
        """Make an instance as TensorRT itself would, also of a class that has no constructor."""
        cls: Any = self.types[name]
        instance = cls.__new__(cls)
        object.__setattr__(instance, "_values", {})
        return instance

    def called(self, cls: str, method: str) -> list[dict[str, Any]]:
        """Return the arguments of every call of a method so far."""
        assert method in self.interface["classes"][cls]["methods"], f"the real {cls} has no {method}"
        return [arguments for c, m, arguments in self.calls if (c, m) == (cls, method)]

    def define(self, name: str) -> type:
        """Make the stand-in of a class or enum."""
        if name in self.interface["enums"]:
            return _enum(name.rpartition(".")[2], self.interface["enums"][name])
        described = self.interface["classes"][name]
        parents: tuple[type, ...] = (self.types[described["bases"][0]],) if described["bases"] else (_Strict,)
        if name == "IHostMemory":  # has the buffer protocol, which Python 3.11 cannot give to a class of its own
            parents = (*parents, bytes)
        body: dict[str, Any] = {"_described": described, "_module": self, "__init__": _constructor(self, name)}
        for method, overloads in described["methods"].items():
            if method != "__init__":
                body[method] = _method(self, name, method, overloads)
        for attribute, about in described["properties"].items():
            body[attribute] = _property(self, name, attribute, about)
        for inner, full in described["nested"].items():
            body[inner] = self.types[full]
        return type(name, parents, body)

    def bind(self, what: str, overloads: Sequence[Mapping[str, Any]], args: Any, kwargs: Any) -> dict[str, Any]:
        """Match a call against the overloads of a function; raises TypeError as pybind11 does when none fits."""
        refusals = []
        for overload in overloads:
            try:
                return self._bind(overload["parameters"], args, kwargs)
            except TypeError as error:
                refusals.append(str(error))
        raise TypeError(f"{what}(): incompatible arguments: {'; '.join(refusals)}")

    def _bind(self, parameters: Sequence[Mapping[str, Any]], args: Any, kwargs: Any) -> dict[str, Any]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        required = {p["name"] for p in parameters if not p["optional"]}
        signature = [inspect.Parameter(p["name"], kind, default=None) for p in parameters]
        bound: dict[str, Any] = inspect.Signature(signature).bind(*args, **kwargs).arguments
        if missing := required - set(bound):
            raise TypeError(f"missing {', '.join(sorted(missing))}")
        for parameter in parameters:
            if parameter["name"] in bound and not self.fits(bound[parameter["name"]], parameter["type"]):
                value = bound[parameter["name"]]
                raise TypeError(f"{parameter['name']}: {value!r} is no {parameter['type']}")
        return bound

    def fits(self, value: Any, kind: str) -> bool:
        """Tell whether pybind11 would take a value for an argument or property of a declared type."""
        if value is None and kind in self.interface["classes"]:
            return True  # a null pointer
        if kind == "Dims":
            return isinstance(value, self.types["Dims"]) or (
                isinstance(value, list | tuple) and all(self.fits(item, "int") for item in value)
            )
        if kind in self.interface["enums"]:
            return isinstance(value, self.types[kind])
        if kind in self.interface["classes"]:
            return isinstance(value, self.types[kind]) and hasattr(value, "_values")
        match kind:
            case "typing.SupportsInt" | "int":
                return hasattr(value, "__index__") and not isinstance(value, enum.Enum)
            case "typing.SupportsFloat" | "float":
                return hasattr(value, "__float__")
            case "bool":
                return isinstance(value, bool)
            case "str":
                return isinstance(value, str)
            case "tuple" | "list":
                return isinstance(value, tuple if kind == "tuple" else list)
            case "typing_extensions.Buffer":
                return isinstance(value, bytes | bytearray | memoryview | mmap.mmap)
            case "object" | "typing_extensions.CapsuleType" | "collections.abc.Callable":
                return True
        if sequence := re.fullmatch(r"(?:collections\.abc\.Sequence|list)\[(.*)\]", kind):
            return isinstance(value, Sequence) and all(self.fits(item, sequence[1]) for item in value)
        raise NotImplementedError(f"no rule for values of type {kind}")

    def emptiest(self, kind: str) -> Any:
        """Return the default value of a declared return type; a status is True, a class a fresh instance."""
        plain = {"None": None, "bool": True, "int": 0, "float": 0.0, "str": "", "object": None}
        if kind in plain:
            return plain[kind]
        if kind in self.interface["enums"]:
            return next(iter(self.types[kind]))  # type: ignore[call-overload]
        if kind in self.interface["classes"]:
            return self.create(kind)
        if kind == "tuple" or kind.startswith(("list", "tuple[")):
            return [] if kind.startswith("list") else ()
        raise NotImplementedError(f"no empty value of type {kind}: choose one with `behave`")


class _Types(dict[str, type]):
    """Classes and enums by name, each defined when it is first asked for: a test needs few of two hundred."""

    def __init__(self, module: StrictModule) -> None:
        super().__init__()
        self._module = module

    def __missing__(self, name: str) -> type:
        self[name] = made = self._module.define(name)
        return made


class _Strict:
    """Base of every stand-in class."""

    _described: Mapping[str, Any]
    _module: StrictModule

    def __init_subclass__(cls) -> None:
        if "_described" in cls.__dict__:
            return
        for name, value in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            expected = cls._described["overrides"].get(name)
            if expected is None:
                if name not in cls._described["methods"]:
                    raise TypeError(f"{cls.__name__}.{name} overrides nothing: TensorRT would never call it")
                expected = [p["name"] for p in cls._described["methods"][name][0]["parameters"]]
            inspect.signature(value).bind(None, *expected)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_described" in type(self).__dict__ and name not in type(self)._described["properties"]:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


def _constructor(module: StrictModule, name: str) -> Callable[..., None]:
    overloads = module.interface["classes"][name]["methods"].get("__init__")

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if overloads is None:
            raise TypeError(f"{name}: No constructor defined!")
        module.calls.append((name, "__init__", module.bind(name, overloads, args, kwargs)))
        object.__setattr__(self, "_values", {})

    return __init__


def _method(module: StrictModule, cls: str, name: str, overloads: Sequence[Mapping[str, Any]]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = module.bind(f"{cls}.{name}", overloads, args, kwargs)
        module.calls.append((cls, name, bound))
        behaviour = module.behaviours.get((cls, name))
        return behaviour(self, **bound) if behaviour else module.emptiest(overloads[0]["returns"])

    return call


def _property(module: StrictModule, cls: str, name: str, about: Mapping[str, Any]) -> property:
    def read(self: Any) -> Any:
        if behaviour := module.behaviours.get((cls, name)):
            return behaviour(self)
        if name not in self._values:
            self._values[name] = False if about["type"] == "bool" else module.emptiest(about["type"])
        return self._values[name]

    def write(self: Any, value: Any) -> None:
        if not module.fits(value, about["type"]):
            raise TypeError(f"{cls}.{name}: {value!r} is no {about['type']}")
        self._values[name] = value

    return property(read, write if about["writable"] else None)


def _enum(name: str, members: Mapping[str, int]) -> type:
    return enum.Enum(name, dict(members), type=_Number)  # type: ignore[return-value]


class _Number:
    """What pybind11 gives to members of an enum beside name and value."""

    value: int

    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value
