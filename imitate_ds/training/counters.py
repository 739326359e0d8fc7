"""What a step costs: its floating-point operations, told in counters.json, and what share of the device that makes.

Model FLOPs, as in "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022, appendix B): forward and backward,
matrix products and convolutions, once each: not again what checkpointing or GradCache computes again, and not the optimizer.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imitate_ds.devices import Precision, find_device
from imitate_ds.distributed import training_device, world
from imitate_ds.training.flops import Flops, count_flops
from imitate_ds.training.loop import StepOutput

COUNTERS = "counters.json"
FORMAT = "imitate_ds.counters/1"


class Counters:
    """Counts the first step that a process takes. loss_flops: of a study, which by_part does not see (objective.loss_flops)."""

    def __init__(self, run_dir: Path, engine: Any, precision: Precision, loss_flops: float):
        self.path, self.engine, self.precision, self.loss_flops = run_dir / COUNTERS, engine, precision, loss_flops
        self.device, self.peak = device_name(), peak_flops(precision)
        self.flops_by_part: dict[str, float] = {}
        self._told = False

    @property
    def flops_per_study(self) -> float:
        return sum(self.flops_by_part.values())

    def around(self, step_fn: Callable[[Any], StepOutput]) -> Callable[[Any], StepOutput]:
        """The same step, the first of which is counted."""

        def step(batch: Any) -> StepOutput:
            if self.flops_by_part:
                return step_fn(batch)
            with count_flops(self.engine.module) as flops:
                output = step_fn(batch)
            self._note(flops, len(batch.keys))
            return output

        return step

    def rates(self, studies_per_second: float) -> dict[str, float]:
        """What a rank does of it, to be logged; at the first call rank 0 writes counters.json."""
        if not self._told and world().is_main:
            self.path.write_text(json.dumps(self._record(), indent=1) + "\n")
        self._told = True
        per_rank = self.flops_per_study * studies_per_second / world().size
        return {"tflops": per_rank / 1e12} | ({"mfu": per_rank / self.peak} if self.peak else {})

    def _note(self, flops: Flops, studies: int) -> None:
        self.flops_by_part = {part: count / studies for part, count in flops.by_part.items()}
        self.flops_by_part["loss"] = self.loss_flops
        self.again = flops.again / studies

    def _record(self) -> dict[str, Any]:
        parameters, trainable = parameter_counts(self.engine.module)
        return {
            "format": FORMAT,
            "flops_per_study": self.flops_per_study,
            "flops_by_part": self.flops_by_part,
            "recomputed_flops_per_study": self.again,
            "parameters": parameters,
            "trainable_parameters": trainable,
            "device": self.device,
            "precision": self.precision,
            "peak_flops": self.peak,
        }


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Of the whole model, and of what trains; ZeRO-3 leaves none of it in a parameter's shape."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trains in counts if trains)


def device_name() -> str:
    device = training_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(precision: Precision) -> float | None:
    """Of one device, by its data sheet; None where it has none, as a CPU."""
    device = find_device(device_name())
    return device.tflops[precision] * 1e12 if device and precision in device.tflops else None
