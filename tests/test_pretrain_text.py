"""Pre-training with a text encoder that runs in training, for real (two ranks: tests/training/test_engine.py)."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from imitate_ds import load_model
from imitate_ds.config import load_run_config
from imitate_ds.data.shards import load_index
from imitate_ds.data.text_cache import embed_shards, fit_texts, text_info
from imitate_ds.evaluate import evaluate_zero_shot
from imitate_ds.evaluation.embedded import duplicate_groups, embed_radiographs, embed_reports, read_split
from imitate_ds.metrics import recall_at_k
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.pretrain import pretrain
from tests.tiny_bert import save_tiny_bert
from tests.tiny_model import TINY_MODEL

STEPS = 6
ONE_LAYER = {"mode": "online", "trainable_layers": 1, "lr_share": 1.0}


@pytest.fixture(scope="module")
def bert(phantom_shards, tmp_path_factory) -> Path:
    words = sorted({word for text in fit_texts(phantom_shards) for word in re.findall(r"[a-z]+", text.lower())})
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), [*words, ".", ","], positions=96)


@pytest.fixture(scope="module")
def shards(phantom_shards, bert, tmp_path_factory) -> Path:
    """The phantom's, embedded by the BERT."""
    folder = Path(shutil.copytree(phantom_shards, tmp_path_factory.mktemp("shards") / "bert"))
    embed_shards(folder, load_text_encoder(str(bert)), progress=False)
    return folder


@pytest.fixture(scope="module")
def train(shards, tmp_path_factory, process_group):
    """Run to the end, one rank, in this process; its folder and its last figures."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *overrides, text=None, **settings):
        values = {
            "name": name,
            "output_dir": str(folder),
            "data": {"shards": str(shards), "input_size": 32, "workers": 0, **settings.pop("data", {})},
            "model": {**TINY_MODEL, "projection_norm": "layer"},
            "text": text or {},
            "optim": {"lr": 1e-3},
            "train": {
                "micro_batch_size": 12,
                "max_steps": STEPS,
                "log_every": 1,
                "images_every": 0,
                "batch_norm": "freeze",
                "eval_every": 0,
                **settings,
            },
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return folder / name, pretrain(load_run_config(path, list(overrides)))

    return run


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def online(train):
    """One layer learns, and the run validates at its end."""
    return train("online", text=ONE_LAYER, eval_every=1, save_every=3)


def test_the_layers_that_learn_move_and_no_other(online, bert):
    before, after = (
        load_file(folder / "model.safetensors") for folder in (bert, online[0] / "export" / "text_encoder")
    )
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # biases of keys cancel out in every softmax
    assert moved >= {n for n in before if n.startswith("encoder.layer.1.") and not n.endswith("key.bias")}
    assert all(name.startswith("encoder.layer.1.") for name in moved)
    found = losses(online[0])
    assert sum(found[-2:]) < sum(found[:2])


def test_nothing_learns_and_it_is_the_cached_run(train):
    cached, _ = train("cached")
    frozen, _ = train("frozen", text={"mode": "online", "trainable_layers": 0})
    assert losses(frozen) == pytest.approx(losses(cached), rel=2e-3)  # the cache is float16
    assert losses(frozen) != losses(cached)


def test_whole_reports_and_every_layer(train, shards):
    data = {"impression_text": "report", "workers": 2}
    cached, _ = train("report_cached", data=data, max_steps=2)
    frozen, _ = train("report_frozen", data=data, max_steps=2, text={"mode": "online", "trainable_layers": 0})
    assert losses(frozen) == pytest.approx(losses(cached), rel=2e-3)
    every, _ = train("report_every", data=data, text={"mode": "online", "lr_share": 1.0})
    assert losses(every)[-1] < losses(every)[0]


def test_resume_goes_on_as_the_undisturbed_run(train, online):
    folder = online[0]
    wanted = losses(folder)
    again = shutil.copytree(folder, folder.with_name("again"))
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
    (again / "metrics.jsonl").unlink()
    train("again", "train.resume=true", text=ONE_LAYER, eval_every=1, save_every=3)
    assert losses(again) == wanted[3:]
    weights = (load_file(one / "export" / "text_encoder" / "model.safetensors") for one in (folder, again))
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    with pytest.raises(ValueError, match=r"text\.lr_share = 0\.5: .* was made with 1\.0"):
        train("again", "train.resume=true", text={**ONE_LAYER, "lr_share": 0.5})
    with pytest.raises(ValueError, match=r"text\.mode = 'cached': .* was made with 'online'"):
        train("again", "train.resume=true")


def test_chunks_learn_as_the_whole_batch(train, shards, bert, tmp_path):
    """Without dropout, which draws by the shape of a chunk."""
    text = {**ONE_LAYER, "encoder": str(save_still(bert, tmp_path)), "trainable_layers": "all"}
    whole, _ = train("whole", text=text, max_steps=3)
    chunks, _ = train("chunks", text=text, max_steps=3, grad_cache_chunk=4)
    assert losses(chunks) == pytest.approx(losses(whole), rel=1e-4)


def save_still(bert: Path, folder: Path) -> Path:
    """The same BERT without dropout."""
    shutil.copytree(bert, folder / "still")
    path = folder / "still" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return folder / "still"


@pytest.mark.parametrize("level", ["impression", "findings"])
def test_retrieval_from_the_export_is_what_validation_measured(online, shards, level):
    folder, figures = online
    model, index = load_model(folder / "export"), load_index(shards)
    assert (
        model.text_encoder.fingerprint != text_info(index)["encoder"]
    )  # so evaluation passes over what is in the shards
    records = read_split(index, "val")
    images, texts, kept = (
        embed_radiographs(model, records, workers=0),
        embed_reports(model, records),
        records.has(level),
    )
    groups = torch.from_numpy(
        duplicate_groups([text for text, keep in zip(records.texts(level), kept, strict=True) if keep])
    )
    image, text = (getattr(side, level)[torch.from_numpy(kept)] for side in (images, texts))
    for k in (1, 5, 10):
        assert recall_at_k(image @ text.T, groups, groups, k=k) == figures[f"{level}/image_to_text_R@{k}"]
        assert recall_at_k(text @ image.T, groups, groups, k=k) == figures[f"{level}/text_to_image_R@{k}"]


def test_evaluation_encodes_prompts_and_reports_with_what_was_trained(online, shards, tmp_path):
    folder = online[0]
    model, records = load_model(folder / "export"), read_split(load_index(shards), "val")
    as_it_was = model.project_text(load_text_encoder(str(shards / "text_encoder")).encode(records.findings))
    rows = embed_reports(model, records).findings
    torch.testing.assert_close(rows, model.encode_text(records.findings), rtol=0, atol=1e-5)
    assert (rows - as_it_was).abs().max() > 0.01
    assert evaluate_zero_shot(folder / "export", shards, tmp_path)["metrics"]["auroc_macro"]["value"] > 0


def test_what_cannot_be_is_refused_and_says_what_to_do(train, phantom_shards, bert):
    data = {"data": {"shards": str(phantom_shards)}}
    with pytest.raises(ValueError, match=r"text\.mode = 'online': .* is embedded by lsa, .* --set text\.encoder="):
        train("lsa", text={"mode": "online"}, **data)
    with pytest.raises(ValueError, match=r"text\.encoder = 'x': is for text\.mode: online"):
        train("cached_with", text={"encoder": "x"})
    # with an encoder named, the embeddings of LSA serve as the clinical prior
    folder, _ = train("lsa", text={**ONE_LAYER, "encoder": str(bert)}, max_steps=1, **data)
    assert load_model(folder / "export").encode_text(["No effusion."]).shape == (1, 32)
