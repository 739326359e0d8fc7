"""One step of a real run again (of a bad step, by the command: test_pretrain.py)."""

import json

import pytest
from torch._dynamo.utils import counters as of_the_compiler

from imitate_ds.config import build_run_config
from imitate_ds.pretrain import pretrain
from imitate_ds.replay import replay
from tests.tiny_model import TINY_MODEL


def test_a_step_of_a_compiled_run_again_uncompiled(process_group, tmp_path, phantom_shards):
    config = build_run_config(
        {
            "name": "run",
            "output_dir": str(tmp_path),
            "data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0, "val_split": ""},
            "model": TINY_MODEL,
            "train": {"micro_batch_size": 8, "max_steps": 2, "save_every": 1, "log_every": 1},
        }
    )
    pretrain(config)
    file = config.run_dir / "config.yaml"
    file.write_text(file.read_text().replace("compile: []", "compile: [projections]"))
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")}
    of_the_compiler.clear()
    again = replay(config.run_dir, 1)
    assert again.uncompiled == ("projections",)
    assert not of_the_compiler
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert again.losses["loss"] == pytest.approx(lines[1]["loss"], rel=1e-6)
    assert again.gradient_norm == pytest.approx(lines[1]["gradient_norm"], rel=1e-6)
    assert not again.outputs + again.gradients
    assert {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")} == before
