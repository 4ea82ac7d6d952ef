"""Policies by name, and their parameters: a policy is one file, and everything else about it follows from that.

`@policy` registers a dataclass, and `parameter` makes a field of it that users may choose, with its default, bounds and
help text. From these come `kvarena.policies.params` (the JSON of requests and its checks), the settings of the stack,
command lines, `compose.yaml`, `.env.example` and the page's controls. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import kvarena.policies
from kvarena.core.policy import RecomputeAll, RecomputeNone, SelectionPolicy

Value = float | int | str
PolicyClass = TypeVar("PolicyClass", bound=type[SelectionPolicy])

DEFAULT_POLICY = "kv_deviation"
NAME = "[a-z][a-z0-9_]*"
"""The form of a policy's name."""
REQUEST_KEYS = ("max_ttft_ms", "store", "chunks", "token_scores")
"""What a request says beside a policy and its parameters."""
_CHUNK_SETTINGS = ("separator", "sink_tokens", "seams", "min_chunk_tokens")
_BLEND_SETTINGS = (*_CHUNK_SETTINGS, "step_tokens", "store_bytes", "index_path", "unsupported", "engine", "port")
_LMCACHE_SETTINGS = ("lmcache_url", "lmcache_http_url", "lmcache_timeout_s")
RESERVED = frozenset(("policy", *REQUEST_KEYS, *_BLEND_SETTINGS, *_LMCACHE_SETTINGS))
"""Names that can't be those of parameters, for they stand beside them in a request or in the blend's settings."""
_NO_POLICIES = ("params", "registry")
_KEY = "parameter"


@dataclass(frozen=True)
class Parameter:
    """What a request, a command line or a setting may choose: a number within bounds, or one of some words.

    `unit` is what an integer counts. Raises `ValueError` where neither bounds nor choices are given.
    """

    name: str
    default: Value
    help: str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.type is str and not self.choices:
            raise ValueError(f"parameter {self.name or self.help!r} needs choices")
        if self.type is not str and (self.at_least is None or self.at_most is None):
            raise ValueError(f"parameter {self.name or self.help!r} needs at_least and at_most")
        self.check(self.default)

    @property
    def type(self) -> type[Value]:
        """int, float or str."""
        kind = type(self.default)
        if kind not in (int, float, str):
            raise ValueError(f"a parameter is an int, a float or a str, not {self.default!r}")
        return kind

    @property
    def values(self) -> str:
        """In words, such as `from 0 to 1` or `keys, values`."""
        return ", ".join(self.choices) if self.choices else f"from {self.at_least} to {self.at_most}"

    @property
    def help_with_values(self) -> str:
        return f"{self.help} {f'One of {self.values}' if self.choices else self.values.capitalize()}."

    def check(self, value: object) -> None:
        """Raises `ValueError` naming the value and the choices."""
        if self.type is str:
            if value not in self.choices:
                raise ValueError(f"{self.name} must be one of {self.values}, not {value!r}")
            return
        kinds = (int,) if self.type is int else (int, float)
        assert self.at_least is not None, "__post_init__ has seen to it"
        assert self.at_most is not None, "__post_init__ has seen to it"
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.at_least <= value <= self.at_most:
            number = f"a number of {self.unit}" if self.unit else "a whole number" if self.type is int else "a number"
            raise ValueError(f"{self.name} must be {number} {self.values}, not {value!r}")

    def read(self, text: str) -> Value:
        """The value of what was typed; text that isn't one is returned as it is, for `check` to refuse."""
        try:
            return self.type(text)
        except ValueError:
            return text

    def describe(self) -> dict[str, Any]:
        """For the API: plain values."""
        bounds = {"at_least": self.at_least, "at_most": self.at_most}
        values = {"choices": list(self.choices)} if self.choices else bounds
        kinds = {int: "integer", float: "number", str: "string"}
        return {"type": kinds[self.type], **values, "default": self.default, "help": self.help}


def parameter(
    default: Any,
    help: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a policy's dataclass that users may choose; its type is that of the default."""
    described = Parameter("", default, help, unit, at_least, at_most, choices)
    return dataclasses.field(default=default, metadata={_KEY: described})


def ratio_parameter() -> Any:
    return parameter(0.15, "Share of reused tokens to recompute.", at_least=0, at_most=1)


def check_layer_parameter() -> Any:
    return parameter(1, "The layer, from 0, that the policy looks at.", at_least=0, at_most=4095)


def run_tokens_parameter() -> Any:
    return parameter(
        1,
        "How many neighbouring tokens are selected together; longer runs cost attention less.",
        unit="tokens",
        at_least=1,
        at_most=1024,
    )


_registered: dict[str, type[SelectionPolicy]] = {"none": RecomputeNone, "all": RecomputeAll}


def policy(name: str) -> Callable[[PolicyClass], PolicyClass]:
    """Registers a frozen dataclass of `kvarena.policies` under this name.

    Raises `ValueError` for a name that is taken or can't be one, for a parameter that another policy declares
    differently, and for a field that is none and has no default.
    """

    def register(cls: PolicyClass) -> PolicyClass:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"a policy's name is made of small letters, digits and _, not {name!r}")
        if name in _registered:
            raise ValueError(f"two policies are called {name}: {_registered[name].__name__} and {cls.__name__}")
        for field in dataclasses.fields(cls):
            if field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"policy {name}: declare {field.name} with parameter(...), which has its default")
        for own in parameters_of(cls):
            if own.name in RESERVED:
                raise ValueError(f"policy {name}: {own.name} is taken, and can't be a parameter")
            for other, other_cls in _registered.items():
                if any(known.name == own.name and known != own for known in parameters_of(other_cls)):
                    raise ValueError(f"policy {name}: {own.name} is another parameter than in {other}")
        _registered[name] = cls
        return cls

    return register


def parameters_of(cls: type[SelectionPolicy]) -> list[Parameter]:
    """Those of its fields that users may choose. Raises `ValueError` for a type that isn't that of the default."""
    found = []
    for field in dataclasses.fields(cls):
        if _KEY in field.metadata:
            own = dataclasses.replace(field.metadata[_KEY], name=field.name)
            if field.type not in (own.type, own.type.__name__):
                raise ValueError(f"{cls.__name__}.{field.name} is {field.type}, and its default {own.default!r}")
            found.append(own)
    return found


def registered_policies() -> Mapping[str, type[SelectionPolicy]]:
    """All policies: first the default one, then by their files' names; last those without parameters."""
    for module in pkgutil.iter_modules(kvarena.policies.__path__):
        if module.name not in _NO_POLICIES:
            importlib.import_module(f"kvarena.policies.{module.name}")

    def place(name: str) -> tuple[bool, bool, str]:
        cls = _registered[name]
        return name != DEFAULT_POLICY, not parameters_of(cls), cls.__module__

    return {name: _registered[name] for name in sorted(_registered, key=place)}


def calibrated_policies() -> list[str]:
    """The policies with their options, as one types them, that `kvarena calibrate` tries by default."""
    return [
        ",".join([name, *options]) for name, cls in registered_policies().items() for options in cls.calibrated_options
    ]


def all_parameters() -> list[Parameter]:
    """Those of all policies: ratio and check layer, then those of one policy, then those that several share."""
    of_policies = [parameters_of(cls) for cls in registered_policies().values()]
    all_of_them = list(dict.fromkeys(own for parameters in of_policies for own in parameters))

    def place(own: Parameter) -> tuple[int, bool]:
        common = ("ratio", "check_layer")
        is_shared = sum(own in parameters for parameters in of_policies) > 1
        return (common.index(own.name) if own.name in common else len(common)), is_shared

    return sorted(all_of_them, key=place)


def summary_of(cls: type[SelectionPolicy]) -> str:
    """The first line of its docstring: which tokens it recomputes."""
    return (cls.__doc__ or "").strip().partition("\n")[0]
