"""What a run writes down, read back with TensorBoard's own reader."""

import io
import json

import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from imitate_ds.training.monitor import Monitor


def monitor(folder, start=0, total=10):
    return Monitor(folder, start_step=start, total_steps=total, speaks=True, console=Console(file=io.StringIO()))


def events(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_curves_do_not_double_after_a_resume(tmp_path):
    first = monitor(tmp_path)
    for step in range(1, 8):
        first.scalars(step, {"loss": float(step)}, split="train")
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "spl')  # killed in mid-line
    again = monitor(tmp_path, start=5)
    for step in range(6, 11):
        again.scalars(step, {"loss": float(step)}, split="train")
    again.close()
    assert [e.step for e in events(tmp_path).Scalars("train/loss")] == list(range(1, 11))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_pictures_and_hyperparameters(tmp_path):
    one = monitor(tmp_path)
    one.pictures(1, {"views": torch.zeros(1, 8, 8, dtype=torch.uint8)})
    one.hyperparameters({"optim.lr": 0.1, "model.aggregation.keep": [1, 2]}, {"R@5": 0.5})
    one.close()
    read = events(tmp_path)
    assert read.Tags()["images"] == ["views"]
    assert read.Scalars("final/R@5")[0].value == 0.5
    assert "_hparams_/session_start_info" in read.PluginTagToContent("hparams")


def test_a_rank_without_a_voice_writes_nothing(tmp_path):
    silent = Monitor(tmp_path / "run", start_step=0, total_steps=1, speaks=False)
    silent.scalars(1, {"loss": 1.0}, split="train")
    silent.progress(1, {"loss": 1.0})
    silent.pictures(1, {})
    silent.hyperparameters({}, {})
    silent.close()
    assert not (tmp_path / "run").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    console = Console(file=io.StringIO())
    one = Monitor(tmp_path, start_step=0, total_steps=10, speaks=True, console=console)
    one.progress(5, {"loss": 1.25})
    one.close()
    assert "step 5/10  loss 1.25" in console.file.getvalue()  # type: ignore[attr-defined]
