"""Settings in YAML files: strict, typed, frozen. What is wrong is named by key, value and rule, once, at the door."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

Folder = Annotated[Path, BeforeValidator(lambda v: Path(v) if isinstance(v, str) else v)]

NO_ACCUMULATION = (
    "a contrastive loss learns from the samples it sees together, and accumulated batches add none; for a larger batch "
    "raise train.micro_batch_size, and where memory ends set train.grad_cache_chunk: studies that pass the encoder together"
)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Settings = TypeVar("Settings", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-4 as a string, where people mean a number; and of a key said twice it would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        said: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in said and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key.value} is said twice", problem_mark=key.start_mark)
            said.add(str(key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Parse YAML in which `2e-4` is a number. Never constructs Python objects. Raises ValueError where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None


def read_settings(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The plain values of a file with `key.sub=value` overrides laid over them; not checked yet.

    Raises FileNotFoundError or ValueError naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; run files that ship are in launch/runs/")
    try:
        values = load_yaml(path.read_text()) or {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of settings, found {type(values).__name__}")
    for override in overrides or []:
        _apply_override(values, override)
    return values


def check_settings(
    kind: type[Settings], values: dict[str, Any], *, within: tuple[str, ...] = (), root: type[Section] | None = None
) -> Settings:
    """Plain values as settings of this kind. within: the section of `root` that they are.

    Raises ValueError naming the key, the value and the rule of everything that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = ({**e, "loc": (*within, *e["loc"])} for e in error.errors())
        raise ValueError("\n".join(_explain(root or kind, e) for e in found)) from None


def dump_settings(settings: Section) -> str:
    """The file that says the same, every setting written out."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys: {"train.epochs": 20, ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that settings of this kind may hold."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        section = _section_of(info.annotation)
        names += setting_names(section, f"{prefix}{name}.") if section else [prefix + name]
    return names


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"--set {override}: must be key=value, as in --set optim.lr=1e-4")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            raise ValueError(
                f"--set {override}: {parent} is a value, not a section; write it out, as in {parent}: {{...}}"
            )
        node[parent] = node = dict(child or {})
    node[leaf] = load_yaml(text) if text else ""


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values laid over others."""
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _section_at(root: type[BaseModel], path: list[str]) -> type[BaseModel]:
    section = root
    for part in path:
        if not part.isdigit():  # the number of an entry in a list
            annotation = section.model_fields[part].annotation
            section = _section_of(annotation) or _section_of(next(iter(get_args(annotation)), None)) or section
    return section


def _explain(root: type[BaseModel], error: Any) -> str:
    """One pydantic error as `key = value: rule`, with the nearest name for a misspelt key."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden" and "accum" in path[-1]:
        return f"{key} is not a setting: {NO_ACCUMULATION}"
    if error["type"] == "extra_forbidden":
        known = list(_section_at(root, path[:-1]).model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key} is not a setting{hint}; {'.'.join(path[:-1]) or 'a run file'} has: {', '.join(known)}"
    shown = _shown(error["input"])
    if error["type"] == "model_type" and key:
        return f"{key} = {shown}: must be a section of {', '.join(_section_at(root, path).model_fields)}"
    if error["type"] == "missing" and any(part.isdigit() for part in path):
        return f"{key}: must be given; add it to the run file"
    if error["type"] == "missing":
        return f"{key}: must be given; add it to the run file or pass --set {key}=..."
    rule = (
        error["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace("valid tuple", "list")
    )
    return f"{key} = {shown}: {rule}" if key else rule


def _shown(value: Any) -> str:
    """A value as a message may show it: what a URL holds besides its place may be a secret."""
    text = repr(value)
    return (
        re.sub(r"(://)[^'\"\s]*@|[?#][^'\"\s]*", lambda found: f"{found[1] or ''}***", text) if "://" in text else text
    )
