"""Optimizer states on a disk (ZeRO-Infinity): the same training, and checkpoints that hold all of it."""

import json
from pathlib import Path

import pytest

from imitate_ds.training.engine import KERNELS
from tests.launching import run

LOAD = "import imitate_ds.training.engine, deepspeed; deepspeed.ops.op_builder.AsyncIOBuilder().load()"


def train(deepspeed: str, folder: Path, monkeypatch) -> dict:
    folder.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(KERNELS))  # which depends on the next one
    monkeypatch.setenv("TMPDIR", str(folder))
    run("tests.training.nvme_worker", deepspeed, str(folder / "checkpoints"))
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.skipif(
    not (KERNELS / "async_io" / "async_io.so").is_file(),
    reason=f"takes minutes to compile; do it once: DS_ACCELERATOR=cpu python -c '{LOAD}'",
)
def test_training_and_going_on_equal_zero_3_in_memory(tmp_path, monkeypatch):
    in_memory = train("zero3", tmp_path / "memory", monkeypatch)
    on_disk = train("zero3_nvme", tmp_path / "disk", monkeypatch)
    assert on_disk["losses"] == pytest.approx(in_memory["losses"], rel=1e-6)
    assert on_disk["went on"] == on_disk["losses"]
    assert {"exp_avg", "exp_avg_sq"} <= set(on_disk["on disk"])
    assert not in_memory["on disk"]
    assert not list((tmp_path / "disk").glob("imitate_ds-*"))
