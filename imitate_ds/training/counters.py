"""What a step costs: its floating-point operations and its memory by kind, told in counters.json.

Model FLOPs, as in "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022, appendix B): forward and backward,
matrix products and convolutions, once each: not again what checkpointing or GradCache computes again, and not the optimizer.
They are of one batch, the first, by study over all ranks; where a text encoder learns, others have longer or shorter texts.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imitate_ds.devices import Precision, find_device
from imitate_ds.distributed import gather_objects, training_device, world
from imitate_ds.training.flops import count_flops
from imitate_ds.training.held_memory import count_saved, held_bytes
from imitate_ds.training.loop import StepOutput

COUNTERS = "counters.json"
FORMAT = "imitate_ds.counters/1"


class Counters:
    """Counts the first step that a process takes. It runs uncompiled for that: where train.compile is set, later steps may keep
    less than what is told as activations.

    loss_flops: of a study, outside the modules of the model.
    """

    def __init__(self, run_dir: Path, engine: Any, precision: Precision, loss_flops: float):
        self.run_dir, self.engine, self.loss_flops = run_dir, engine, loss_flops
        self.precision: Precision = precision
        self.peak: float | None = None  # once a step was counted
        self.flops_by_part: dict[str, float] = {}
        self.again = 0.0
        self.memory: dict[str, float] = {}  # of this rank, MiB
        self._steps = 0
        self._told = False

    @property
    def flops_per_study(self) -> float:
        return sum(self.flops_by_part.values())

    def around(self, step_fn: Callable[[Any], StepOutput]) -> Callable[[Any], StepOutput]:
        """The same step, the first of which is counted, a collective."""

        def step(batch: Any) -> StepOutput:
            self._steps += 1
            if self._steps == 1:
                return self._counted(step_fn, batch)
            if self._steps == 2 and training_device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # of a step without the optimizer's state, and uncompiled
            return step_fn(batch)

        return step

    def rates(self, studies_per_second: float) -> dict[str, float]:
        """What is logged of it. The first call, a collective, adds the memory and writes counters.json; so do those that follow
        it until a step was applied after the counted one.
        """
        found = self.speed(studies_per_second)
        if self._told:
            return found
        self._told = self._steps > 1 and bool(self.engine.optimizer.state)  # which it makes in the first step applied
        record = self.record()
        if world().is_main:
            (self.run_dir / COUNTERS).write_text(json.dumps(record, indent=1) + "\n")
        return found | {f"memory_mib/{kind}": mib for kind, mib in self.memory.items()}

    def speed(self, studies_per_second: float) -> dict[str, float]:
        """Of one rank: its model FLOPs a second, and their share of its device's peak where that is known."""
        flops = self.flops_per_study * studies_per_second / world().size
        return {"tflops": flops / 1e12} | ({"mfu": flops / self.peak} if self.peak else {})

    def record(self) -> dict[str, Any]:
        """What counters.json holds. A collective."""
        self._weigh()
        parameters, trainable = parameter_counts(self.engine.module)
        return {
            "format": FORMAT,
            "flops_per_study": self.flops_per_study,
            "flops_by_part": self.flops_by_part,
            "recomputed_flops_per_study": self.again,
            "parameters": parameters,
            "trainable_parameters": trainable,
            "device": device_name(),
            "precision": self.precision,
            "peak_flops": self.peak,
            "memory_mib": gather_objects(self.memory),
        }

    def _counted(self, step_fn: Callable[[Any], StepOutput], batch: Any) -> StepOutput:
        model = self.engine.module
        with count_flops(model) as flops, count_saved(model) as saved:
            output = step_fn(batch)
        ranks = gather_objects((len(batch.keys), flops))
        studies = sum(rows for rows, _ in ranks)
        by_part = sum((Counter(found.by_part) for _, found in ranks), Counter())
        self.flops_by_part = {part: count / studies for part, count in by_part.items()} | {"loss": self.loss_flops}
        self.again = sum(found.again for _, found in ranks) / studies
        convolutions = sum(found.convolutions for _, found in ranks) / studies
        self.peak = peak_flops(self.precision, convolutions / self.flops_per_study)
        gradients = held_bytes(self.engine, training_device())["gradients"]  # now: the optimizer lets go of them
        self.memory = {kind: _mib(saved.most[kind]) for kind in ("activations", "loss")} | {
            "gradients": _mib(gradients)
        }
        return output

    def _weigh(self) -> None:
        """What stays between steps, and on CUDA the peak of all since the second step began."""
        held = held_bytes(self.engine, training_device())
        self.memory |= {kind: _mib(held[kind]) for kind in held if kind != "gradients"}
        if training_device().type == "cuda":
            self.memory["peak"] = _mib(torch.cuda.max_memory_allocated())


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Of the whole model, and of what trains; ZeRO-3 leaves none of it in a parameter's shape."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trains in counts if trains)


def device_name() -> str:
    device = training_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(precision: Precision, convolved: float) -> float | None:
    """Of one device, by its data sheet, at this share of convolutions; None where it has none, as a CPU."""
    device = find_device(device_name())
    return device.peak(precision, convolved) if device else None


def _mib(count: float) -> float:
    return round(count / 2**20, 3)
