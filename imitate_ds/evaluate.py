"""Evaluation, an entrance: what an exported model can do on the samples of a split it was not trained on.

Two protocols. `strict`, the default: by patient, duplicate texts are one candidate of recall, and the split the model was
trained on is refused. `reference`: as papers did, to compare with papers. Every figure has a 95 % interval by bootstrap
over patients.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from imitate_ds.data.shard_index import file_sha256
from imitate_ds.data.shards import ShardIndex, load_index
from imitate_ds.evaluation.embedded import (
    SplitRecords,
    TextEmbeddings,
    duplicate_groups,
    embed_radiographs,
    embed_reports,
    read_split,
)
from imitate_ds.evaluation.grounding import REFERENCE, ask_for, point, pointing_figures, read_boxes, usual_levels
from imitate_ds.evaluation.label_figures import auroc_figures, roc_curves
from imitate_ds.evaluation.probe import fit_probe
from imitate_ds.evaluation.prompt_file import load_prompts
from imitate_ds.evaluation.prompts import prompt_checksums
from imitate_ds.evaluation.report import open_out, write_result
from imitate_ds.evaluation.retrieval import Pairs, balanced_places, score_pairs
from imitate_ds.evaluation.zero_shot import score_zero_shot
from imitate_ds.hub import WEIGHTS, ImageEmbeddings, PretrainedImitate, Section, load_model
from imitate_ds.metrics import DRAWS, SEED, Figures, Ties

Protocol = Literal["strict", "reference"]

LEVELS = ("impression", "findings", "report")
SHARES = {"1%": 0.01, "10%": 0.1, "100%": 1.0}  # of the training labels
TIES = {"against": "count against the query", "index": "broken by index order"}
PROBE_SEEDS = {"strict": (0, 1, 2, 3, 4), "reference": (42,)}


class Task(NamedTuple):
    """What every task starts from."""

    model: PretrainedImitate
    records: SplitRecords
    images: ImageEmbeddings


def evaluate_retrieval(
    model: Path,
    shards: Path,
    out: Path,
    split: str = "val",
    protocol: Protocol = "strict",
    *,
    classes: Sequence[str] = (),
    per_class: int = 0,
) -> dict[str, Any]:
    """Image to report and back: R@k by pair and P@k by label, at the levels impression, findings and report.

    R@k: `strict` takes each distinct text once, and ties count against the query; `reference` takes all texts, counts
    the exact pair only, and breaks ties by index order. P@k: duplicate texts stay separate candidates in both. Beside
    each figure stand `chance`, a random order, and `blind`, the best answer that is the same for every query.

    classes, per_class: only so many studies of each of these labels, that have this one and no other, as in CheXpert
    5x200; chosen at each level from the studies that have its text. P@k is then by these classes alone.
    """
    if bool(classes) != (per_class > 0):
        raise ValueError("--classes and --per-class go together, as in --per-class 200 --classes Atelectasis,Edema")
    pretrained, records = _open_split(model, shards, out, split, protocol)
    task = _seen(pretrained, records.with_labels(classes) if classes else records)
    ties: Ties = "index" if protocol == "reference" else "against"
    texts = embed_reports(task.model, task.records)
    metrics: Figures = {}
    curves: dict[str, Any] = {}
    left_out: list[str] = []
    for level in LEVELS:
        pairs = _level(level, task, texts, per_class)
        if len(np.unique(pairs.groups)) < 2:
            left_out.append(level)
            continue
        if protocol == "reference":
            pairs = pairs._replace(groups=np.arange(len(pairs.groups)))
        figures, recalls = score_pairs(pairs, ties)
        metrics |= {f"{level}/{name}": value for name, value in figures.items()}
        curves |= {f"{level}/{name}": curve for name, curve in recalls.items()}
    if not metrics:
        raise ValueError(f"split = {split!r}: {shards} has no level with two different texts; nothing can be retrieved")
    settings = {"levels_left_out": left_out, "ties": TIES[ties], "classes": list(classes), "per_class": per_class}
    return _write("retrieval", out, protocol, task.model, task.records, metrics, settings, curves)


def evaluate_zero_shot(
    model: Path,
    shards: Path,
    out: Path,
    split: str = "val",
    protocol: Protocol = "strict",
    *,
    prompts: str = "",
    branch: Section = "impression",
) -> dict[str, Any]:
    """Prompted classification: AUROC, average precision, F1 and accuracy per label and macro; of classes, accuracy too.

    prompts: a file of them, or the name of one that ships; all labels that ship unless given. An image's score depends
    on no other image, nothing is standardised over the batch, and no threshold is chosen on what is scored, so both
    protocols give the same figures here.
    """
    file = load_prompts(prompts) if prompts else None
    task = _open(model, shards, out, split, protocol)
    _require_labels(task.records)
    scored = score_zero_shot(task.model, task.records, task.images, file, branch)
    return _write("zero-shot", out, protocol, task.model, task.records, *scored)


def evaluate_probe(
    model: Path, shards: Path, out: Path, split: str = "val", protocol: Protocol = "strict", train_split: str = "train"
) -> dict[str, Any]:
    """Logistic regression on frozen pooled features at 1, 10 and 100 % of the labels: AUROC per label and macro.

    `strict` draws patients, five times for the smaller shares (mean and standard deviation over the draws), and refuses
    a patient on both sides. `reference` draws images, once, with seed 42; the probe is the same logistic regression, not
    the layer that the published program trains with AdamW.
    """
    task = _open(model, shards, out, split, protocol)
    _require_labels(task.records)
    train = read_split(task.records.index, train_split)
    shared = len(np.intersect1d(train.patients, task.records.patients))
    if shared and protocol == "strict":
        raise ValueError(
            f"split = {split!r}: {shared} of its patients are in {train_split!r} too; build shards that split by patient, "
            "or ask for --protocol reference"
        )
    features = embed_radiographs(task.model, train, workers=_workers()).pooled.numpy()
    scored = task.images.pooled.numpy()
    units = train.patients if protocol == "strict" else np.array(train.keys)
    metrics: Figures = {}
    settings: dict[str, Any] = {"train_split": train_split, "shared_patients": shared, "shares": {}}
    curves: dict[str, Any] = {}
    for name, share in SHARES.items():
        seeds = PROBE_SEEDS[protocol] if share < 1 else PROBE_SEEDS[protocol][:1]
        fits = [fit_probe(features, train.labels, units, scored, share=share, seed=seed) for seed in seeds]
        figures = auroc_figures(task.records, [fit.scores for fit in fits])
        metrics |= {f"{name}/{key}": figure for key, figure in figures.items()}
        settings["shares"][name] = {
            "seeds": list(seeds),
            "C": [fit.strength for fit in fits],
            "samples": [fit.samples for fit in fits],
            "labels_with_one_value": [[train.index.labels[i] for i in fit.untrained] for fit in fits],
        }
        if share == 1:
            curves = roc_curves(task.records, fits[0].scores)
    return _write("probe", out, protocol, task.model, task.records, metrics, settings, curves)


def evaluate_grounding(
    model: Path,
    shards: Path,
    out: Path,
    split: str = "val",
    protocol: Protocol = "strict",
    *,
    prompts: str = "",
    branch: Section = "impression",
    reference_split: str = "train",
    pictures: bool = False,
) -> dict[str, Any]:
    """The pointing game by label, over samples with boxes: does the most telling pixel for the label lie in one of them?

    reference_split: whose first radiographs say what is usual; nothing but their pixels is used. pictures: also an
    overlay of each sample in out/grounding/, which is patient data. Both protocols give the same figures.
    """
    file = load_prompts(prompts) if prompts else None
    pretrained, records = _open_split(model, shards, out, split, protocol)
    records.index.of_split(reference_split)  # it is there, before the work
    boxes = read_boxes(records)
    words = ask_for(boxes, file, branch)
    usual = usual_levels(pretrained, records.index, reference_split, _workers())
    folder = Path(out) / "grounding" if pictures else None
    if folder:
        folder.mkdir(mode=0o700, exist_ok=True)
    pointing = point(pretrained, records, boxes, words, branch, usual, workers=_workers(), pictures=folder)
    settings = {
        "branch": branch,
        "prompts": words,
        "prompt_files": prompt_checksums(file),
        "labels_without_prompt": sorted({label for sample in boxes for label in sample} - set(words)),
        "usual": f"mean features over the first {REFERENCE} radiographs of split {reference_split}",
    }
    metrics = pointing_figures(pointing, records.patients)
    return _write("grounding", out, protocol, pretrained, records, metrics, settings, {})


def _open(model: Path, shards: Path, out: Path, split: str, protocol: str) -> Task:
    return _seen(*_open_split(model, shards, out, split, protocol))


def _seen(model: PretrainedImitate, records: SplitRecords) -> Task:
    return Task(model, records, embed_radiographs(model, records, workers=_workers()))


def _open_split(
    model: Path, shards: Path, out: Path, split: str, protocol: str
) -> tuple[PretrainedImitate, SplitRecords]:
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol = {protocol!r}: must be 'strict' or 'reference'")
    open_out(Path(out))
    pretrained = load_model(model, "cuda" if torch.cuda.is_available() else "cpu")
    index = load_index(Path(shards))
    if protocol == "strict":
        _refuse_training_split(pretrained, index, split)
    return pretrained, read_split(index, split)


def _refuse_training_split(model: PretrainedImitate, index: ShardIndex, split: str) -> None:
    """Older exports do not say what they were trained on, and pass. One trained on several folders names them all."""
    trained_on = (model.settings.get("build_id") or "").split()
    if index.build_id in trained_on and model.settings.get("train_split") == split:
        raise ValueError(
            f"split = {split!r}: {model.folder} was trained on it; name another split, or ask for --protocol reference"
        )


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def _level(level: str, task: Task, texts: TextEmbeddings, per_class: int) -> Pairs:
    """The rows whose inner product is the similarity of a level, for the studies that have its sections, or some of them.

    `report` adds the cosines of both levels: the inner product of rows laid end to end. A model without findings branch
    has only its impression branch to answer with; one aligned with whole reports answers for them with that.
    """
    images, records = task.images, task.records
    fine = images.impression if images.findings is None else images.findings
    if level == "impression":
        rows, keep = (images.impression, texts.impression), records.has("impression")
    elif level == "findings":
        rows, keep = (fine, texts.findings), records.has("findings")
    else:
        keep = records.has("impression") & records.has("findings")
        rows = (images.impression, texts.report)
        if task.model.settings["impression_text"] != "report":
            rows = torch.cat([images.impression, fine], 1), torch.cat([texts.impression, texts.findings], 1)
    words = [text for text, kept in zip(records.texts(level), keep, strict=True) if kept]  # type: ignore[arg-type]
    chosen = torch.from_numpy(keep)
    pairs = Pairs(
        rows[0][chosen], rows[1][chosen], duplicate_groups(words), records.patients[keep], records.labels[keep]
    )
    if not per_class or not words:
        return pairs
    classes, keys = records.index.labels, [key for key, kept in zip(records.keys, keep, strict=True) if kept]
    return pairs._replace(classes=classes).take(balanced_places(keys, pairs.labels, classes, per_class))


def _require_labels(records: SplitRecords) -> None:
    known = (records.labels == 0) | (records.labels == 1)
    if not known.any():
        raise ValueError(
            f"shards = '{records.index.root}': no labels in split {records.split!r}; build them from a source with labels "
            "(the table source takes label columns), or evaluate retrieval, which needs none"
        )


def _write(
    name: str,
    out: Path,
    protocol: str,
    model: PretrainedImitate,
    records: SplitRecords,
    metrics: Figures,
    settings: dict[str, Any],
    curves: dict[str, Any],
) -> dict[str, Any]:
    bootstrap = {"draws": DRAWS, "seed": SEED, "unit": "patient", "interval": "95 % percentile"}
    result = {
        "task": name,
        "protocol": protocol,
        "model": {
            "path": str(model.folder),
            "weights_sha256": file_sha256(model.folder / WEIGHTS)[:16],
            "preset": model.settings["preset"],
            "image_encoder": model.settings["model"]["image_encoder"],
            "impression_text": model.settings["impression_text"],
            "trained_on": model.settings["data"],
            "synthetic": model.settings["synthetic"],
        },
        "data": records.describe(),
        "settings": {**settings, "bootstrap": bootstrap},
        "metrics": metrics,
        "curves": curves,
    }
    write_result(Path(out), result)
    return result
