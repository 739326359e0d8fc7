"""Prompt files: what to ask an image about a label, in words of both branches; YAML, strict.

```yaml
labels:                     # each for itself: affirmed or denied
  effusion:
    also: [pleural effusion]                # other names of the same label
    impression: {affirm: ["Pleural effusion."], deny: ["No pleural effusion."]}
    findings: {affirm: ["Blunting of the costophrenic angle."], deny: ["The costophrenic angles are sharp."]}
```

Or `classes:`, of which an image has exactly one; there a branch has a list of texts. A label with the wording of one branch only
is asked with it on either. Names are compared without case, and `_` is a blank.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imitate_ds.hub import Section
from imitate_ds.run_file import load_yaml

FOLDER = Path(__file__).parent / "prompt_files"
KINDS = ("labels", "classes")
BRANCHES: tuple[Section, ...] = ("impression", "findings")
ENTRY = ("also", *BRANCHES)
SIDES = ("affirm", "deny")

Texts = tuple[str, ...]
Wording = tuple[Texts, ...]  # of a label: texts that affirm it, texts that deny it; of a class: its texts


@dataclass(frozen=True)
class PromptFile:
    """The wording of a file by label or class, and the checksum that says which wording it was."""

    name: str  # of a file that ships, or the path of another
    sha256: str
    exclusive: bool  # classes, not labels
    wordings: dict[str, dict[Section, Wording]]
    names: dict[str, str]  # every name as plain_name makes it, of aliases too -> the name in `wordings`

    def wording(self, label: str, branch: Section) -> Wording | None:
        """What to ask about a label under any of its names; None where the file does not know it."""
        name = self.names.get(plain_name(label))
        if name is None:
            return None
        sections = self.wordings[name]
        return sections.get(branch) or next(iter(sections.values()))


def plain_name(label: str) -> str:
    return label.replace("_", " ").strip().lower()


def shipped_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_prompts(name: str) -> PromptFile:
    """A prompt file that ships, by its name, or any other by its path.

    Raises FileNotFoundError or ValueError naming file, key, value and rule.
    """
    shipped = shipped_names()
    path = FOLDER / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FileNotFoundError(
            f"--prompts {name}: no such file, and no prompts of that name ship{hint}; those that do: {', '.join(shipped)}"
        )
    content = path.read_bytes()
    try:
        values = load_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return parse_prompts(values, name=name, where=str(path), sha256=hashlib.sha256(content).hexdigest()[:16])


def parse_prompts(values: Any, *, name: str, where: str, sha256: str) -> PromptFile:
    """Check the plain values of a file. Raises ValueError naming the key, the value and the rule."""
    _require_keys(where, values, KINDS, "a prompt file")
    if len(values) != 1:
        raise ValueError(f"{where}: must have one of labels and classes, not both; write two files")
    kind = next(iter(values))
    entries = values[kind]
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{where}: {kind}: must map at least one name to its wording")
    names: dict[str, str] = {}
    wordings = {}
    for label, entry in entries.items():
        place = f"{where}: {kind}.{label}"
        _require_keys(place, entry, ENTRY, "an entry")
        for alias in (label, *_texts(f"{place}.also", entry.get("also", []), empty=True)):
            if not isinstance(alias, str):
                raise ValueError(f"{place}: a name must be text, found {alias!r}; put it in quotes")
            if (other := names.setdefault(plain_name(alias), label)) != label:
                raise ValueError(f"{place}: {alias!r} is a name of {other} too; a name may stand for one of them")
        wordings[label] = _sections(place, entry, kind)
    return PromptFile(name, sha256, kind == "classes", wordings, names)


def _sections(place: str, entry: Mapping[str, Any], kind: str) -> dict[Section, Wording]:
    read = _sides if kind == "labels" else _class_texts
    sections: dict[Section, Wording] = {
        branch: read(f"{place}.{branch}", entry[branch]) for branch in BRANCHES if branch in entry
    }
    if not sections:
        raise ValueError(f"{place}: must have wording for the impression branch, the findings branch, or both")
    return sections


def _class_texts(place: str, values: Any) -> Wording:
    return (_texts(place, values),)


def _sides(place: str, values: Any) -> Wording:
    _require_keys(place, values, SIDES, "the wording of a label")
    affirm, deny = (_texts(f"{place}.{side}", values.get(side, [])) for side in SIDES)
    if both := sorted(set(affirm) & set(deny)):
        raise ValueError(f"{place}: {both[0]!r} both affirms and denies; take it out of one of them")
    return affirm, deny


def _texts(place: str, values: Any, *, empty: bool = False) -> Texts:
    if not isinstance(values, list) or not (values or empty):
        raise ValueError(f"{place} = {values!r}: must be a list of at least one text")
    for number, text in enumerate(values):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}[{number}] = {text!r}: must be text that is not blank; put it in quotes")
    return tuple(text.strip() for text in values)


def _require_keys(place: str, values: Any, known: Iterable[str], what: str) -> None:
    known = list(known)
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{place}: must be a mapping of {', '.join(known)}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{place}: {key} is not a key{hint}; {what} has: {', '.join(known)}")
