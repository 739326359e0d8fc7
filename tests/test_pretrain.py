"""The main entrance, for real: DeepSpeed ranks on phantom shards, killed and resumed, exported and loaded."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from imitate_ds import load_model
from imitate_ds.config import load_run_config
from imitate_ds.data.shards import load_index
from imitate_ds.evaluate import evaluate_retrieval
from imitate_ds.evaluation.validation import validate
from imitate_ds.pretrain import pretrain
from imitate_ds.recipe import build_model, open_inputs, rate_share, run_identity, with_operands
from imitate_ds.training import identity
from imitate_ds.training.drain import Drain
from imitate_ds.training.engine import parameter_groups
from imitate_ds.training.heart import STUCK
from imitate_ds.training.run_state import read_run_state
from tests.launching import finish, run, start
from tests.tiny_model import TINY_MODEL

pytestmark = pytest.mark.slow

GOLDEN_STEPS = 10


class OneProcess:
    """What `validate` asks of an engine, around a plain module."""

    def __init__(self, module):
        self.module = module

    def __call__(self, batch):
        return self.module(batch)


@pytest.fixture
def run_file(tmp_path, phantom_shards):
    """Write a run file for ten quick steps in two epochs; keyword arguments override settings."""

    def write(name, **settings):
        values = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0, **settings.get("data", {})},
            "model": TINY_MODEL,
            "optim": {"lr": 1e-3},
            "train": {
                "micro_batch_size": 18,
                "epochs": 2,
                "log_every": 1,
                "save_every": 3,
                **settings.get("train", {}),
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path, tmp_path / "runs" / name

    return write


def records(folder, split="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def test_two_ranks_train_validate_save_export_and_evaluate(run_file, phantom_shards, repository):
    path, folder = run_file("whole")
    run("imitate_ds.pretrain", "--config", str(path))
    steps = records(folder)
    assert [r["step"] for r in steps] == list(range(1, GOLDEN_STEPS + 1))
    assert {"loss", "image_findings", "views_impression", "gradient_norm", "temperature", "data_wait_share"} <= set(
        steps[0]
    )
    assert "in_batch_accuracy/findings" in steps[0]
    counted = json.loads((folder / "counters.json").read_text())
    assert sum(counted["flops_by_part"].values()) == counted["flops_per_study"]
    assert set(counted["flops_by_part"]) >= {"image_encoder", "findings_branch", "loss"}
    per_rank = steps[-1]["studies_per_second"] * counted["flops_per_study"] / 2e12
    assert steps[-1]["tflops"] == pytest.approx(per_rank)
    assert "mfu" not in steps[-1]  # a CPU has no peak
    assert [memory["optimizer"] > 0 for memory in counted["memory_mib"]] == [True, True]
    shares = {name: share for name, share in steps[-1].items() if name.startswith("time/")}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0
    validated = records(folder, "val")
    assert [r["step"] for r in validated] == [5, 10]
    assert "impression/image_to_text_R@5" in validated[0]
    assert sorted(p.name for p in (folder / "checkpoints").glob("step-*")) == ["step-00000009", "step-00000010"]
    model = load_model(folder / "export")
    assert model.encode_text(["No pleural effusion."]).shape == (1, 32)
    assert any((folder / "tensorboard").iterdir())

    # The same figures from one process, from the exported weights.
    config = load_run_config(folder / "config.yaml")
    alone = validate(OneProcess(model.model), config, [load_index(phantom_shards)])
    assert alone == pytest.approx({k: v for k, v in validated[-1].items() if "R@" in k or k == "loss"})

    results = evaluate_retrieval(folder / "export", phantom_shards, folder)
    assert 0 <= results["metrics"]["impression/image_to_text_R@5"]["value"] <= 1
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "results.json").read_text())["results"][0]["data"]["synthetic"] is True

    # IMITATE_DS_WRITE_GOLDEN=1 writes them anew, after a change that means to change them.
    golden = repository / "tests" / "golden" / "phantom_losses.json"
    losses = [r["loss"] for r in steps]
    if os.environ.get("IMITATE_DS_WRITE_GOLDEN"):
        golden.write_text(json.dumps(losses) + "\n")
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=1e-3)


def test_killed_rank_then_resume_equals_the_undisturbed_run(run_file):
    path, undisturbed = run_file("undisturbed")
    run("imitate_ds.pretrain", "--config", str(path))
    path, folder = run_file("killed")
    ranks = start("imitate_ds.pretrain", "--config", str(path))
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-00000003" / "manifest.json").exists():
        assert time.monotonic() < deadline, "no checkpoint after 200 s"
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGKILL)
    (status, output), _ = finish(ranks)
    assert status != 0, output[-2000:]

    run("imitate_ds.pretrain", "--config", str(path), "--set", "train.resume=true")
    assert [r["step"] for r in records(folder)] == list(range(1, GOLDEN_STEPS + 1))
    for name in ("loss", "gradient_norm"):
        assert [r[name] for r in records(folder)] == [r[name] for r in records(undisturbed)]
    last, expected = records(folder, "val")[-1], records(undisturbed, "val")[-1]
    assert {k: v for k, v in last.items() if "R@" in k} == {k: v for k, v in expected.items() if "R@" in k}


def wait_for_step(folder, step, limit=200):
    deadline = time.monotonic() + limit
    while not (folder / "metrics.jsonl").exists() or not any(r["step"] >= step for r in records(folder)):
        assert time.monotonic() < deadline, f"no step {step} after {limit} s"
        time.sleep(0.02)


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_three_ranks_go_on(run_file):
    """In a model whose steps do not depend on how a batch is cut."""
    steady = {"epochs": 3, "batch_norm": "freeze", "save_every": 100, "eval_every": 0, "global_batch_size": 36}
    settings = ("--set", "model.projection_norm=layer", "--set", "optim.lr=1e-5")
    path, undisturbed = run_file("undisturbed", train=steady)
    run("imitate_ds.pretrain", "--config", str(path), *settings, ranks=1)
    path, folder = run_file("drained", train=steady)
    ranks = start("imitate_ds.pretrain", "--config", str(path), *settings)
    wait_for_step(folder, 2)
    ranks[1].send_signal(signal.SIGUSR1)
    for status, output in finish(ranks):
        assert status == 0, output[-2000:]
    state = read_run_state(folder)
    assert state["state"] == "drained"
    assert state["reason"] == "SIGUSR1 on rank 1"
    assert 2 < state["step"] < 15
    assert [p.name for p in (folder / "checkpoints").glob("step-*")] == [f"step-{state['step']:08d}"]
    assert not (folder / "export").exists()
    assert (folder / "checkpoints").stat().st_mode & 0o077 == 0

    zero_2 = ("--set", "train.resume=true", "--set", "train.deepspeed=zero2", "--set", "train.save_in_background=true")
    run("imitate_ds.pretrain", "--config", str(path), *settings, *zero_2, ranks=3)
    state = read_run_state(folder)
    assert (state["state"], state["step"], state["restarts"], state["ranks"]) == ("finished", 15, 1, 3)
    assert [r["step"] for r in records(folder)] == list(range(1, 16))
    for found, wanted in zip(records(folder), records(undisturbed), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert {"lag_share", "slowest_rank", "skipped_samples", "bad_steps"} <= set(records(folder)[-1])


def test_a_rank_that_hangs_ends_the_run_and_is_named(run_file):
    path, folder = run_file("hanging", train={"timeout_s": 6, "epochs": 100, "eval_every": 0})
    ranks = start("imitate_ds.pretrain", "--config", str(path))
    wait_for_step(folder, 1)
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        output = ranks[0].communicate(timeout=60)[0]
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == STUCK, output[-2000:]
    assert "stuck for" in output
    assert f"rank 1 ({socket.gethostname()}) was last heard of" in output
    (failure,) = (folder / "failures").glob("rank-*.json")
    record = json.loads(failure.read_text())
    assert record["rank"] == 0
    assert record["collectives"]
    assert "stuck for" in record["error"]


def test_two_ranks_in_chunks_equal_one_rank_with_the_whole_batch(run_file):
    """With a learned temperature, in a model whose steps do not depend on how a batch is cut, and whoever makes the views."""
    common = {"epochs": 1, "max_steps": 2, "eval_every": 0, "batch_norm": "freeze"}
    settings = ("--set", "model.projection_norm=layer", "--set", "objective.temperature={learnable: true}")
    path, folder = run_file("chunks", train={**common, "grad_cache_chunk": 6})
    run("imitate_ds.pretrain", "--config", str(path), *settings)
    path, whole = run_file("whole", train={**common, "micro_batch_size": 36}, data={"augment_on": "device"})
    run("imitate_ds.pretrain", "--config", str(path), *settings, ranks=1)
    for found, wanted in zip(records(folder), records(whole), strict=True):
        for name in ("loss", "image_findings", "gradient_norm", "temperature"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4)
    first, second = (step["temperature"] for step in records(folder))
    assert first == pytest.approx(0.07)
    assert len({first, second, load_model(folder / "export").settings["temperature"]}) == 3  # each step teaches it


def refusal(path, *overrides):
    arguments = [part for item in overrides for part in ("--set", item)]
    ((status, output),) = finish(start("imitate_ds.pretrain", "--config", str(path), *arguments, ranks=1))
    assert status == 2, output[-2000:]
    assert "Traceback" not in output
    return output


def test_layer_rates_and_frozen_weights_go_on_as_they_began(run_file, process_group):
    settings = ["model.in_chans=1", "model.freeze=[conv1*, bn1*]", "optim.layer_decay=0.5", "train.max_steps=4"]
    settings += ["train.deepspeed=zero2", "data.val_split="]
    configs, folders = {}, {}
    for name in ("through", "drained"):
        path, folders[name] = run_file(name)
        configs[name] = load_run_config(path, settings)
    pretrain(configs["through"])
    drain = Drain()
    drain.signal = signal.SIGUSR1
    pretrain(configs["drained"], drain)
    assert [r["step"] for r in records(folders["drained"])] == [1, 2]
    resumed = load_run_config(run_file("drained")[0], [*settings, "train.resume=true"])
    pretrain(resumed)
    one, two = ([r["loss"] for r in records(folders[name])] for name in ("through", "drained"))
    assert two == pytest.approx(one, rel=1e-6)

    inputs = open_inputs(resumed, None)
    first, last = build_model(resumed, inputs), load_model(folders["drained"] / "export").model
    moved = {n for n, p in first.named_parameters() if not torch.equal(p, last.get_parameter(n))}
    assert moved == {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    share = rate_share(resumed)
    groups = parameter_groups(first, resumed.optim, share)
    assert {group["rate_share"] for group in groups} == {1.0, 0.5, 0.25, 0.125, 0.0625}  # the stem would have 0.03125
    assert share("image_encoder.backbone.layer4.0.conv1.weight") == 0.5
    assert share("text_projection.layers.0.weight") == 1


def test_refusals_name_key_value_and_what_to_do(run_file, phantom_shards, tmp_path, process_group):
    path, folder = run_file("refused")

    def refused(error, match, *overrides):
        with pytest.raises(error, match=match):
            pretrain(load_run_config(path, list(overrides)))

    refused(FileNotFoundError, "imitate-ds shards build", f"data.shards={tmp_path}/none")
    bare = tmp_path / "bare"
    shutil.copytree(phantom_shards, bare, ignore=shutil.ignore_patterns("text*", "*.safetensors"))
    refused(FileNotFoundError, "imitate-ds shards embed", f"data.shards={bare}")
    refused(ValueError, r"train\.micro_batch_size", "train.micro_batch_size=4096")
    refused(ValueError, r"objective\.backend = 'triton': .*use auto, or strips", "objective.backend=triton")
    refused(ValueError, r"data\.val_split = 'vall'", "data.val_split=vall")
    assert not folder.exists()
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    refused(ValueError, r"train\.resume=true")
    refused(ValueError, "none of the checkpoints", "train.resume=true")


def test_ranks_that_were_given_different_runs_are_refused_alike(run_file, phantom_shards, monkeypatch):
    config = load_run_config(run_file("mixed")[0])
    data = run_identity(config, open_inputs(config, None))

    def check(said_by_the_other):
        monkeypatch.setattr(identity, "gather_objects", lambda mine: [mine, mine, {**mine, **said_by_the_other}])
        identity.check_ranks_agree(config, data)

    check({})
    with pytest.raises(ValueError, match=r"train\.log_every = 7 on rank 2: must be 1, as on rank 0"):
        check({"train.log_every": 7})
    with pytest.raises(ValueError, match="shards = 'x' on rank 2"):
        check({"shards": "x"})


def test_a_run_goes_on_with_the_share_of_the_data_that_it_began_with(run_file):
    path, _ = run_file("share")

    def identity_of(share):
        config = load_run_config(path, [f"data.share={share}"])
        return run_identity(config, open_inputs(config, None))

    half, whole = identity_of(0.5), identity_of(1.0)
    older = {key: value for key, value in whole.items() if key not in identity.ADDED}  # from before there was a choice
    assert older.keys() < whole.keys()
    identity.check_same_run(half, half, Path("step-3"))
    identity.check_same_run(whole, older, Path("step-3"))
    for now, then in ((half, whole), (whole, half), (half, older)):
        with pytest.raises(ValueError, match=r"data\.share = .*: step-3 was made with"):
            identity.check_same_run(now, then, Path("step-3"))


def test_operands_are_settled_before_the_run_begins(run_file):
    config = load_run_config(run_file("operands")[0], ["train.precision=bf16"])
    assert config.objective.operands == "auto"
    assert with_operands(config).objective.operands == "fp32"  # no CUDA here
    asked = load_run_config(run_file("operands")[0], ["objective.operands=fp16"])
    assert with_operands(asked) == asked


def test_one_clear_line_and_status_2(run_file):
    path, folder = run_file("refused")
    assert "did you mean lr?" in refusal(path, "optim.lrr=1")
    assert "is not finite" in refusal(path, "optim.lr=1e30", "optim.warmup_share=0.0", "train.max_bad_steps=1")
    assert not (folder / "checkpoints").exists()
    first, second = sorted((folder / "bad_steps").glob("*.json"))
    record = json.loads(second.read_text())
    assert record["step"] == json.loads(first.read_text())["step"] + 1
    assert len(record["ranks"][0]["keys"]) == 18
    assert record["ranks"][0]["losses"]["loss"] in ("nan", "inf", "-inf")
    assert read_run_state(folder)["state"] == "failed"
    assert "train.max_bad_steps = 1" in read_run_state(folder)["reason"]
    assert read_run_state(folder)["status"] == 2

    command = [str(Path(sys.executable).with_name("imitate-ds")), "replay", str(folder), "--step"]
    again = subprocess.run([*command, str(record["step"])], capture_output=True, text=True, check=True).stdout
    assert f"step {record['step']}, 18 studies" in again
    assert set(record["ranks"][0]["keys"]) <= set(again.split())
    assert "gradient norm nan" in again or "gradient norm inf" in again
    assert "as computed: image_encoder" in again
    refused = subprocess.run([*command, "7"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"has the weights of steps {record['step']}" in refused.stderr


def test_resume_refuses_another_run(run_file):
    path, folder = run_file("first", train={"epochs": 1, "eval_every": 0})
    run("imitate_ds.pretrain", "--config", str(path), ranks=1)
    before = (folder / "config.yaml").read_text()
    assert "optim.lr = 0.5" in refusal(path, "train.resume=true", "optim.lr=0.5")
    assert "train.epochs = 3" in refusal(path, "train.resume=true", "train.epochs=3")
    assert (folder / "config.yaml").read_text() == before  # a refused resume changes nothing
