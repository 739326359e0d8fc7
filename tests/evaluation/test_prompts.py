"""Prompts for labels that we know by any of their names, and for those we do not; files that ship, and files that are wrong."""

from pathlib import Path

import pytest

from imitate_ds.evaluation.prompt_file import BRANCHES, load_prompts, plain_name, shipped_names
from imitate_ds.evaluation.prompts import DEFAULT, label_prompts, prompts_for

CHEXPERT = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
LABELS = """
labels:
  effusion:
    also: [Pleural_Effusion]
    impression: {affirm: ["Pleural effusion."], deny: ["No pleural effusion."]}
    findings: {affirm: [Blunting.], deny: [Sharp angles.]}
  edema:
    findings: {affirm: ["Septal lines."], deny: ["No septal lines."]}
"""


def _write(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def test_names_of_other_collections_find_the_same_wording():
    prompts = prompts_for(
        ["Pleural Effusion", "effusion", "No Finding", "normal", "lung_opacity", "Infiltration", "opacity"]
    )
    assert prompts["Pleural Effusion"] == prompts["effusion"]
    assert prompts["No Finding"] == prompts["normal"]
    assert prompts["lung_opacity"] == prompts["Infiltration"] == prompts["opacity"]


def test_the_wording_of_the_impression_branch_stays_what_it_was():
    """Figures of before compare with those of today: the words of 2026-11-23."""
    prompts = prompts_for(["pneumonia", "device", "Cardiomegaly"])
    assert prompts["pneumonia"] == (
        ("Pneumonia.", "Findings consistent with pneumonia."),
        ("No pneumonia.", "No evidence of pneumonia."),
    )
    assert prompts["device"][1] == ("No support device.", "No tubes, lines or catheters.")
    assert prompts["Cardiomegaly"][0] == (
        "Cardiomegaly.",
        "The heart is enlarged.",
        "The cardiac silhouette is enlarged.",
    )


def test_an_unknown_label_gets_its_name_and_its_denial():
    for branch in BRANCHES:
        assert prompts_for(["air_trapping"], branch) == {"air_trapping": (("Air trapping.",), ("No air trapping.",))}


def test_files_know_every_label_of_their_collection():
    assert tuple(load_prompts("chexpert").wordings) == CHEXPERT
    assert len(load_prompts("chestxray14").wordings) == 15
    assert list(load_prompts("rsna").wordings) == ["pneumonia"]
    assert list(load_prompts("siim").wordings) == ["pneumothorax"]
    covidx = load_prompts("covidx")
    assert list(covidx.wordings) == ["normal", "pneumonia", "COVID-19"]
    assert covidx.exclusive
    assert sorted([*DEFAULT, "covidx"]) == shipped_names()


def test_files_agree_on_the_wording_of_a_label():
    """Or a figure would depend on which of them was named."""
    files = [load_prompts(name) for name in DEFAULT]
    for label in {name for file in files for name in file.names}:
        for branch in BRANCHES:
            assert len({file.wording(label, branch) for file in files} - {None}) == 1, (label, branch)


def test_every_label_that_ships_has_words_for_both_branches():
    for name in shipped_names():
        for label, sections in load_prompts(name).wordings.items():
            assert list(sections) == list(BRANCHES), (name, label)


def test_a_branch_is_asked_in_its_own_words_and_in_the_other_s_where_it_has_none(tmp_path):
    file = load_prompts(_write(tmp_path, LABELS))
    labels = ["pleural effusion", "Edema", "nodule"]
    asked = {branch: label_prompts(file, labels, branch) for branch in BRANCHES}
    assert list(asked["impression"]) == ["pleural effusion", "Edema"]
    assert asked["findings"]["pleural effusion"] == (("Blunting.",), ("Sharp angles.",))
    assert asked["impression"]["pleural effusion"] == (("Pleural effusion.",), ("No pleural effusion.",))
    assert asked["impression"]["Edema"] == asked["findings"]["Edema"]
    assert len(file.sha256) == 16
    assert plain_name("Pleural_Effusion") in file.names


def test_the_checksum_is_of_the_words(tmp_path):
    first = load_prompts(_write(tmp_path, LABELS)).sha256
    assert load_prompts(_write(tmp_path, LABELS)).sha256 == first
    assert load_prompts(_write(tmp_path, LABELS.replace("Blunting", "Blunted"))).sha256 != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: {}", r"label is not a key \(did you mean labels\?\); a prompt file has: labels, classes"),
        ("[]", "must be a mapping of labels, classes"),
        ("labels: {}", "labels: must map at least one name to its wording"),
        ("labels: {a: {impression: {affirm: [x], deny: [y]}}}\nclasses: {b: {impression: [z]}}", "not both"),
        ("labels: {a: {finding: {affirm: [x], deny: [y]}}}", r"labels\.a: finding is not a key \(did you mean findings\?\)"),
        ("labels: {a: {also: [b]}}", r"labels\.a: must have wording for the impression branch, the findings branch"),
        ("labels: {a: {impression: {affrim: [x], deny: [y]}}}", r"a\.impression: affrim is not a key \(did you mean affirm\?"),
        ("labels: {a: {impression: {affirm: [x]}}}", r"a\.impression\.deny = \[\]: must be a list of at least one text"),
        ("labels: {a: {impression: {affirm: x, deny: [y]}}}", r"affirm = 'x': must be a list"),
        ("labels: {a: {impression: {affirm: [No], deny: [y]}}}", r"affirm\[0\] = False: must be text .* in quotes"),
        ("labels: {a: {impression: {affirm: [x, y], deny: [y]}}}", "'y' both affirms and denies"),
        ("labels: {a: {also: [B], impression: {affirm: [x], deny: [y]}}, b: {impression: {affirm: [x], deny: [y]}}}", "'b' is a"),
        ("labels: {1: {impression: {affirm: [x], deny: [y]}}}", "a name must be text, found 1"),
        ("classes: {a: {impression: {affirm: [x], deny: [y]}}}", r"classes\.a\.impression = .*: must be a list"),
        ("labels: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_key_value_and_rule(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(_write(tmp_path, text))
    assert str(error.value).startswith(str(tmp_path / "mine.yaml"))


def test_a_misspelt_name_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--prompts chexprt: no such file.*did you mean chexpert\?.*siim"):
        load_prompts("chexprt")
    with pytest.raises(FileNotFoundError, match="no such file, and no prompts of that name ship"):
        load_prompts(str(tmp_path / "none.yaml"))
