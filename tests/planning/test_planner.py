"""From a run file to a choice, with its reasons."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imitate_ds.cli import app
from imitate_ds.config import TextConfig, build_run_config, load_run_config
from imitate_ds.devices import DEVICES
from imitate_ds.planning.assumptions import GIB, UNSEEN, Machine, gpu_machine
from imitate_ds.planning.planner import Plan, make_plan, outlook
from imitate_ds.planning.report import plan_values
from tests.tiny_bert import save_tiny_bert, tiny_bert


def config_of(shards: Path | str = "nowhere", **train):
    return build_run_config(
        {
            "name": "small",
            "data": {"shards": str(shards), "input_size": 32},
            "model": {"image_encoder": "test_resnet", "joint_dim": 16, "text_hidden": 16, "aggregation": {"pool": 4}},
            "train": {"micro_batch_size": 16, "epochs": 3, **train},
        }
    )


def machine_of(config, *, memory_gib: float = 80, ranks: int = 2) -> Machine:
    here = gpu_machine("h100-80", DEVICES["h100-80"], config.train, nodes=1, per_node=ranks)
    return here._replace(memory=memory_gib * GIB)


def plan_of(
    config, *, memory_gib: float = 80, studies: int | None = 3200, stages: tuple[str, ...] = ("zero0", "zero1")
) -> Plan:
    return make_plan(config, machine_of(config, memory_gib=memory_gib), studies=studies, stages=stages)


def test_where_everything_fits_nothing_is_chunked() -> None:
    found = plan_of(config_of())
    assert (found.choice.chunk, found.subject.studies) == (0, 16)
    assert found.choice.largest > 1000
    assert f"train.deepspeed={found.choice.stage.name}" in found.settings
    assert {"train.grad_cache_chunk=0", "train.micro_batch_size=16"} <= set(found.settings)
    assert "would be the most" in found.why
    json.dumps(plan_values(found))


def test_steps_and_days_come_from_studies() -> None:
    found = plan_of(config_of(), studies=3200)
    assert found.subject.data.total_steps == 3 * 3200 // 32
    days = outlook(found).days
    assert days == pytest.approx(300 * found.choice.times["likely"].total / 86400)
    assert outlook(plan_of(config_of(), studies=None)).days is None
    with pytest.raises(ValueError, match=r"--studies 31: fewer than one global batch of 32"):
        plan_of(config_of(), studies=31)


def test_the_index_of_shards_that_are_here_is_read(phantom_shards: Path) -> None:
    found = plan_of(config_of(phantom_shards), studies=None)
    assert (found.subject.data.studies, found.subject.data.text_width) == (182, 32)
    assert found.subject.data.steps_per_epoch == 182 // 32
    assert "index" in found.subject.data.source
    with pytest.raises(ValueError, match=r"--studies 9: the index of .* says how many there are; leave it out"):
        plan_of(config_of(phantom_shards), studies=9)


def test_a_text_encoder_in_the_step_is_planned_with_it(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert", ["clear"], positions=256)
    text = {"mode": "online", "encoder": str(folder), "trainable_layers": 1}
    cached, online = (
        plan_of(config_of().model_copy(update={"text": settings})) for settings in (TextConfig(), TextConfig(**text))
    )
    assert "The text encoder in the step" not in cached.why
    assert f"The text encoder in the step: {folder}; 112 tokens in a report assumed." in online.why
    layer = sum(parameter.numel() for parameter in tiny_bert(1).encoder.layer[1].parameters())
    wider = 16 * (32 - 768)  # its texts are 32 wide, those of no shards 768
    assert online.subject.size.trained == cached.subject.size.trained + layer + wider
    assert online.choice.placed.kinds["activations"] > cached.choice.placed.kinds["activations"]
    assert online.choice.times["likely"].total > cached.choice.times["likely"].total


def test_what_does_not_fit_is_chunked_or_refused() -> None:
    config = config_of(micro_batch_size=4096)
    stages = ("zero0",)
    whole = make_plan(config, machine_of(config), studies=None, stages=stages).choice
    least = whole.placed.kinds["framework overhead"] + GIB  # of the cautious end
    tight = machine_of(config, memory_gib=(least + whole.placed.kinds["activations"] / 2) / GIB)
    found = make_plan(config, tight, studies=None, stages=stages)
    assert found.choice.chunk >= 2
    assert 4096 % found.choice.chunk == 0
    assert UNSEEN * found.choice.placed.total <= tight.memory
    assert f"train.grad_cache_chunk={found.choice.chunk}" in found.settings
    assert found.choice.times["likely"].recomputed > 0
    with pytest.raises(
        ValueError, match=r"train\.micro_batch_size = 4096: cannot be made to fit the 1 GiB of a h100-80"
    ):
        make_plan(config, tight._replace(memory=GIB), studies=None, stages=stages)


def test_combinations_that_the_engine_refuses_are_not_chosen() -> None:
    found = plan_of(config_of(precision="fp16"), stages=("zero0", "zero1", "zero2"))
    assert found.choice.stage.name == "zero0"
    assert "fp16" in found.options[1].refused
    assert "ZeRO-1 cannot run this" in found.why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0, "per_node": 8}, r"--nodes 0: must be greater than 0"),
        ({"nodes": 1, "per_node": 0}, r"--gpus-per-node 0: must be greater than 0"),
        ({"nodes": 1, "per_node": 1, "interconnect": 0}, r"--interconnect 0: must be greater than 0"),
    ],
)
def test_machines_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_machine("h100-80", DEVICES["h100-80"], config_of().train, **options)


def test_float32_is_planned_at_the_peaks_that_torch_takes_unasked() -> None:
    rates = machine_of(config_of(precision="fp32")).rates["likely"]
    assert (rates.matmul, rates.convolution) == (pytest.approx(0.55 * 66.9e12), pytest.approx(0.40 * 494.7e12))


def test_a_device_without_the_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.precision = 'bf16': v100-16 has no bf16"):
        gpu_machine("v100-16", DEVICES["v100-16"], config_of(precision="bf16").train, nodes=1, per_node=1)


def test_the_command_plans_a_run_file_that_ships_without_data_or_gpu(repository: Path, tmp_path: Path) -> None:
    size = ("--nodes", "2", "--gpus-per-node", "8", "--studies", "213384", "--json", str(tmp_path / "plan.json"))
    run_file = str(repository / "launch/runs/mimic_resnet50.yaml")
    done = CliRunner().invoke(app, ["plan", "--config", run_file, "--gpu", "h100-80", *size], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    for text in ("2 x 8 h100-80", "activations", "studies/s", "2,080 steps", "kWh", "assumptions"):
        assert text in said, text
    last = done.stdout.splitlines()[-2]  # to be copied as it is, on a narrow terminal too
    assert re.fullmatch(
        r"--set train\.deepspeed=\w+ --set train\.grad_cache_chunk=\d+ --set train\.micro_batch_size=128", last
    )
    values = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["name"] for stage in values["stages"]][:4] == ["zero0", "zero1", "zero2", "zero3"]
    assert values["stages"][0]["memory"]["activations"] == pytest.approx(12.9e9, rel=0.02)  # 256 images of 224 pixels
    assert all(constant["source"] for constant in values["constants"].values())


def test_a_run_file_without_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: no_shards\n")
    with pytest.raises(ValueError, match=r"data: must be given; add it to the run file"):
        load_run_config(tmp_path / "run.yaml")
