"""Prompts for labels that we know by any of their names, and for those we do not."""

from imitate_ds.evaluation.prompts import ALIASES, PROMPTS, prompts_for


def test_names_of_other_collections_find_the_same_wording():
    prompts = prompts_for(["Pleural Effusion", "effusion", "No Finding", "lung_opacity"])
    assert prompts["Pleural Effusion"] == prompts["effusion"] == PROMPTS["effusion"]
    assert prompts["No Finding"] == PROMPTS["normal"]
    assert prompts["lung_opacity"] == PROMPTS["opacity"]


def test_an_unknown_label_gets_its_name_and_its_denial():
    assert prompts_for(["hiatal_hernia"]) == {"hiatal_hernia": (("Hiatal hernia.",), ("No hiatal hernia.",))}


def test_every_label_of_chexpert_has_wording_but_one():
    names = ["Lung Lesion", "Enlarged Cardiomediastinum", "Pleural Other", "Pleural Effusion"]
    prompts = prompts_for(names)
    assert list(prompts) == [name for name in names if name != "Pleural Other"]
    assert prompts["Lung Lesion"] == PROMPTS["lung lesion"]
    assert prompts["Enlarged Cardiomediastinum"] == PROMPTS["enlarged cardiomediastinum"]


def test_every_entry_has_both_sides_and_no_text_on_both():
    assert set(ALIASES.values()) <= set(PROMPTS)
    for affirm, deny in PROMPTS.values():
        assert affirm
        assert deny
        assert not set(affirm) & set(deny)
