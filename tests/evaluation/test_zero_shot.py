"""Zero-shot classification with embeddings whose right answers are known, and classes that exclude each other from end to end."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.functional import normalize

from imitate_ds.data.shards import build_shards, load_index
from imitate_ds.data.sources.phantom import PhantomSource
from imitate_ds.evaluate import evaluate_zero_shot
from imitate_ds.evaluation.embedded import read_split
from imitate_ds.evaluation.prompt_file import load_prompts
from imitate_ds.evaluation.prompts import prompts_for
from imitate_ds.evaluation.zero_shot import branch_rows, score_zero_shot
from imitate_ds.hub import ImageEmbeddings, load_model

CLASSES = ("normal", "pneumonia", "COVID-19")


class OneClassEach(PhantomSource):
    """Phantoms of which each has one of three classes; the picture says nothing about it."""

    def study(self, number):
        study = super().study(number)
        # one class is named as another collection would
        labels = {"normal": int(number % 3 == 0), "Pneumonia": int(number % 3 == 1), "covid": int(number % 3 == 2)}
        return dataclasses.replace(study, labels=labels)


@pytest.fixture(scope="module")
def model(export):
    return load_model(export)


@pytest.fixture(scope="module")
def one_class_each(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes") / "shards"
    source = OneClassEach(studies=60, seed=3, val_share=0.5, test_share=0.0)
    build_shards(source, folder, image_size=64, workers=1, progress=False)
    return folder


def _seen(rows):
    """Radiographs that the impression branch sees as these rows [n, D], and the findings branch as their opposite."""
    return ImageEmbeddings(rows.float(), -rows.float(), rows.float())


def _known_rows(model, texts_by_sample):
    return torch.stack([model.encode_ensemble(texts) for texts in texts_by_sample])


def test_a_model_that_knows_is_right_by_every_measure(model, phantom_shards):
    records = read_split(load_index(phantom_shards), "val").with_labels(["effusion"])
    affirm, deny = prompts_for(["effusion"])["effusion"]
    rows = _known_rows(model, [affirm if value == 1 else deny for value in records.labels[:, 0]])
    scored = score_zero_shot(model, records, _seen(rows), None, "impression")
    for name in ("auroc", "ap", "f1", "accuracy"):
        assert scored.metrics[f"{name}/effusion"]["value"] == scored.metrics[f"{name}_macro"]["value"] == 1, name
        assert scored.metrics[f"{name}/effusion"]["positives"] == int(records.labels.sum())
    assert scored.settings["branch"] == "impression"
    assert scored.settings["prompts"]["effusion"] == (affirm, deny)


def test_a_branch_is_asked_by_its_own_rows(model, phantom_shards):
    records = read_split(load_index(phantom_shards), "val").with_labels(["effusion"])
    affirm, deny = prompts_for(["effusion"], "findings")["effusion"]
    rows = _known_rows(model, [affirm if value == 1 else deny for value in records.labels[:, 0]]).float()
    blind = torch.zeros_like(rows)
    images = ImageEmbeddings(blind, rows, rows)
    assert score_zero_shot(model, records, images, None, "findings").metrics["auroc/effusion"]["value"] == 1
    undecided = score_zero_shot(model, records, images, None, "impression").metrics
    assert undecided["auroc/effusion"]["value"] == 0.5
    assert undecided["f1/effusion"]["value"] == 0, "a margin of 0 is no yes"
    assert undecided["accuracy/effusion"]["value"] == pytest.approx((records.labels == 0).mean(), abs=1e-6)


def test_classes_that_exclude_each_other(model, one_class_each):
    records = read_split(load_index(one_class_each), "val")
    file = load_prompts("covidx")
    truth = np.array([[records.index.labels.index(name) for name in ("normal", "Pneumonia", "covid")]])
    truth = records.labels[:, truth[0]].argmax(axis=1)
    texts = [file.wording(name, "impression")[0] for name in CLASSES]
    rows = _known_rows(model, [texts[number] for number in truth])
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    rows = normalize(rows + 0.25 * noise, dim=1)
    scored = score_zero_shot(model, records, _seen(rows), file, "impression")
    predicted = model.class_shares(rows, texts).argmax(dim=1).numpy()
    metrics = scored.metrics
    assert 0.5 < metrics["accuracy"]["value"] < 1
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-6)
    assert metrics["f1_macro"]["value"] == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert metrics["accuracy"]["low"] < metrics["accuracy"]["value"] < metrics["accuracy"]["high"]
    assert metrics["blind_accuracy"]["value"] == pytest.approx(np.bincount(truth).max() / len(truth), abs=1e-6)
    assert metrics["auroc_macro"]["value"] > metrics["accuracy"]["value"] - 0.3
    assert {"auroc/covid", "ap/covid", "f1/covid"} < set(metrics)
    assert list(scored.settings["classes"]) == ["normal", "Pneumonia", "covid"]


def test_shares_of_classes_are_a_softmax_of_ensembles(model):
    images = normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    classes = [["Normal chest radiograph.", "No acute disease."], ["Pneumonia."], ["Effusion."]]
    shares = model.class_shares(images, classes)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(5, dtype=torch.float64))
    means = [normalize(model.encode_text(texts).double().mean(0), dim=0) for texts in classes]
    wanted = (images.double() @ torch.stack(means).T / 0.07).softmax(dim=1)
    torch.testing.assert_close(shares, wanted)
    margin = model.zero_shot_scores(images, {"a": (classes[1], classes[2])})["a"]
    shares = model.class_shares(images, classes[1:])
    torch.testing.assert_close(margin, shares[:, 0] - shares[:, 1])


def test_classes_from_end_to_end(export, one_class_each, tmp_path):
    result = evaluate_zero_shot(export, one_class_each, tmp_path, prompts="covidx", branch="findings")
    assert result["settings"]["prompt_files"] == {"covidx": load_prompts("covidx").sha256}
    assert result["settings"]["branch"] == "findings"
    assert result["metrics"]["accuracy"]["value"] is not None
    page = (tmp_path / "report.html").read_text()
    assert "best fixed answer" in page
    assert "accuracy" in page


def test_a_file_chooses_the_labels_and_says_what_it_leaves_out(export, phantom_shards, tmp_path):
    (tmp_path / "mine.yaml").write_text("labels: {effusion: {findings: {affirm: [Fluid.], deny: [No fluid.]}}}")
    path = str(tmp_path / "mine.yaml")
    result = evaluate_zero_shot(export, phantom_shards, tmp_path / "out", prompts=path)
    labels = load_index(phantom_shards).labels
    assert result["settings"]["prompts"] == {"effusion": (("Fluid.",), ("No fluid.",))}
    assert result["settings"]["labels_without_prompt"] == [name for name in labels if name != "effusion"]
    assert set(result["settings"]["prompt_files"]) == {path}


def test_naming_a_file_or_all_that_ship_gives_the_same_figures(export, phantom_shards, tmp_path):
    every = evaluate_zero_shot(export, phantom_shards, tmp_path)["metrics"]
    one = evaluate_zero_shot(export, phantom_shards, tmp_path, prompts="siim")["metrics"]
    assert one["auroc/pneumothorax"] == every["auroc/pneumothorax"]
    assert one["ap_macro"]["value"] == every["ap/pneumothorax"]["value"]


def test_what_cannot_be_asked_is_named(export, phantom_shards, one_class_each, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean covidx"):
        evaluate_zero_shot(tmp_path / "not even looked at", phantom_shards, tmp_path, prompts="covid")
    with pytest.raises(ValueError, match=r"--prompts covidx: .* has no label 'pneumonia'; classes exclude each other"):
        evaluate_zero_shot(export, phantom_shards, tmp_path, prompts="covidx")
    with pytest.raises(ValueError, match=r"--prompts siim: has none of the labels of .*normal.*; it has: pneumothorax"):
        evaluate_zero_shot(export, one_class_each, tmp_path, prompts="siim")
    records = read_split(load_index(one_class_each), "val")
    both = records.with_values(np.ones_like(records.labels))
    images = _seen(torch.ones(len(records.keys), 32))
    with pytest.raises(ValueError, match=f"have not exactly one of its classes, the first is {records.keys[0]}"):
        score_zero_shot(model, both, images, load_prompts("covidx"), "impression")
    with pytest.raises(ValueError, match="branch = 'findings': this model has no findings branch"):
        branch_rows(images._replace(findings=None), "findings")
    with pytest.raises(ValueError, match="branch = 'pooled': must be 'impression' or 'findings'"):
        branch_rows(images, "pooled")
