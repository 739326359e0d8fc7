"""What leaves comes back: export folders written, loaded, refused, and read by programs that only know timm."""

import json
import math
import shutil

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import imitate_ds
from imitate_ds.config import build_run_config
from imitate_ds.data.shards import load_index, read_samples
from imitate_ds.data.text_cache import text_info
from imitate_ds.data.transforms import eval_view
from imitate_ds.hub import load_model, save_pretrained
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.models.lsa_encoder import LsaEncoder

CARD = {"data": "phantom", "synthetic": True, "image_size": 64, "steps": 0}
PROMPTS = {"effusion": (["Pleural effusion.", "There is a pleural effusion."], ["No pleural effusion."])}


def _config(shards, **model):
    settings = {"image_encoder": "resnet10t", "joint_dim": 16, "text_hidden": 24, "aggregation": {"pool": 4}, **model}
    values: dict = {"name": "t", "data": {"shards": str(shards), "input_size": 48}, "model": settings}
    if not settings["aggregation"].get("enabled", True):
        values["objective"] = {"weights": {"image_findings": 0.0, "views_findings": 0.0}}
    return build_run_config(values)


def _export(shards, folder, *, card=CARD, text_encoder=True, **model):
    config = _config(shards, **model)
    torch.manual_seed(0)
    network = ImitateModel(
        config.model, text_info(load_index(shards))["width"], input_size=config.data.input_size
    ).eval()
    encoder = shards / "text_encoder" if text_encoder else None
    save_pretrained(network, folder, config=config, text_encoder_folder=encoder, card=card)
    return network


@pytest.fixture(scope="module")
def export(phantom_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "export"
    return folder, _export(phantom_shards, folder)


@pytest.fixture(scope="module")
def files(phantom_shards, tmp_path_factory):
    """Three radiographs of the shards, as files without loss."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for i, (_, jpg, _) in zip(range(3), read_samples(load_index(phantom_shards), "val"), strict=False):
        source = folder / f"{i}.jpg"
        source.write_bytes(jpg)
        Image.open(source).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    return paths


def test_the_folder_holds_what_others_need_and_no_pickle(export):
    folder, _ = export
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "image_encoder.safetensors",
        "preprocessor_config.json",
        "text_encoder",
        "README.md",
    }
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".txt"}
    settings = json.loads((folder / "config.json").read_text())
    assert settings["format"] == "imitate_ds.model/1"
    assert settings["impression_text"] == "impression"
    assert settings["model"]["image_encoder"] == "resnet10t"
    card = (folder / "README.md").read_text()
    assert "Not for clinical use" in card
    assert "synthetic" in card
    assert "terms.json` holds words and pairs of words that occur in the training reports" in card
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"synthetic": "true"}


def test_the_configuration_says_what_the_model_was_trained_on(phantom_shards, tmp_path):
    _export(phantom_shards, tmp_path / "export", card={**CARD, "build_id": "abc"})
    settings = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (settings["build_id"], settings["train_split"]) == ("abc", "train")
    assert settings["text_encoder"] == {"kind": "lsa", "fingerprint": text_info(load_index(phantom_shards))["encoder"]}


def test_another_text_encoder_than_that_of_the_run_is_refused(export, tmp_path):
    folder = shutil.copytree(export[0], tmp_path / "export")
    LsaEncoder.fit(["No effusion.", "Large effusion.", "Cardiomegaly."], dim=3).save(folder / "text_encoder")
    with pytest.raises(ValueError, match="but the model was trained with"):
        load_model(folder).encode_text(["Cardiomegaly."])


def test_an_export_of_an_older_version_loads(export, tmp_path):
    folder = shutil.copytree(export[0], tmp_path / "export")
    settings = json.loads((folder / "config.json").read_text())
    for name in ("build_id", "train_split", "text_encoder"):
        del settings[name]
    (folder / "config.json").write_text(json.dumps(settings))
    model = load_model(folder)
    assert model.encode_text(["Cardiomegaly."]).shape == (1, 16)
    model.save_pretrained(tmp_path / "again")
    load_model(tmp_path / "again")


@pytest.mark.parametrize("branch", ["impression", "findings", "pooled"])
def test_loaded_embeddings_are_those_of_the_engine(export, branch):
    folder, network = export
    images = torch.randint(0, 256, (5, 1, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        wanted = dict(zip(("impression", "findings", "pooled"), network.encode_image(images), strict=True))[branch]
    model = imitate_ds.load_model(folder)
    rows = model.encode_image(images, branch=branch, batch_size=2)
    torch.testing.assert_close(rows, wanted)
    assert rows.dtype == torch.float32
    if branch != "pooled":
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


def test_files_and_pixels_give_the_same_embedding(export, files):
    model = load_model(export[0])
    prepared = model.prepare(files)
    assert prepared.shape == (3, 1, 48, 48)
    torch.testing.assert_close(model.encode_image(files), model.encode_image(prepared))
    torch.testing.assert_close(model.encode_image([str(path) for path in files]), model.encode_image(prepared))


def test_a_radiograph_prepared_for_the_shards_stays_what_it_was(phantom_shards, export, files):
    """Inference sees what the evaluation of the shards sees, but for a border that was cut and padded already."""
    model = load_model(export[0])
    _, jpg, _ = next(read_samples(load_index(phantom_shards), "val"))
    assert files[0].with_suffix(".jpg").read_bytes() == jpg
    pixels = torch.frombuffer(bytearray(Image.open(files[0]).tobytes()), dtype=torch.uint8).view(1, 64, 64)
    difference = (model.prepare(files[:1])[0].int() - eval_view(pixels, 48).int()).abs()
    assert difference.float().mean() < 8


def test_a_learned_temperature_is_a_number_of_the_configuration(phantom_shards, export, tmp_path, files):
    config = build_run_config(
        _config(phantom_shards).model_dump(mode="json") | {"objective": {"temperature": {"learnable": True}}}
    )
    torch.manual_seed(0)
    width, learnable = text_info(load_index(phantom_shards))["width"], config.objective.temperature
    network = ImitateModel(config.model, width, input_size=48, temperature=learnable).eval()
    torch.nn.init.constant_(network.temperature.exponent, -0.5)
    encoder = phantom_shards / "text_encoder"
    save_pretrained(network, tmp_path / "export", config=config, text_encoder_folder=encoder, card=CARD)
    model, constant = load_model(tmp_path / "export"), load_model(export[0])
    assert model.settings["temperature"] == pytest.approx(0.01 + 0.06 * math.exp(-0.5))
    assert constant.settings["temperature"] == 0.07
    weights = (folder / "model.safetensors" for folder in (tmp_path / "export", export[0]))
    assert len({path.read_bytes() for path in weights}) == 1  # the same names, so any version loads them
    assert torch.equal(model.encode_image(files), constant.encode_image(files))
    margins = [loaded.zero_shot(files, PROMPTS)["effusion"].abs() for loaded in (model, constant)]
    assert (margins[0] > margins[1]).all()  # sharper


def test_similarity_of_images_and_texts(export, files):
    model = load_model(export[0])
    texts = model.encode_text(["No pleural effusion.", "Cardiomegaly."], section="impression")
    assert texts.shape == (2, 16)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    similarity = model.similarity(model.encode_image(files), texts)
    assert similarity.shape == (3, 2)
    assert similarity.abs().max() <= 1 + 1e-6


def test_a_head_can_be_trained_on_the_features(export, files):
    head = torch.nn.Linear(512, 1)
    head(load_model(export[0]).encode_image(files, branch="pooled")).sum().backward()
    assert head.weight.grad is not None


def test_zero_shot_of_one_image_does_not_depend_on_the_others(export, files):
    model = load_model(export[0])
    together = model.zero_shot(files, PROMPTS)["effusion"]
    alone = torch.cat([model.zero_shot([path], PROMPTS)["effusion"] for path in files])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.abs().max() < 1


def test_zero_shot_asks_the_branch_it_is_told(export, files):
    model = load_model(export[0])
    for branch in ("impression", "findings"):
        wanted = model.zero_shot_scores(model.encode_image(files, branch), PROMPTS)["effusion"]
        assert torch.equal(model.zero_shot(files, PROMPTS, branch)["effusion"], wanted)
    assert torch.equal(
        model.zero_shot(files, PROMPTS)["effusion"], model.zero_shot(files, PROMPTS, "impression")["effusion"]
    )
    with pytest.raises(ValueError, match="branch = 'pooled': must be 'impression' or 'findings'"):
        model.zero_shot(files, PROMPTS, branch="pooled")


def test_saving_a_loaded_model_gives_the_same_files(export, tmp_path):
    folder, _ = export
    load_model(folder).save_pretrained(tmp_path / "again")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("name", "dropped"),
    [("resnet10t", "fc."), ("convnext_atto", "head."), ("vit_tiny_patch16_224", ("head.", "norm.", "fc_norm."))],
)
def test_the_backbone_loads_into_plain_timm(phantom_shards, tmp_path, name, dropped):
    network = _export(phantom_shards, tmp_path / "export", image_encoder=name, aggregation={"pool": 2})
    state = load_file(tmp_path / "export" / "image_encoder.safetensors")
    plain = timm.create_model(name, img_size=48) if name.startswith("vit") else timm.create_model(name)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [key for key in missing if not key.startswith(dropped)] == []
    if name == "resnet10t":
        timm.create_model(name, num_classes=0).load_state_dict(state)  # strict
        pixels = torch.randint(0, 256, (2, 1, 48, 48), dtype=torch.uint8)
        normal = (pixels.float() / 255 - 0.5) / 0.25
        with torch.no_grad():
            features = plain.eval().forward_features(normal.expand(-1, 3, -1, -1)).mean(dim=(2, 3))
            torch.testing.assert_close(features, network.encode_image(pixels)[2])


@pytest.mark.parametrize(("name", "classifier"), [("densenet121", "classifier."), ("resnext26ts", "head.fc.")])
def test_what_began_as_a_file_of_timm_goes_back_under_the_same_names(phantom_shards, tmp_path, name, classifier):
    """Their extractors flatten lists whose modules have names: features_denseblock1, stem_conv1."""
    plain = timm.create_model(name, pretrained=False).state_dict()
    save_file(plain, tmp_path / "plain.safetensors")
    weights = str(tmp_path / "plain.safetensors")
    _export(phantom_shards, tmp_path / "export", image_encoder=name, weights=weights, aggregation={"pool": 2})
    state = load_file(tmp_path / "export" / "image_encoder.safetensors")
    assert {key for key in plain if not key.startswith(classifier)} == state.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in state.items())
    timm.create_model(name, num_classes=0).load_state_dict(state)  # strict


def test_load_does_not_ask_for_the_weights_the_run_began_with(export, tmp_path):
    folder = shutil.copytree(export[0], tmp_path / "export")
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["weights"] = "/gone/since.safetensors"
    (folder / "config.json").write_text(json.dumps(settings))
    load_model(folder)


def test_a_model_without_findings_branch_says_so(phantom_shards, tmp_path, files):
    _export(phantom_shards, tmp_path / "export", aggregation={"enabled": False})
    model = load_model(tmp_path / "export")
    with pytest.raises(ValueError, match="has no findings branch"):
        model.encode_image(files, branch="findings")


def test_a_model_without_text_encoder_still_sees(phantom_shards, tmp_path, files):
    _export(phantom_shards, tmp_path / "export", text_encoder=False)
    model = load_model(tmp_path / "export")
    assert model.encode_image(files).shape == (3, 16)
    with pytest.raises(FileNotFoundError, match="no text_encoder/ folder"):
        model.encode_text(["Cardiomegaly."])


def test_bad_arguments_are_named(export, files):
    model = load_model(export[0])
    with pytest.raises(ValueError, match="branch = 'top'"):
        model.encode_image(files, branch="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="section = 'history'"):
        model.encode_text(["a"], section="history")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be grey uint8 \[B, 1, H, W\], found torch.float32 \[2, 3, 48, 48\]"):
        model.encode_image(torch.zeros(2, 3, 48, 48))
    with pytest.raises(ValueError, match="at least one"):
        model.encode_image([])
    with pytest.raises(ValueError, match=r"write \[file\]"):
        model.encode_image(str(files[0]))
    with pytest.raises(ValueError, match=r"write \[text\]"):
        model.encode_text("Cardiomegaly.")


def test_a_file_that_cannot_be_read_is_named_by_its_place(export, files, tmp_path):
    model = load_model(export[0])
    (tmp_path / "torn.png").write_bytes(b"torn")
    for bad, error in ((tmp_path / "torn.png", ValueError), (tmp_path / "patient-17.png", FileNotFoundError)):
        with pytest.raises(error, match=r"images\[3\]: ") as caught:
            model.encode_image([*files, bad], batch_size=2)
        assert str(tmp_path) not in str(caught.value)


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/typo", "runs/typo/export", "./runs/typo", "typo"):
        with pytest.raises(FileNotFoundError, match=r"finish it with --set train\.resume=true") as caught:
            load_model(name)
        assert "the hub" not in str(caught.value)


def test_a_name_that_the_hub_cannot_have_and_a_folder_without_weights(export, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="HFValidationError"):
        load_model("nobody/no--thing")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--model"
    folder = shutil.copytree(export[0], cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert load_model("somebody/model").folder == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"somebody/model: no model\.safetensors, so not an export"):
        load_model("somebody/model")


def test_saving_here_means_this_folder(export, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    load_model(export[0]).save_pretrained(".")
    monkeypatch.chdir(tmp_path)
    assert load_model(here).encode_text(["Cardiomegaly."]).shape == (1, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_what_is_not_an_export_is_refused(export, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json, so not an export"):
        load_model(tmp_path / "empty")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder, and the hub gave no model of that name"):
        load_model("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("config.json", '{"format": "somebody.else/7"}', "format = 'somebody.else/7': must be 'imitate_ds.model/1'"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[1]", "must be a JSON object"),
        ("config.json", '{"format": "imitate_ds.model/1"}', "lacks preset, impression_text"),
        ("preprocessor_config.json", "", "not valid JSON"),
        ("preprocessor_config.json", '{"input_size": 48}', "lacks image_size"),
        ("model.safetensors", "torn", "damaged export"),
    ],
)
def test_foreign_and_damaged_files_are_refused(export, tmp_path, name, content, rule):
    folder = shutil.copytree(export[0], tmp_path / "export")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rule):
        load_model(folder)


def test_weights_of_another_model_are_refused(export, tmp_path):
    folder = shutil.copytree(export[0], tmp_path / "export")
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["joint_dim"] = 8
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="damaged export"):
        load_model(folder)


def test_an_export_replaces_an_export_and_nothing_else(phantom_shards, tmp_path):
    _export(phantom_shards, tmp_path / "export")
    _export(phantom_shards, tmp_path / "export", card={**CARD, "data": "again"})
    assert json.loads((tmp_path / "export" / "config.json").read_text())["data"] == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="exists and is not an export"):
        _export(phantom_shards, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(ValueError, match="exists and is not an export"):
        _export(phantom_shards, tmp_path / "mine" / "thesis.tex")


def test_a_failed_export_leaves_the_old_one_and_no_litter(phantom_shards, tmp_path):
    network = _export(phantom_shards, tmp_path / "export")
    before = (tmp_path / "export" / "config.json").read_bytes()
    with pytest.raises(FileNotFoundError):
        save_pretrained(
            network,
            tmp_path / "export",
            config=_config(phantom_shards),
            text_encoder_folder=tmp_path / "gone",
            card={**CARD, "data": "new"},
        )
    assert (tmp_path / "export" / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_card_must_say_what_the_data_were(phantom_shards, tmp_path):
    with pytest.raises(ValueError, match="card: synthetic, image_size missing"):
        _export(phantom_shards, tmp_path / "export", card={"data": "phantom"})


def test_public_names():
    assert imitate_ds.load_model is load_model
    assert imitate_ds.__version__
    with pytest.raises(AttributeError):
        _ = imitate_ds.nothing  # type: ignore[attr-defined]
