"""What a run tells of itself: TensorBoard, metrics.jsonl, a progress bar. Only rank 0 has one that speaks.

Numbers and pictures of augmented views only: never report text, never a patient id.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


class Monitor:
    """Writes scalars and pictures of one run; on ranks other than 0 every method does nothing."""

    def __init__(
        self, run_dir: Path, *, start_step: int, total_steps: int, speaks: bool, console: Console | None = None
    ):
        self.speaks = speaks
        if not speaks:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self.console = console or Console()
        # purge_step: what a killed run wrote beyond its last checkpoint must not stand in the curves twice.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        records = run_dir / "metrics.jsonl"
        _drop_lines_after(records, start_step)
        self.lines = records.open("a")
        self.total_steps = total_steps
        self.started = time.monotonic()
        self.first_step = start_step
        self.bar = _progress_bar(self.console) if self.console.is_terminal else None
        if self.bar:
            self.task = self.bar.add_task("train", total=total_steps, completed=start_step, what="")
            self.bar.start()

    def say(self, text: str) -> None:
        if self.speaks:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, step: int, text: str) -> None:
        """Something that a person should look at: on the console, and on TensorBoard's text page."""
        if self.speaks:
            self.say(f"step {step}: WARNING: {text}")
            self.writer.add_text("warnings", text, step)

    def scalars(self, step: int, values: Mapping[str, float], *, split: str) -> None:
        """Write numbers of one step, to TensorBoard as split/name and to metrics.jsonl."""
        if not self.speaks:
            return
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.lines.write(json.dumps({"step": step, "split": split, "time": round(time.time(), 3), **finite}) + "\n")
        self.lines.flush()

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Images [3 or 1, H, W], uint8 or float in [0, 1], by name."""
        if self.speaks:
            for name, image in images.items():
                self.writer.add_image(name, image, step)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Show where the run stands after `step` steps."""
        if not self.speaks:
            return
        what = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar:
            self.bar.update(self.task, completed=step, what=what)
            return
        rate = (time.monotonic() - self.started) / max(1, step - self.first_step)
        left = rate * (self.total_steps - step)
        self.say(f"step {step}/{self.total_steps}  {what}  left {left / 60:.1f} min")

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """TensorBoard's hparams page: the run file's settings with the final metrics."""
        if self.speaks:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
            for summary in hparams(plain, {f"final/{name}": value for name, value in metrics.items()}):
                assert self.writer.file_writer is not None
                self.writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                self.writer.add_scalar(f"final/{name}", value, self.total_steps)

    def close(self) -> None:
        if self.speaks:
            if self.bar:
                self.bar.stop()
            self.writer.close()
            self.lines.close()


def memory_mib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, MiB: of the device, and of the host."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    if device.type == "cuda":
        return {"device_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20, "host_memory_mib": host}
    return {"host_memory_mib": host}


def _progress_bar(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the records of steps that a resumed run is about to do again, and a line torn by a kill."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (done := _step_of(line)) is not None and done <= step]
    path.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return None
