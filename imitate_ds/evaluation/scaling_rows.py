"""What each run of a scaling sweep has come to, read from the files in its folder: a row of scaling.csv."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imitate_ds.evaluation.report import RECORDS, load_results, training_records

COUNTERS, COUNTERS_FORMAT = "counters.json", "imitate_ds.counters/1"
LAST_SHARE = 0.1  # of the steps of a run, over whose logged losses its training loss is averaged
PROBE_FIGURE = "100%/auroc_macro"


class Planned(NamedTuple):
    """The place of a run in the sweep, and its length."""

    encoder: str
    batch: int  # studies a step, on all ranks together
    negatives: str
    share: float  # of the training patients
    budget: int  # studies that it was to see; 0: its epochs decide
    seed: int
    train_studies: int  # different ones
    steps: int


class ScalingRow(NamedTuple):
    """None where a run does not say, or not yet."""

    run: str
    encoder: str
    batch: int
    negatives: str
    share: float
    budget: int
    seed: int
    state: str  # of state.json; "not begun"
    reason: str
    train_studies: int
    planned_steps: int
    steps: int
    studies_seen: int
    parameters: int | None
    trainable_parameters: int | None
    flops_per_study: float | None  # forward and backward
    flops: float | None  # of all studies seen
    val_loss: float | None  # between images and texts (validation.image_text_loss)
    train_loss: float | None  # all terms, mean over the last LAST_SHARE of the steps
    auroc: float | None  # of the linear probe, mean of labels
    auroc_low: float | None
    auroc_high: float | None
    studies_per_second: float | None  # median of what was logged, all ranks together
    tflops: float | None  # of a device, per second
    mfu: float | None  # that as a share of the device's peak; None where it has none
    ranks: int | None
    device: str
    precision: str

    @property
    def finished(self) -> bool:
        return self.state == "finished"


def read_row(
    planned: Planned, folder: Path, state: Mapping[str, Any], splits: tuple[str, str] | None = None
) -> ScalingRow:
    """state: of state.json, empty where there is none. splits: that the probe scores, and that it is fitted on; None: no probe.

    Raises ValueError for a counters.json of another format.
    """
    records = training_records(folder / RECORDS)
    counters = read_counters(folder / COUNTERS)
    probe = (splits and probe_figure(folder, splits)) or {}
    steps, ranks = state.get("step", 0), state.get("ranks")
    seen = steps * planned.batch
    cost, peak = counters.get("flops_per_study"), counters.get("peak_flops")
    speed = _median(
        [record["studies_per_second"] for record in _of(records, "train") if "studies_per_second" in record]
    )
    each = cost * speed / ranks if cost and speed and ranks else None
    return ScalingRow(
        run=folder.name,
        encoder=planned.encoder,
        batch=planned.batch,
        negatives=planned.negatives,
        share=planned.share,
        budget=planned.budget,
        seed=planned.seed,
        state=state.get("state", "not begun"),
        reason=state.get("reason", ""),
        train_studies=planned.train_studies,
        planned_steps=planned.steps,
        steps=steps,
        studies_seen=seen,
        parameters=counters.get("parameters"),
        trainable_parameters=counters.get("trainable_parameters"),
        flops_per_study=cost,
        flops=cost * seen if cost else None,
        val_loss=next((record["loss"] for record in reversed(_of(records, "val")) if "loss" in record), None),
        train_loss=_last_loss(_of(records, "train")),
        auroc=probe.get("value"),
        auroc_low=probe.get("low"),
        auroc_high=probe.get("high"),
        studies_per_second=speed,
        tflops=each / 1e12 if each else None,
        mfu=each / peak if each and peak else None,
        ranks=ranks,
        device=counters.get("device", ""),
        precision=counters.get("precision", ""),
    )


def read_counters(path: Path) -> dict[str, Any]:
    """What a step of the run costs; empty where it does not say."""
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format") != COUNTERS_FORMAT:
        raise ValueError(f"{path}: format = {values.get('format')!r}: must be {COUNTERS_FORMAT!r}; train the run again")
    return values


def probe_figure(folder: Path, splits: tuple[str, str]) -> dict[str, Any] | None:
    """Of all training labels; None where the run was not probed, or on other splits than those that are scored and fitted on."""
    probe = next((one for one in load_results(folder) if one["task"] == "probe"), None)
    if probe is None or (probe["data"].get("split"), probe["settings"].get("train_split")) != splits:
        return None
    return probe["metrics"].get(PROBE_FIGURE)


def _of(records: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [record for record in records if record["split"] == split]


def _last_loss(records: list[dict[str, Any]]) -> float | None:
    if not records:
        return None
    first = records[-1]["step"] * (1 - LAST_SHARE)
    losses = [record["loss"] for record in records if record["step"] >= first and "loss" in record]
    return sum(losses) / len(losses) if losses else None


def _median(values: list[float]) -> float | None:
    """The first is of a step that also sets things up, where there are others."""
    values = sorted(values[1:] or values)
    return values[len(values) // 2] if values else None
