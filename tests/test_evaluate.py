"""The three tasks on phantom shards with small untrained models, and with a model made to know the answer."""

import json
import shutil

import numpy as np
import pytest
import torch

from imitate_ds.config import build_run_config
from imitate_ds.data.shards import load_index, read_samples
from imitate_ds.data.text_cache import text_info
from imitate_ds.evaluate import evaluate_probe, evaluate_retrieval, evaluate_zero_shot
from imitate_ds.evaluation.embedded import duplicate_groups, embed_radiographs, embed_reports, read_split
from imitate_ds.hub import load_model, save_pretrained
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.models.lsa_encoder import LsaEncoder

pytestmark = pytest.mark.slow

DIRECTIONS = ("image_to_text", "text_to_image")


def _export(shards, folder, *, impression_text="impression", findings=True, encoder=None):
    values = {
        "name": "t",
        "data": {"shards": str(shards), "input_size": 64, "impression_text": impression_text},
        "model": {
            "image_encoder": "resnet10t",
            "joint_dim": 32,
            "text_hidden": 32,
            "aggregation": {"pool": 4, "eval_draws": 1, "enabled": findings},
        },
    }
    if not findings:
        values["objective"] = {"weights": {"image_findings": 0.0, "views_findings": 0.0}}
    config = build_run_config(values)
    torch.manual_seed(0)
    model = ImitateModel(config.model, text_info(load_index(shards))["width"], input_size=64)
    card = {"data": "phantom", "synthetic": True, "image_size": 64, "build_id": load_index(shards).build_id}
    encoder = encoder or shards / "text_encoder"
    save_pretrained(model, folder, config=config, text_encoder_folder=encoder, card=card)
    return folder


@pytest.fixture(scope="module")
def export(phantom_shards, tmp_path_factory):
    return _export(phantom_shards, tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def results(phantom_shards, export, tmp_path_factory):
    """All three tasks into one folder."""
    out = tmp_path_factory.mktemp("out")
    tasks = (evaluate_retrieval, evaluate_zero_shot, evaluate_probe)
    return out, {result["task"]: result for result in (task(export, phantom_shards, out) for task in tasks)}


def test_results_of_all_tasks_stand_in_one_file(results, phantom_shards):
    out, by_task = results
    written = json.loads((out / "results.json").read_text())["results"]
    assert [result["task"] for result in written] == ["probe", "retrieval", "zero-shot"]
    for result in written:
        assert result == json.loads(json.dumps(by_task[result["task"]]))
        assert {"task", "protocol", "model", "data", "settings", "metrics"} <= result.keys()
        assert result["protocol"] == "strict"
        assert result["data"]["synthetic"] is True
        assert result["data"]["build_id"] == load_index(phantom_shards).build_id
        for figure in result["metrics"].values():
            assert {"value", "low", "high", "n"} <= figure.keys()
            if figure["low"] is not None:
                assert figure["low"] <= figure["value"] <= figure["high"]
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html"}


def test_nothing_written_holds_report_text_or_ids(results, phantom_shards):
    out, _ = results
    written = (out / "results.json").read_text() + (out / "report.html").read_text()
    for _, _, meta in read_samples(load_index(phantom_shards), "val"):
        for secret in (meta["findings"], meta["impression"], meta["patient_id"], meta["study_id"]):
            # our own prompts may read like a whole short report
            assert not secret or len(secret) < 45 or secret not in written


def test_retrieval_of_an_untrained_model_is_about_chance(results):
    metrics = results[1]["retrieval"]["metrics"]
    for level in ("impression", "findings", "report"):
        for direction in DIRECTIONS:
            for k in (1, 5, 10):
                assert f"{level}/{direction}_R@{k}" in metrics
                assert f"{level}/{direction}_P@{k}" in metrics
            found, chance = (metrics[f"{level}/{direction}_{name}R@10"]["value"] for name in ("", "chance_"))
            assert found < chance + 0.35
    # fewer texts than studies: duplicates are one
    assert metrics["impression/text_to_image_R@1"]["n"] < metrics["impression/image_to_text_R@1"]["n"]


def test_reference_retrieval_takes_every_report(phantom_shards, export, tmp_path):
    result = evaluate_retrieval(export, phantom_shards, tmp_path, protocol="reference")
    assert result["settings"]["ties"] == "broken by index order"
    metrics = result["metrics"]
    sizes = {metrics[f"impression/{direction}_R@1"]["n"] for direction in DIRECTIONS}
    assert len(sizes) == 1
    n = sizes.pop()
    assert metrics["impression/image_to_text_chance_R@1"]["value"] == pytest.approx(1 / n, abs=1e-5)


def test_retrieval_from_as_many_studies_of_each_class(phantom_shards, export, tmp_path):
    given = {"classes": ["effusion", "pneumothorax"], "per_class": 2}
    result = evaluate_retrieval(export, phantom_shards, tmp_path, protocol="reference", **given)
    metrics = result["metrics"]
    assert {metrics[f"{level}/image_to_text_R@1"]["n"] for level in ("impression", "findings", "report")} == {4}
    assert metrics["impression/image_to_text_chance_P@1"]["value"] == 0.5
    assert set(metrics["impression/image_to_text_P@1"]["by_class"]) == set(given["classes"])
    assert result["settings"]["per_class"] == 2
    with pytest.raises(ValueError, match=r"--per-class 1000: too few studies .* effusion [0-9]+, pneumothorax [0-9]+;"):
        evaluate_retrieval(export, phantom_shards, tmp_path, classes=given["classes"], per_class=1000)
    with pytest.raises(ValueError, match=r"has no label 'Efusion' \(did you mean effusion\?\)"):
        evaluate_retrieval(export, phantom_shards, tmp_path, classes=["Efusion"], per_class=2)
    with pytest.raises(ValueError, match="--classes and --per-class go together"):
        evaluate_retrieval(export, phantom_shards, tmp_path, per_class=2)


def test_a_model_without_findings_branch_answers_with_the_one_it_has(phantom_shards, tmp_path):
    folder = _export(phantom_shards, tmp_path / "export", findings=False)
    metrics = evaluate_retrieval(folder, phantom_shards, tmp_path / "out")["metrics"]
    assert "findings/image_to_text_R@5" in metrics
    assert "report/image_to_text_R@5" in metrics


def test_whole_reports_are_compared_where_the_model_was_aligned_with_them(phantom_shards, tmp_path):
    plain = _export(phantom_shards, tmp_path / "a", findings=False)
    whole = _export(phantom_shards, tmp_path / "b", findings=False, impression_text="report")
    first, second = (
        evaluate_retrieval(folder, phantom_shards, tmp_path / "out")["curves"] for folder in (plain, whole)
    )
    assert first["impression/image_to_text"] == second["impression/image_to_text"]
    assert first["report/image_to_text"] != second["report/image_to_text"]


def test_embeddings_of_reports_come_from_the_cache_only_if_the_encoder_is_the_same(phantom_shards, export, tmp_path):
    model, records = load_model(export), read_split(load_index(phantom_shards), "val")
    cached = embed_reports(model, records)
    assert model.text_encoder.fingerprint == text_info(load_index(phantom_shards))["encoder"]
    fresh = model.encode_text(records.texts("report"))
    torch.testing.assert_close(cached.report, fresh, atol=2e-3, rtol=0)  # the cache is fp16

    other = LsaEncoder.fit(
        [*records.findings, "a word of its own"], dim=text_info(load_index(phantom_shards))["width"], seed=1
    )
    assert other.width == text_info(load_index(phantom_shards))["width"]
    other.save(tmp_path / "encoder")
    stranger = load_model(_export(phantom_shards, tmp_path / "export", encoder=tmp_path / "encoder"))
    assert (embed_reports(stranger, records).report - cached.report).abs().max() > 0.01


def test_shards_without_embeddings_are_encoded(phantom_shards, export, tmp_path):
    bare = shutil.copytree(phantom_shards, tmp_path / "shards")
    (bare / "text.json").unlink()
    model = load_model(export)
    rows = embed_reports(model, read_split(load_index(bare), "val"))
    torch.testing.assert_close(
        rows.impression,
        embed_reports(model, read_split(load_index(phantom_shards), "val")).impression,
        atol=2e-3,
        rtol=0,
    )


def test_radiographs_come_in_index_order_whatever_the_workers(phantom_shards, export):
    model, records = load_model(export), read_split(load_index(phantom_shards), "val")
    rows = [embed_radiographs(model, records, workers=workers).pooled for workers in (0, 2)]
    assert len(rows[0]) == len(records.keys)
    torch.testing.assert_close(rows[0], rows[1])


def test_a_model_that_diverged_is_refused(phantom_shards, export):
    model = load_model(export)
    with torch.no_grad():
        next(model.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        embed_radiographs(model, read_split(load_index(phantom_shards), "val"), workers=0)


def test_zero_shot_names_its_prompts_and_scores_every_label(results, phantom_shards):
    result = results[1]["zero-shot"]
    labels = load_index(phantom_shards).labels
    assert set(result["settings"]["prompts"]) == set(labels)
    assert {f"auroc/{label}" for label in labels} < set(result["metrics"])
    assert 0.2 < result["metrics"]["auroc_macro"]["value"] < 0.8


def test_probe_reports_shares_seeds_and_spread(results):
    result = results[1]["probe"]
    shares = result["settings"]["shares"]
    assert [len(shares[name]["seeds"]) for name in ("1%", "10%", "100%")] == [5, 5, 1]
    assert shares["10%"]["samples"][0] < shares["100%"]["samples"][0]
    assert result["metrics"]["10%/auroc_macro"]["draws"] == 5
    assert "std" in result["metrics"]["10%/auroc_macro"]
    assert "std" not in result["metrics"]["100%/auroc_macro"]
    # even random features tell devices, large and bright, from none
    assert result["metrics"]["100%/auroc_macro"]["value"] > 0.5


def test_a_label_with_one_value_is_not_defined_and_counted(phantom_shards, export, tmp_path):
    records = read_split(load_index(phantom_shards), "test")
    constant = [name for i, name in enumerate(records.index.labels) if len(np.unique(records.labels[:, i])) == 1]
    metrics = evaluate_zero_shot(export, phantom_shards, tmp_path, split="test")["metrics"]
    assert metrics["auroc_macro"]["not_defined"] == constant
    assert metrics["auroc_macro"]["labels"] == len(records.index.labels) - len(constant)
    for name in constant:
        assert metrics[f"auroc/{name}"]["value"] is None
    assert constant, "the test split is meant to be small enough to lack a label"


def test_one_patient_on_both_sides_is_refused_unless_papers_did_it(phantom_shards, export, tmp_path):
    with pytest.raises(ValueError, match="of its patients are in 'val' too"):
        evaluate_probe(export, phantom_shards, tmp_path, split="val", train_split="val")
    result = evaluate_probe(export, phantom_shards, tmp_path, protocol="reference", train_split="val")
    assert result["settings"]["shared_patients"] == result["data"]["patients"]
    assert result["settings"]["shares"]["10%"]["seeds"] == [42]


def test_the_split_of_the_training_is_refused_unless_papers_did_it(phantom_shards, export, tmp_path):
    with pytest.raises(ValueError, match=r"split = 'train': .* was trained on it"):
        evaluate_retrieval(export, phantom_shards, tmp_path, split="train")
    evaluate_retrieval(export, phantom_shards, tmp_path, split="train", protocol="reference")
    old = shutil.copytree(export, tmp_path / "old")
    settings = json.loads((old / "config.json").read_text())
    del settings["build_id"], settings["train_split"]
    (old / "config.json").write_text(json.dumps(settings))
    evaluate_zero_shot(old, phantom_shards, tmp_path, split="train")


def test_labels_without_wording_are_left_out_and_named(phantom_shards):
    records = read_split(load_index(phantom_shards), "val")
    kept = records.index.labels[1:3]
    fewer = records.with_labels(kept)
    assert fewer.index.labels == kept
    np.testing.assert_array_equal(fewer.labels, records.labels[:, 1:3])
    assert fewer.describe() == records.describe()


def test_duplicates_are_texts_that_differ_in_nothing_but_case_and_punctuation():
    texts = ["No effusion.", "no  effusion", "No effusion!\n", "No effusions.", "", "___"]
    groups = duplicate_groups(texts).tolist()
    assert groups[0] == groups[1] == groups[2] != groups[3]
    assert groups[4] == groups[5]


def test_bad_input_is_named(phantom_shards, export, tmp_path):
    with pytest.raises(ValueError, match="protocol = 'lenient': must be 'strict' or 'reference'"):
        evaluate_retrieval(export, phantom_shards, tmp_path, protocol="lenient")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split = 'dev'"):
        evaluate_retrieval(export, phantom_shards, tmp_path, split="dev")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        evaluate_retrieval(tmp_path / "none", phantom_shards, tmp_path)
    with pytest.raises(FileNotFoundError, match="imitate-ds shards build"):
        evaluate_retrieval(export, tmp_path / "none", tmp_path)
    (tmp_path / "results.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="not a results file"):
        evaluate_zero_shot(tmp_path / "not even looked at", phantom_shards, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == {"mine": 1}
