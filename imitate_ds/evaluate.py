"""Evaluation, an entrance: what an exported model can do on the samples of a split it was not trained on.

Two protocols. `strict`, the default: by patient, duplicate texts are one candidate of recall, and the split the model was
trained on is refused. `reference`: as papers did, to compare with papers. Every figure has a 95 % interval by bootstrap
over patients.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imitate_ds.data.shard_index import write_atomic
from imitate_ds.evaluation.comparison import compare_runs
from imitate_ds.evaluation.embedded import (
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
from imitate_ds.evaluation.report import open_out
from imitate_ds.evaluation.retrieval import Pairs, balanced_places, score_pairs
from imitate_ds.evaluation.task import (
    Protocol,
    Task,
    embed_task,
    open_split,
    open_task,
    require_labels,
    worker_count,
    write_task,
)
from imitate_ds.evaluation.zero_shot import score_zero_shot
from imitate_ds.hub import Section
from imitate_ds.metrics import DRAWS, Figures, Ties

LEVELS = ("impression", "findings", "report")
SHARES = {"1%": 0.01, "10%": 0.1, "100%": 1.0}  # of the training labels
TIES = {"against": "count against the query", "index": "broken by index order"}
PROBE_SEEDS = {"strict": (0, 1, 2, 3, 4), "reference": (42,)}


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
    pretrained, records = open_split(model, shards, out, split, protocol)
    task = embed_task(pretrained, records.with_labels(classes) if classes else records)
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
    return write_task("retrieval", out, protocol, task.model, task.records, metrics, settings, curves)


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
    task = open_task(model, shards, out, split, protocol)
    require_labels(task.records)
    scored = score_zero_shot(task.model, task.records, task.images, file, branch)
    return write_task("zero-shot", out, protocol, task.model, task.records, *scored)


def evaluate_probe(
    model: Path, shards: Path, out: Path, split: str = "val", protocol: Protocol = "strict", train_split: str = "train"
) -> dict[str, Any]:
    """Logistic regression on frozen pooled features at 1, 10 and 100 % of the labels: AUROC per label and macro.

    `strict` draws patients, five times for the smaller shares (mean and standard deviation over the draws), and refuses
    a patient on both sides. `reference` draws images, once, with seed 42; the probe is the same logistic regression, not
    the layer that the published program trains with AdamW.
    """
    task = open_task(model, shards, out, split, protocol)
    require_labels(task.records)
    train = read_split(task.records.index, train_split)
    shared = len(np.intersect1d(train.patients, task.records.patients))
    if shared and protocol == "strict":
        raise ValueError(
            f"split = {split!r}: {shared} of its patients are in {train_split!r} too; build shards that split by patient, "
            "or ask for --protocol reference"
        )
    features = embed_radiographs(task.model, train, workers=worker_count()).pooled.numpy()
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
    return write_task("probe", out, protocol, task.model, task.records, metrics, settings, curves)


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
    pretrained, records = open_split(model, shards, out, split, protocol)
    if reference_split not in records.index.splits:
        raise ValueError(
            f"--reference-split {reference_split}: {records.index.root} has no such split; it has: "
            f"{', '.join(records.index.splits)}"
        )
    boxes = read_boxes(records)
    words = ask_for(boxes, file, branch)
    usual = usual_levels(pretrained, records.index, reference_split, worker_count())
    folder = Path(out) / "grounding" if pictures else None
    if folder:
        folder.mkdir(mode=0o700, exist_ok=True)
    pointing = point(pretrained, records, boxes, words, branch, usual, workers=worker_count(), pictures=folder)
    settings = {
        "branch": branch,
        "prompts": words,
        "prompt_files": prompt_checksums(file),
        "labels_without_prompt": sorted({label for sample in boxes for label in sample} - set(words)),
        "usual": f"mean features over the first {REFERENCE} radiographs of split {reference_split}",
    }
    metrics = pointing_figures(pointing, records.patients)
    return write_task("grounding", out, protocol, pretrained, records, metrics, settings, {})


def evaluate_compare(a: Path, b: Path, *, draws: int = DRAWS, out: Path | None = None) -> dict[str, Any]:
    """Two fine-tuned runs on the same test samples: per metric b - a, its 95 % interval and p-value, by paired bootstrap.

    Every draw takes the same patients for both. p is two-sided, min(1, 2 (k + 1) / (draws + 1)), k the smaller of how many
    differences are at most 0 and at least 0; it is of one metric, and not corrected for how many are looked at. Both are
    measured as `strict` does. With `out` also out/comparison.json.
    """
    if draws < 1:
        raise ValueError(f"--draws {draws}: must be at least 1")
    if out:
        open_out(Path(out))
    found = compare_runs(Path(a), Path(b), draws)
    if out:
        write_atomic(Path(out) / "comparison.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return found


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
