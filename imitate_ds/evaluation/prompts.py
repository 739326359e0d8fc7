"""What radiologists write when a finding is there, and when it is not: prompts for zero-shot classification."""

from collections.abc import Iterable
from functools import lru_cache

from imitate_ds.evaluation.prompt_file import PromptFile, Texts, load_prompts, plain_name
from imitate_ds.hub import Section

Sides = tuple[Texts, Texts]  # texts that affirm a label, texts that deny it

# Whose labels are known unless a file is named. They agree on the wording of a label (tests/evaluation/test_prompts.py), so their
# order decides nothing. The classes of COVIDx exclude each other, and are asked for by name.
DEFAULT = ("openi", "chexpert", "chestxray14", "rsna", "siim")


@lru_cache(maxsize=1)
def default_prompts() -> tuple[PromptFile, ...]:
    """The files whose labels are known unless a file is named."""
    return tuple(load_prompts(name) for name in DEFAULT)


def prompt_checksums(file: PromptFile | None) -> dict[str, str]:
    """Which wording was asked: of one file, or of all that ship."""
    return {each.name: each.sha256 for each in ((file,) if file else default_prompts())}


def prompts_for(labels: Iterable[str], branch: Section = "impression") -> dict[str, Sides]:
    """For each label, texts that affirm and texts that deny it; "X." and "No X." where we have no better wording."""
    return {label: _known(label, default_prompts(), branch) or _plain(label) for label in labels}


def label_prompts(file: PromptFile, labels: Iterable[str], branch: Section = "impression") -> dict[str, Sides]:
    """The same from one file, for the labels that it knows."""
    found = {label: _known(label, (file,), branch) for label in labels}
    return {label: sides for label, sides in found.items() if sides}


def _known(label: str, files: Iterable[PromptFile], branch: Section) -> Sides | None:
    for file in files:
        if wording := file.wording(label, branch):
            affirm, deny = wording
            return affirm, deny
    return None


def _plain(label: str) -> Sides:
    words = plain_name(label)
    return (f"{words.capitalize()}.",), (f"No {words}.",)
