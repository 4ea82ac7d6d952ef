"""The stack's settings: one frozen class, read from the command line, the environment and `.env`, in that order.

`load_settings` is the only place where they are read. A bad value and an unknown key in `.env` raise `StackError`
with the key, the value (unless it is a secret) and the choices. What depends on the machine (which profile `auto`
means, the model that goes with it, cores, GPUs) is decided later, in `plan`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    create_model,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kvarena.client import API_KEY_VARIABLE
from kvarena.contenders.spec import FIRST_PORT, STARTED_BY_DEFAULT, contender_specs
from kvarena.core.matching import MAX_SINK_TOKENS
from kvarena.engines.vllm.config import Unsupported
from kvarena.home import StackError, project_root
from kvarena.policies.params import PARAMETERS
from kvarena.policies.registry import Parameter
from kvarena.splitting import DEFAULT_CHUNK_TOKENS, MIN_CHUNK_TOKENS
from kvarena.stack.lmcache_l2 import NO_L2, l2_adapter

ProfileName = Literal["auto", "cpu", "gpu", "ai100"]
RunIn = Literal["auto", "processes", "containers"]
BlendEngine = Literal["kvarena", "lmcache"]
SPECS = contender_specs()
CONTENDERS = tuple(SPECS)
OWN_SETTINGS = {own.key: own for spec in SPECS.values() for own in spec.own_settings()}
"""Those of single contenders, by their keys."""
SECRETS = ("hf_token", "kvarena_api_key", "lmcache_l2_password")
VLLM_API_KEY_VARIABLE = "VLLM_API_KEY"
LMCACHE_L2_PASSWORD_VARIABLE = "LMCACHE_RESP_PASSWORD"
BLEND_PREFIX = "blend_"
"""With a policy parameter's name after it, it is the name of its setting."""
VISIBLE_ASCII = re.compile("[!-~]+")

DEFAULT_PORTS: Mapping[str, int] = {
    **{name: spec.port for name, spec in SPECS.items()},
    "page": 8501,
    "lmcache_server": 5555,
    "lmcache_http": 8080,
}
PORT_OFFSETS: Mapping[str, int] = {
    **{name: spec.port - FIRST_PORT for name, spec in SPECS.items()},
    "page": 501,
    "lmcache_server": 502,
    "lmcache_http": 503,
}
"""Where each port is from `PORT_BASE`."""

Port = Annotated[int, Field(ge=1, le=65535)]
PortBase = Annotated[int, Field(ge=1024, le=65535 - max(PORT_OFFSETS.values()))]


def _known_contender(name: str) -> str:
    if name not in SPECS:
        raise ValueError(f"must be one of {', '.join(CONTENDERS)}")
    return name


ContenderName = Annotated[str, AfterValidator(_known_contender)]


def _type_of(own: Parameter) -> Any:
    """Of the setting that a policy's parameter has."""
    return Literal[own.choices] if own.choices else Annotated[own.type, Field(ge=own.at_least, le=own.at_most)]


if TYPE_CHECKING:
    DerivedSettings = BaseSettings
else:
    DerivedSettings = create_model(
        "DerivedSettings",
        __base__=BaseSettings,
        **{f"{name}_port": (Port | None, None) for name in SPECS},
        **{own.key: (own.annotation, own.default) for own in OWN_SETTINGS.values()},
        **{f"{BLEND_PREFIX}{name}": (_type_of(own) | None, None) for name, own in PARAMETERS.items()},
    )


class Settings(DerivedSettings):
    """Every setting of the stack; field names are the keys of the environment and of `.env`, in lower case. Those of
    contenders (`kvarena.contenders`) and of policies (`kvarena.policies`) come from there.

    `None` means: whatever suits the machine, the model's own profile, or the engine's own default.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True, env_file_encoding="utf-8")

    contenders: Annotated[tuple[ContenderName, ...], NoDecode] = STARTED_BY_DEFAULT
    profile: ProfileName = "auto"
    model: str | None = None
    load_format: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    hf_token: SecretStr | None = None
    kvarena_api_key: SecretStr | None = None
    local_hf_home: Path | None = None
    data_dir: Path | None = None
    chunk_tokens: Annotated[int, Field(ge=MIN_CHUNK_TOKENS)] = DEFAULT_CHUNK_TOKENS
    results_dir: Path = Path("results")
    ui: bool = True
    gpu_share: bool = False

    run_in: RunIn = "auto"
    container_memory_gb: Annotated[int, Field(ge=1)] | None = None
    models_dir: Path = Path("backend/models")
    prometheus_port: Port = 9090
    grafana_port: Port = 3000

    port_base: PortBase | None = None
    ui_port: Port | None = None
    lmcache_server_port: Port | None = None
    lmcache_http_port: Port | None = None

    kv_cache_gb: Annotated[int, Field(ge=1)] | None = None
    lmcache_gb: Annotated[float, Field(gt=0)] = 1.0
    lmcache_l2: str | None = None
    lmcache_l2_gb: Annotated[float, Field(gt=0)] = 4.0
    lmcache_l2_password: SecretStr | None = None
    lmcache_timeout_s: Annotated[float, Field(gt=0, le=60)] = 1.0

    separator: str | None = None
    sink_tokens: Annotated[int, Field(ge=0, le=MAX_SINK_TOKENS)] | None = None
    blend_seams: bool | None = None
    blend_max_ttft_ms: Annotated[float, Field(gt=0)] | None = None
    blend_unsupported: Unsupported = "refuse"
    blend_engine: BlendEngine = "kvarena"

    @field_validator("contenders", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @field_validator("contenders")
    @classmethod
    def _each_once_in_the_known_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in CONTENDERS if name in value)

    @field_validator("kvarena_api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not VISIBLE_ASCII.fullmatch(value.get_secret_value()):
            raise ValueError("must be of letters, digits and signs of ASCII, without spaces")
        return value

    @field_validator("*", mode="wrap")
    @classmethod
    def _demanded(cls, value: object, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        own = OWN_SETTINGS.get(info.field_name or "")
        try:
            return check(value)
        except ValidationError as error:
            if own is None or not own.demand:
                raise
            raise ValueError(f"must be {own.demand}") from error

    @field_validator("*")
    @classmethod
    def _absolute(cls, value: object) -> object:
        """Relative paths of the environment and of `.env` count from the project's folder."""
        return project_root() / value.expanduser() if isinstance(value, Path) else value

    @field_validator("lmcache_l2")
    @classmethod
    def _is_an_adapter(cls, value: str | None) -> str | None:
        if value is not None and value != NO_L2:
            l2_adapter(value, 0.0, project_root())
        return value

    @property
    def api_key(self) -> str:
        return self.kvarena_api_key.get_secret_value() if self.kvarena_api_key else ""

    @property
    def given_secrets(self) -> dict[str, str]:
        """Those that were set, by their keys."""
        given = {key.upper(): getattr(self, key) for key in SECRETS}
        return {key: secret.get_secret_value() for key, secret in given.items() if secret is not None}

    @property
    def secrets(self) -> dict[str, str]:
        """What services get by their environment, and no command line and no file shows, by their names for it. vLLM's
        servers take the key from a variable of their own, which mustn't hold another one either.
        """
        given = self.given_secrets
        renamed = {LMCACHE_L2_PASSWORD_VARIABLE: given.pop("LMCACHE_L2_PASSWORD")} if self.lmcache_l2_password else {}
        return {**given, **renamed, API_KEY_VARIABLE: self.api_key, VLLM_API_KEY_VARIABLE: self.api_key}

    @property
    def ports(self) -> Mapping[str, int]:
        """A port's own key first, then `PORT_BASE` plus its offset, then the default."""
        own = {name: getattr(self, f"{name}_port") for name in DEFAULT_PORTS if name != "page"} | {"page": self.ui_port}
        base = self.port_base
        derived = {name: base + offset for name, offset in PORT_OFFSETS.items()} if base else DEFAULT_PORTS
        return {name: own[name] or port for name, port in derived.items()}

    @property
    def policy(self) -> dict[str, Any]:
        """The policy and its parameters, as far as they were set, by their names in `BlendParams`."""
        given = {name: getattr(self, f"{BLEND_PREFIX}{name}") for name in PARAMETERS}
        return {name: value for name, value in given.items() if value is not None}

    def of_contender(self, name: str) -> Any:
        """The contender's own settings, as its spec has them; `None` where it has none."""
        spec = SPECS[name]
        return spec.settings and spec.settings(**{own.name: getattr(self, own.key) for own in spec.own_settings()})


def load_settings(env_file: Path | None = None, **command_line: Any) -> Settings:
    """The settings; `command_line` holds what was given there, `None` for what was not.

    `--port-base` on the command line moves every port, whatever the environment and `.env` say of single ones.
    """
    given = {key: value for key, value in command_line.items() if value is not None}
    path = env_file if env_file is not None else project_root() / ".env"
    try:
        settings = Settings(_env_file=path, **given)  # type: ignore[call-arg]  # pydantic-settings takes it
    except ValidationError as error:
        raise StackError(_explain(error, path)) from error
    if "port_base" in given:
        ports = [key for key in Settings.model_fields if key.endswith("_port")]
        settings = settings.model_copy(update=dict.fromkeys(ports))
    return settings


def shown_api_key() -> str:
    """What this project's commands show to servers: the key of the environment or of `.env`, empty without one."""
    return load_settings().api_key


def _explain(error: ValidationError, env_file: Path) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        key = str(problem["loc"][0]).upper()
        if problem["type"] == "extra_forbidden":
            known = ", ".join(name.upper() for name in Settings.model_fields)
            lines.append(f"{env_file}: unknown key {key}; known: {known}")
        elif problem["type"] == "literal_error":
            choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            lines.append(f"{key} must be one of {choices}, not {problem['input']!r}")
        else:
            reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input should ")
            demand = reason if reason.startswith("must ") else reason.replace("be ", "must be ", 1)
            given = "" if key.lower() in SECRETS else f", not {problem['input']!r}"
            lines.append(f"{key} {demand}{given}")
    return "\n".join(lines)
