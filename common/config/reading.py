"""How a file and ``key=value`` overrides become a configuration, and a configuration a file again."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config.run import RunConfig
from common.errors import ConfigError
from common.near import suggest
from common.objective import ALGORITHMS

T = TypeVar("T")
TYPE_HINT = re.compile(r"Value '(.*)' of type '.*' is incompatible with type hint 'Union\[int, str\]'")
UNRESOLVED = re.compile(r"""\w+ raised while resolving interpolation: "?(.*?)"?""")
INTERPOLATION = re.compile(r"(\\*)\$\{")  # with the backslashes before it


def _check_keys(given: Mapping[Any, Any], schema: Any, prefix: str, source: str) -> None:
    """Raise :class:`ConfigError` for a key of ``given`` that ``schema`` lacks, with the near one that it has."""
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            kind = "section" if not prefix else "key"
            raise ConfigError(f"{source}: unknown {kind} {prefix}{key!s}; {suggest(str(key), sorted(known))}")
        child, name = known[key].type, f"{prefix}{key}"
        if is_dataclass(child):
            _check_section(value, child, name, source)
        elif get_origin(child) is dict and is_dataclass(entry := get_args(child)[1]) and isinstance(value, Mapping):
            for label, section in value.items():
                _check_section(section, entry, f"{name}.{label}", source)


def _check_section(given: Any, schema: Any, name: str, source: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source}: {name} is a section and needs keys, not {given!r}")
    _check_keys(given, schema, f"{name}.", source)


def _spell_off(given: DictConfig, schema: Any) -> None:
    """In place: YAML reads a bare ``off`` as false; where the schema knows "off", that was meant."""
    for f in fields(schema):
        if f.name in given and is_dataclass(f.type):
            _spell_off(given[f.name], f.type)
        elif f.name in given and given[f.name] is False and "off" in get_args(f.type):
            given[f.name] = "off"


def read_yaml(path: Path, instead: str) -> DictConfig:
    """The sections in a YAML file. Raises :class:`ConfigError` that names it; ``instead`` says where others are."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {instead}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml's own error classes have no common public base
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold sections, not a list or a single value")
    if not loaded and "{" not in path.read_text():
        raise ConfigError(f"{path}: is empty; {instead}, and a file that says {{}} takes every default")
    return loaded


def read_overrides(overrides: Sequence[str]) -> DictConfig:
    """``section.key=value`` of each. Raises :class:`ConfigError` for one that reads otherwise."""
    for override in overrides:
        if not override.partition("=")[0].strip() or "=" not in override:
            raise ConfigError(f"override {override!r}: must read section.key=value")
        try:
            given = OmegaConf.from_dotlist([override])
        except Exception as error:  # as of a file
            raise ConfigError(
                f"override {override!r}: its value is not YAML; quote what begins with * & ! % @"
            ) from error
        if (joined := _joined(OmegaConf.to_container(given))) is not None:
            raise ConfigError(
                f"override {override!r}: {joined!r} is a key without a value; write a space behind its colon"
            )
    return OmegaConf.from_dotlist(list(overrides))


def _joined(given: Any) -> str | None:
    """A key like ``a:1``, for which YAML takes ``{a:1}``; None if there is none."""
    if not isinstance(given, dict):
        return None
    for key, value in given.items():
        if value is None and ":" in str(key):
            return str(key)
        if (found := _joined(value)) is not None:
            return found
    return None


def merge(
    kind: type[T],
    file: DictConfig,
    overrides: DictConfig,
    source: str,
    *,
    start: T | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> T:
    """``start`` (or the defaults of ``kind``, a dataclass), ``recipe``, ``file``, ``overrides``: the last has its way.

    Raises :class:`ConfigError` naming ``source`` or the override, the key and the near name.
    """
    base = defaults(kind) if start is None else OmegaConf.structured(start)  # type: ignore[arg-type]  # hashable
    merging = False
    try:
        for part, where in ((file, source), (overrides, "override")):
            _check_keys(OmegaConf.to_container(part), kind, "", where)  # type: ignore[arg-type]  # a mapping
            _spell_off(part, kind)
        where = source
        OmegaConf.merge(base, recipe or {}, file)  # what fails here is the file's fault, whatever is put over it
        where, merging = "override", True
        found = OmegaConf.to_object(OmegaConf.merge(base, recipe or {}, file, overrides))
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        if merging and not _says(overrides, str(key)):
            where = source  # what nobody gave
        raise ConfigError(f"{where}: {key}: {_plain(str(error).splitlines()[0])}") from error
    if not isinstance(found, kind):
        raise ConfigError(f"{source}: did not load as a {kind.__name__}")
    return found


def _plain(words: str) -> str:
    """What OmegaConf says, without the names of its own classes."""
    if words.startswith("Incompatible value 'None'"):
        return "needs a value"
    if words.startswith("Invalid value 'True'"):
        return f"{words}; YAML takes a bare on or yes for true"
    if found := TYPE_HINT.fullmatch(words):
        return f"{found[1]} is neither a whole number nor a word"
    if found := UNRESOLVED.fullmatch(words):
        return f"cannot be resolved: {found[1]}"
    return words


def _says(given: DictConfig, key: str) -> bool:
    """Whether ``key`` is in it, be it null."""
    section, _, name = key.rpartition(".")
    inside = OmegaConf.select(given, section) if section else given
    return isinstance(inside, DictConfig) and name in inside


@cache
def defaults(kind: type[Any]) -> Any:
    """The schema ``kind`` with its defaults, for OmegaConf: made once, since that takes as long as all the rest.

    Not to be changed; ``OmegaConf.merge`` copies it.
    """
    return OmegaConf.structured(kind)


def _recipe(name: Any) -> dict[str, Any]:
    """The values that ``algorithm`` stands for. Raises :class:`ConfigError` that suggests the near name."""
    if not name:
        return {}
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm={name!r}: no such recipe; {suggest(str(name), sorted(ALGORITHMS))}")
    return ALGORITHMS[name]


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``section.key=value`` overrides and validate.

    Raises :class:`ConfigError` naming the file or override, the key and the near name.
    """
    dotlist = read_overrides(overrides)
    file = read_yaml(Path(path), "configs/ holds the examples")
    for key in (o.partition("=")[0] for o in overrides if o.partition("=")[2].lstrip().startswith("{")):
        if key.endswith("reward_weights") and OmegaConf.select(file, key) is not None:
            OmegaConf.update(file, key, {}, merge=False)  # weights that are given whole stand for those of the file
    recipe = _recipe(dotlist.get("algorithm", file.get("algorithm", "")))
    return merge(RunConfig, file, dotlist, str(path), recipe=recipe)


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML, so that a run directory says what was run; :func:`load` reads the same."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config))))


def _escaped(value: Any) -> Any:
    """Texts in which ``${`` is no interpolation: where one was written, it is resolved by now."""
    match value:
        case str():
            return INTERPOLATION.sub(r"\1\1\\${", value)
        case dict():
            return {name: _escaped(one) for name, one in value.items()}
        case list() | tuple():
            return [_escaped(one) for one in value]
        case _:
            return value
