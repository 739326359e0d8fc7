"""Zero-shot classification of one split by prompts: labels each for itself, or classes of which an image has one.

No threshold is chosen on what is scored: a label is predicted where its margin is above 0, that is where P(affirming) is
above one half, and of classes the one with the largest share.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from imitate_ds.evaluation.embedded import SplitRecords
from imitate_ds.evaluation.label_figures import auroc_figures, label_figures, roc_curves
from imitate_ds.evaluation.prompt_file import PromptFile, plain_name
from imitate_ds.evaluation.prompts import label_prompts, prompt_checksums, prompts_for
from imitate_ds.hub import ImageEmbeddings, PretrainedImitate, Section
from imitate_ds.metrics import (
    Figures,
    accuracy_statistic,
    average_precision_statistic,
    bootstrap_by_patient,
    f1_statistic,
    figure,
    macro_statistic,
    mean_statistic,
)


class ZeroShot(NamedTuple):
    metrics: Figures
    settings: dict[str, Any]
    curves: dict[str, Any]


def score_zero_shot(
    model: PretrainedImitate, records: SplitRecords, images: ImageEmbeddings, file: PromptFile | None, branch: Section
) -> ZeroShot:
    """file: what to ask; None for all labels that ship."""
    rows = branch_rows(images, branch)
    score = _exclusive if file and file.exclusive else _by_label
    scored = score(model, records, rows, file, branch)
    settings = {
        "branch": branch,
        "prompt_files": prompt_checksums(file),
        "temperature": model.settings["temperature"],
    }
    return scored._replace(settings=settings | scored.settings)


def branch_rows(images: ImageEmbeddings, branch: Section) -> torch.Tensor:
    """The embeddings [n, D] of one branch. Raises ValueError where the model has no such branch."""
    if branch not in ("impression", "findings"):
        raise ValueError(f"branch = {branch!r}: must be 'impression' or 'findings'")
    rows = getattr(images, branch)
    if rows is None:
        raise ValueError("branch = 'findings': this model has no findings branch; ask its impression branch")
    return rows


def _by_label(
    model: PretrainedImitate, records: SplitRecords, rows: torch.Tensor, file: PromptFile | None, branch: Section
) -> ZeroShot:
    labels = records.index.labels
    prompts = label_prompts(file, labels, branch) if file else prompts_for(labels, branch)
    if file and not prompts:
        raise ValueError(
            f"--prompts {file.name}: has none of the labels of {records.index.root} ({', '.join(labels)}); it has: "
            f"{', '.join(file.wordings)}"
        )
    records = records.with_labels(list(prompts))
    scores = torch.stack(list(model.zero_shot_scores(rows, prompts).values()), dim=1).numpy()
    metrics = auroc_figures(records, [scores])
    for name, kind, values in (
        ("ap", average_precision_statistic, scores),
        ("f1", f1_statistic, scores > 0),
        ("accuracy", accuracy_statistic, scores > 0),
    ):
        metrics |= label_figures(records, name, [macro_statistic(kind, records.labels, values)])
    settings = {
        "prompts": prompts,
        "labels_without_prompt": [label for label in labels if label not in prompts],
        "score": "P(affirming) - P(denying)",
        "predicted": "score > 0",
    }
    return ZeroShot(metrics, settings, roc_curves(records, scores))


def _exclusive(
    model: PretrainedImitate, records: SplitRecords, rows: torch.Tensor, file: PromptFile | None, branch: Section
) -> ZeroShot:
    assert file, "only a file has classes"
    records = _with_classes(records, file)
    prompts = {label: wording[0] for label in records.index.labels if (wording := file.wording(label, branch))}
    shares = model.class_shares(rows, list(prompts.values())).numpy()
    predicted = shares.argmax(axis=1)
    chosen = predicted[:, None] == np.arange(shares.shape[1])
    metrics = _accuracy(records, predicted)
    for name, kind, values in (("ap", average_precision_statistic, shares), ("f1", f1_statistic, chosen)):
        metrics |= label_figures(records, name, [macro_statistic(kind, records.labels, values)])
    settings = {"classes": prompts, "score": "share of the class among all", "predicted": "the class of largest share"}
    return ZeroShot(auroc_figures(records, [shares]) | metrics, settings, roc_curves(records, shares))


def _accuracy(records: SplitRecords, predicted: np.ndarray) -> Figures:
    """Accuracy over all classes, beside that of the commonest class as the answer to everything."""
    right = records.labels[np.arange(len(predicted)), predicted] == 1
    low, high = bootstrap_by_patient(mean_statistic(right.astype(float)), records.patients)
    commonest = (records.labels == 1).mean(axis=0).max()
    n = len(predicted)
    return {
        "accuracy": figure(right.mean(), low[0], high[0], n=n),
        "blind_accuracy": figure(commonest, n=n),
    }


def _with_classes(records: SplitRecords, file: PromptFile) -> SplitRecords:
    """The labels that are classes of the file, 1 or 0, in the file's order. Raises ValueError unless each sample has one."""
    by_class = {
        file.names[plain_name(label)]: label for label in records.index.labels if plain_name(label) in file.names
    }
    if missing := [name for name in file.wordings if name not in by_class]:
        raise ValueError(
            f"--prompts {file.name}: {records.index.root} has no label {missing[0]!r}; classes exclude each other, so all "
            f"of them must be there; it has: {', '.join(records.index.labels)}"
        )
    records = records.with_labels([by_class[name] for name in file.wordings])
    wrong = np.flatnonzero((records.labels == 1).sum(axis=1) != 1)
    if len(wrong):
        raise ValueError(
            f"--prompts {file.name}: {len(wrong)} samples of split {records.split!r} have not exactly one of its classes, "
            f"the first is {records.keys[wrong[0]]}; mend the labels, or write a file with labels: instead of classes:"
        )
    return records.with_values((records.labels == 1).astype(np.int8))
