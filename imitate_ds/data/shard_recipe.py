"""The recipe of a shard folder: the arguments of `imitate-ds shards build`, kept in a YAML file."""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from imitate_ds.run_file import load_yaml


@dataclass(frozen=True)
class ShardRecipe:
    source: str  # a name in sources.SOURCES
    out: Path  # the shard folder to write
    root: Path | None = None  # where the collection was downloaded to; the phantom needs none
    image_size: int = 256
    samples_per_shard: int = 512
    options: dict[str, Any] = field(default_factory=dict)  # of the source


def load_recipe(path: Path | None, **overrides: Any) -> ShardRecipe:
    """Read a recipe, if there is one; overrides that are not None win over it, those of `options` one by one.

    Raises FileNotFoundError or ValueError naming the key, the value and the rule.
    """
    where = str(path) if path else "shards build"
    values = _read(path) if path else {}
    given = {name: value for name, value in overrides.items() if value is not None}
    options = {**_options(where, values), **given.pop("options", {})}
    return _recipe(where, {**values, **given, "options": options})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--recipe {path}: no such file; recipes that ship are in shards/")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of settings, found {type(values).__name__}")
    return values


def _recipe(where: str, values: dict[str, Any]) -> ShardRecipe:
    known = [f.name for f in fields(ShardRecipe)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{where}: {name} is not a setting{hint}; a recipe has: {', '.join(known)}")
    for name in ("source", "out"):
        if not isinstance(values.get(name), str | Path):
            raise ValueError(
                f"{where}: {name} = {values.get(name)!r}: must be given; add it, or pass it on the command line"
            )
    for name in ("image_size", "samples_per_shard"):
        if name in values and type(values[name]) is not int:
            raise ValueError(f"{where}: {name} = {values[name]!r}: must be a whole number")
    root = values.get("root")
    if not isinstance(root, str | Path | None):
        raise ValueError(f"{where}: root = {root!r}: must be a path")
    return ShardRecipe(**{**values, "out": Path(values["out"]), "root": None if root is None else Path(root)})


def _options(where: str, values: dict[str, Any]) -> dict[str, Any]:
    options = values.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{where}: options = {options!r}: must be a mapping")
    return options
