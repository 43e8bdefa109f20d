"""A config, composed over recipe, data and cluster, or read back frozen. Only this file knows Hydra."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from pipeline.config import schema
from pipeline.config.rules import checked, nearest
from pipeline.config.schema import KEYS, SCHEMA, SECTIONS, Config, ConfigError, by_key

AXES = ("recipe", "data", "cluster")
_BESIDE, _INSIDE = Path(__file__).parents[2] / "conf", Path(__file__).parents[1] / "conf"
CONF = _INSIDE if _INSIDE.is_dir() else _BESIDE  # inside the package once it is built as a wheel


def compose_config(overrides: Sequence[str]) -> Config:
    """The checked config of `key=value` overrides, later ones winning. Raises ConfigError."""
    for override in overrides:
        _check_override(override)
    ConfigStore.instance().store(name="schema", node=dataclasses.asdict(Config()))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=list(overrides), return_hydra_config=True)
        choices = composed.hydra.runtime.choices
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        content = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except OverrideParseException as error:
        key, _, value = str(error.override).partition("=")
        shown = f"the value of {key}" if "://" in value else repr(error.override)  # a URL may hold a secret
        raise ConfigError(f"{shown} cannot be read; put quotes around the value: key='\"value\"'") from None
    except InterpolationKeyError as error:
        raise ConfigError(f"{_first_line(error)}; a variable of the environment is $NAME, without braces") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from None
    content["run"].update({axis: str(choices[axis]) for axis in AXES})
    return checked(from_mapping(content))


@dataclasses.dataclass(frozen=True, slots=True)
class Combination:
    """Overrides of one run of several. swept: those keys of which there is more than one value, each with its own."""

    words: list[str]
    swept: dict[str, str]


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Every combination of the values of `key=a,b,c`; what stands in quotes or brackets is one. Raises ConfigError."""
    choices: list[list[tuple[str, str, bool]]] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not key=value; for example optimizer.rate=0.01,0.1")
        try:
            parsed = OverridesParser.create().parse_override(override)
            several = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [value]
        except HydraException:
            raise ConfigError(f"the values of {key} cannot be read; put quotes around one with a comma, a space or a "
                              f"sign in it: '{key}=\"a,b\",\"c\"'") from None  # fmt: skip
        if len({*several}) < len(several):
            raise ConfigError(f"{override}: a value stands there twice; give each once")
        if any(key == other and (len(several) > 1 or len(known) > 1) for known in choices for other, _, _ in known[:1]):
            raise ConfigError(f"{key} is given twice, once with several values; give it once")
        choices.append([(key, each, len(several) > 1) for each in several])
    return [
        Combination([f"{key}={value}" for key, value, _ in chosen], {k: v for k, v, is_swept in chosen if is_swept})
        for chosen in itertools.product(*choices)
    ]


def read_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The frozen config of a run, with overrides of single keys. Raises ConfigError."""
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"{path} holds no keys; give the config.yaml of a run")
        for override in overrides:
            _check_override(override)
            if override.split("=")[0] in AXES:
                raise ConfigError(f"{override}: the axes are frozen in {path}; override single keys")
            loaded.merge_with_dotlist([override])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the config.yaml of a run") from None
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    content = cast(dict[str, Any], OmegaConf.to_container(loaded))
    if content.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema = {content.get('schema')}, this version reads {SCHEMA}; compose it anew")
    return checked(from_mapping(content))


def overridden(config: Config, values: dict[str, Any]) -> Config:
    """The checked config with plain values of single keys, as in {"optimizer.rate": 0.1}. Raises ConfigError."""
    content = dataclasses.asdict(config)
    for key, value in values.items():
        if key not in KEYS:
            raise ConfigError(f"{key} is not a key{nearest(key, KEYS)}; `pipeline train --print-config` lists all")
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    return checked(from_mapping(content))


def to_yaml(config: Config) -> str:
    """The complete config as text that `read_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_mapping(content: dict[str, Any]) -> Config:
    """A Config of nested plain values, typed by the schema. Raises ConfigError for a wrong type or unknown key."""
    for key in by_key(content):
        if key not in KEYS and not any(key.startswith(known + ".") for known in KEYS):
            raise ConfigError(f"{key} is not a key{nearest(key, KEYS)}")
    try:
        merged = OmegaConf.merge(_schema(), content)
    except OmegaConfBaseException as error:
        key = error.full_key or next(k for k in content if k in SECTIONS and not isinstance(content[k], dict))
        key = key.partition("[")[0]
        raise ConfigError(f"{key} = {_at(content, key)!r} has the wrong type; it must be {_type_of(key)}") from None
    return cast(Config, OmegaConf.to_object(merged))


def _schema() -> DictConfig:
    """The schema to be merged into: frozen dataclasses come as read-only nodes, section by section."""
    schema = OmegaConf.structured(Config)
    for node in (schema, *(schema._get_node(section.name) for section in dataclasses.fields(Config))):
        if OmegaConf.is_dict(node):
            OmegaConf.set_readonly(node, False)
    return cast(DictConfig, schema)


def _check_override(override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not key=value; for example trainer.max_epochs=10")
    if key in AXES:
        offered = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
        if value not in offered:
            raise ConfigError(f"{key} = {value!r} is not offered{nearest(value, offered)}; choose one of {offered}")
    elif key not in KEYS:
        raise ConfigError(
            f"{key} is not a key{nearest(key, [*KEYS, *AXES])}; `pipeline train --print-config` lists all"
        )


def _at(content: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _type_of(dotted: str) -> str:
    current: Any = Config
    for name in dotted.split("."):
        kind = {f.name: str(f.type) for f in dataclasses.fields(current)}[name]
        current = getattr(schema, kind, kind)
    return _WORDS.get(str(current), f"a section; set its keys, {dotted}.KEY")


_WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "str | None": "text or null",
    "int | str": "a whole number, or node",
    "float | None": "a number or null", "list[float]": "a list of numbers, [1, 2, 3]", "list[str]": "a list, [a, b]",
}  # fmt: skip


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
