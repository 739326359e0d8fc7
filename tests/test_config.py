"""The run file: presets, overrides, and errors that name key, value and rule."""

import ast
import re
from functools import partial

import pytest

from imitate_ds.benchmark_config import BenchmarkConfig, load_benchmark_config
from imitate_ds.config import RunConfig, build_run_config, load_run_config
from imitate_ds.finetune_config import FinetuneConfig
from imitate_ds.launch import load_any_run
from imitate_ds.run_file import dump_settings, load_yaml, setting_names
from imitate_ds.scale_config import ScaleConfig, load_scale_config

MINIMAL = {"name": "x", "data": {"shards": "shards/x"}}


def message(values: dict) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        build_run_config(values)
    return str(caught.value)


def test_every_misspelt_setting_is_refused_with_the_nearest_name():
    for name in setting_names(RunConfig):
        *parents, leaf = name.split(".")
        values: dict = {**MINIMAL, "data": {**MINIMAL["data"]}}
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf + "x"] = 1
        text = message(values)
        assert f"{name}x is not a setting" in text
        assert f"did you mean {leaf}?" in text


def test_wrong_value_names_key_value_and_rule():
    assert "optim.lr = -1.0: must be greater than 0" in message({**MINIMAL, "optim": {"lr": -1.0}})
    assert "preset = 'papr'" in message({**MINIMAL, "preset": "papr"})
    assert "train.epochs = 'many'" in message({**MINIMAL, "train": {"epochs": "many"}})
    assert "optim = 3: must be a section of name, lr, " in message({**MINIMAL, "optim": 3})
    assert "objective.temperature = 'hot': must be a section of init, learnable, min" in message(
        {**MINIMAL, "objective": {"temperature": "hot"}}
    )
    assert "data: must be given" in message({"name": "x"})
    assert "model.in_chans = 2: must be 1 or 3" in message({**MINIMAL, "model": {"in_chans": 2}})
    assert "optim.layer_decay = 0.0: must be greater than 0" in message({**MINIMAL, "optim": {"layer_decay": 0.0}})


@pytest.mark.parametrize("share", [[0.0, 1.0], [0.5, 1.2], [0.9, 0.5]])
def test_a_crop_scale_that_is_no_share_is_refused(share):
    text = message({**MINIMAL, "data": {**MINIMAL["data"], "augment": {"crop_scale": share}}})
    assert "data.augment.crop_scale" in text
    assert "0 < low <= high <= 1" in text


def test_values_that_would_fail_late_are_refused_early():
    assert "optim.lr = inf" in message({**MINIMAL, "optim": {"lr": float("inf")}})
    assert "optim.betas" in message({**MINIMAL, "optim": {"betas": [0.9, 1.0]}})
    assert "seed = 5000000000" in message({**MINIMAL, "seed": 5_000_000_000})
    weights = dict.fromkeys(("image_impression", "image_findings", "views_impression", "views_findings"), 0.0)
    assert "nothing to learn" in message({**MINIMAL, "objective": {"weights": weights}})


def test_temperature_and_negatives_may_be_written_short():
    config = build_run_config({**MINIMAL, "objective": {"temperature": 0.05, "negatives": "local"}})
    assert (config.objective.temperature.init, config.objective.temperature.learnable) == (0.05, False)
    assert (config.objective.negatives.scope, config.objective.negatives.exchange) == ("local", "auto")
    assert "objective.temperature.init = 0.005" in message({**MINIMAL, "objective": {"temperature": 0.005}})
    learnable = {"init": 0.05, "learnable": True, "min": 0.05}
    assert "must be above min = 0.05" in message({**MINIMAL, "objective": {"temperature": learnable}})


def test_how_much_of_a_text_encoder_learns():
    for layers in (0, 6, "all"):
        config = build_run_config({**MINIMAL, "text": {"mode": "online", "trainable_layers": layers}})
        assert config.text.trainable_layers == layers
        assert build_run_config(load_yaml(dump_settings(config))) == config
    for wrong in (-1, "some", 1.5, True):
        text = message({**MINIMAL, "text": {"mode": "online", "trainable_layers": wrong}})
        assert text == f"text.trainable_layers = {wrong!r}: must be a number of layers, 0 or more, or all"
    assert "text.lr_share = 0.5: is for text.mode: online" in message({**MINIMAL, "text": {"lr_share": 0.5}})
    assert "text.max_tokens = 2: must be 0, or at least 3" in message(
        {**MINIMAL, "text": {"mode": "online", "max_tokens": 2}}
    )


def test_a_preset_can_be_refined_within_a_section():
    config = build_run_config({**MINIMAL, "preset": "paper", "objective": {"negatives": {"exchange": "owner"}}})
    assert (config.objective.negatives.scope, config.objective.negatives.exchange) == ("local", "owner")


@pytest.mark.parametrize("section", ["train", None])
@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "accumulate_grad_batches"])
def test_gradient_accumulation_is_refused_with_what_to_do_instead(section, name):
    text = message({**MINIMAL, **({section: {name: 4}} if section else {name: 4})})
    assert f"{name} is not a setting" in text
    assert "train.grad_cache_chunk" in text
    assert "add none" in text


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_must_divide_the_micro_batch(chunk):
    text = message({**MINIMAL, "train": {"micro_batch_size": 32, "grad_cache_chunk": chunk}})
    assert f"train.grad_cache_chunk = {chunk}" in text
    assert "train.micro_batch_size = 32" in text


def test_findings_terms_need_the_findings_branch():
    assert "objective.weights.image_findings" in message({**MINIMAL, "model": {"aggregation": {"enabled": False}}})


def test_run_file_over_preset_and_overrides_over_both(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\npreset: paper\ndata: {shards: s, augment: {rotation: 5.0}}\noptim: {lr: 1e-3}\n")
    config = load_run_config(path, ["optim.weight_decay=2e-2", "data.augment.crop_scale=[0.5, 1.0]"])
    assert config.optim.lr == 1e-3
    assert config.optim.weight_decay == 2e-2
    assert config.data.augment.rotation == 5.0
    assert config.data.augment.vertical_flip == 0.5  # the preset's
    assert config.data.augment.crop_scale == (0.5, 1.0)
    assert config.objective.negatives.scope == "local"


def test_dumped_run_file_gives_the_same_run():
    config = build_run_config({**MINIMAL, "preset": "paper"})
    assert build_run_config(load_yaml(dump_settings(config))) == config


def test_bad_override_and_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="launch/runs"):
        load_run_config(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("name: x\ndata: {shards: s}\n")
    with pytest.raises(ValueError, match="must be key=value"):
        load_run_config(path, ["optim.lr"])
    with pytest.raises(ValueError, match="is a value, not a section"):
        load_run_config(path, ["name.first=1"])


@pytest.mark.parametrize(
    ("train", "data", "message"),
    [
        ({"best_metric": "impression/recall@5"}, {}, r"train\.best_metric = 'impression/recall@5': .*pattern"),
        ({"keep_best": 1, "eval_every": 0}, {}, r"train\.keep_best = 1: needs validation"),
        ({"keep_best": 1}, {"val_split": ""}, r"train\.keep_best = 1: needs validation"),
    ],
)
def test_a_best_checkpoint_that_could_never_be_found_is_refused(train, data, message):
    with pytest.raises(ValueError, match=message):
        build_run_config({**MINIMAL, "train": train, "data": {**MINIMAL["data"], **data}})


def test_yaml_never_builds_objects():
    with pytest.raises(Exception, match="could not determine a constructor"):
        load_yaml("!!python/object/apply:os.system ['true']")


def test_settings_that_messages_name_exist(repository):
    """All strings but docstrings; `model.safetensors` and the like are files, `model.encode_image(` is Python."""
    kinds = (RunConfig, FinetuneConfig, BenchmarkConfig, ScaleConfig)
    settings = [name for kind in kinds for name in setting_names(kind) if "." in name]
    known = {".".join(name.split(".")[:depth]) for name in settings for depth in range(1, name.count(".") + 2)}
    sections = "|".join(sorted({name.partition(".")[0] for name in settings}))
    named = re.compile(rf"(?<![\w./'-])(?:{sections})(?:\.[a-z_]\w*)+(?![\w(\[])")
    found = set()
    for path in (repository / "imitate_ds").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in prose]
        found |= {name for text in texts if isinstance(text, str) for name in named.findall(text)}
    assert len(found) > 50
    assert {name for name in found - known if not name.endswith((".csv", ".json", ".safetensors"))} == set()


def test_every_run_file_that_ships_is_valid(repository):
    run_files = sorted((repository / "launch" / "runs").glob("*.yaml"))
    assert len(run_files) >= 16
    for path in run_files:
        kinds = {"benchmark": load_benchmark_config, "scale": load_scale_config}
        load = kinds.get(path.stem.partition("_")[0], partial(load_any_run, overrides=[]))
        assert load(path).name == path.stem


def test_shards_are_one_location_or_a_mixture():
    one = build_run_config(MINIMAL).data.shards
    assert [(part.shards, part.weight) for part in one] == [("shards/x", 1.0)]
    mixture = [{"shards": "shards/x"}, {"shards": "s3://bucket/y", "weight": 0.5}]
    config = build_run_config({**MINIMAL, "data": {"shards": mixture}})
    assert [(part.shards, part.weight) for part in config.data.shards] == [("shards/x", 1.0), ("s3://bucket/y", 0.5)]
    assert build_run_config(load_yaml(dump_settings(config))) == config


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], r"data\.shards = \[\]: .* at least 1 item"),
        (3, r"data\.shards = 3: must be a list"),
        ([{"shards": "a", "wieght": 2.0}], r"data\.shards\.0\.wieght is not a setting \(did you mean weight\?\)"),
        ([{"shards": "a"}, {"shards": "b", "weight": 0.0}], r"data\.shards\.1\.weight = 0\.0: must be greater than 0"),
        ("http://alice:s3cret@h/x", r"data\.shards\.0\.shards = 'http://\*\*\*h/x': must be a URL without user"),
        ("https://h/x?token=s3cret", r"data\.shards\.0\.shards = 'https://h/x\*\*\*': must be a URL without user"),
        ([{"weight": 1.0}], r"data\.shards\.0\.shards: must be given; add it to the run file$"),
        (["a"], r"data\.shards\.0 = 'a': must be a section of shards, weight"),
    ],
)
def test_a_mixture_is_checked_entry_by_entry(shards, message):
    with pytest.raises(ValueError, match=message):
        build_run_config({**MINIMAL, "data": {"shards": shards}})
