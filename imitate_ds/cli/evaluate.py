"""`imitate-ds evaluate`: what an exported model, or a fine-tuned run, is worth."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from imitate_ds.cli.output import console, say

evaluate_app = typer.Typer(no_args_is_help=True, help="Measure an exported model; writes results.json and report.html.")

ModelFolder = Annotated[Path, typer.Option("--model", help="An export folder, as pretrain leaves it.")]
ShardsFolder = Annotated[Path, typer.Option("--shards", help="A folder made by `shards build`, with embeddings.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Where results.json and report.html go.")]
Split = Annotated[str, typer.Option("--split", help="The split that is scored.")]
Protocol = Annotated[
    Literal["strict", "reference"], typer.Option("--protocol", help="strict, or reference (as papers did).")
]
Branch = Annotated[
    Literal["impression", "findings"], typer.Option("--branch", help="impression: a diagnosis; findings: what is seen.")
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        help="A YAML file, or one that ships: chestxray14, chexpert, covidx, openi, rsna, siim. Unless given, all labels.",
    ),
]


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    model: ModelFolder,
    shards: ShardsFolder,
    out: OutFolder,
    split: Split = "val",
    protocol: Protocol = "strict",
    per_class: Annotated[
        int, typer.Option(help="Only so many studies of each of --classes, having no other of them.", min=0)
    ] = 0,
    classes: Annotated[str, typer.Option(help="Labels, as in --classes Atelectasis,Edema (CheXpert 5x200).")] = "",
) -> None:
    """Image to report and report to image, at both levels: R@k by pair, P@k by label, with 95 % intervals by patient."""
    from imitate_ds import evaluate

    names = [name.strip() for name in classes.split(",") if name.strip()]
    result = evaluate.evaluate_retrieval(
        model, shards, out, split=split, protocol=protocol, classes=names, per_class=per_class
    )
    _show(result, out)


@evaluate_app.command("zero-shot")
def evaluate_zero_shot(
    model: ModelFolder,
    shards: ShardsFolder,
    out: OutFolder,
    split: Split = "val",
    protocol: Protocol = "strict",
    prompts: Prompts = "",
    branch: Branch = "impression",
) -> None:
    """AUROC, average precision, F1 and accuracy of prompted classification, with 95 % intervals by patient."""
    from imitate_ds import evaluate

    result = evaluate.evaluate_zero_shot(
        model, shards, out, split=split, protocol=protocol, prompts=prompts, branch=branch
    )
    _show(result, out)


@evaluate_app.command("probe")
def evaluate_probe(
    model: ModelFolder, shards: ShardsFolder, out: OutFolder, split: Split = "val", protocol: Protocol = "strict"
) -> None:
    """Logistic regression on frozen pooled features, at 1, 10 and 100 % of the labels."""
    from imitate_ds import evaluate

    _show(evaluate.evaluate_probe(model, shards, out, split=split, protocol=protocol), out)


@evaluate_app.command("grounding")
def evaluate_grounding(
    model: ModelFolder,
    shards: ShardsFolder,
    out: OutFolder,
    split: Split = "val",
    protocol: Protocol = "strict",
    prompts: Prompts = "",
    branch: Branch = "impression",
    reference_split: Annotated[str, typer.Option(help="Whose radiographs say what is usual.")] = "train",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Also an overlay of each sample in OUT/grounding/: patient data.")
    ] = False,
) -> None:
    """The pointing game: whether the place that answers a label's words most lies in a box of that label."""
    from imitate_ds import evaluate

    result = evaluate.evaluate_grounding(
        model,
        shards,
        out,
        split=split,
        protocol=protocol,
        prompts=prompts,
        branch=branch,
        reference_split=reference_split,
        pictures=pictures,
    )
    _show(result, out)
    if pictures:
        say(f"pictures: {out / 'grounding'} (patient data: keep them where the shards may be)")


@evaluate_app.command("compare")
def evaluate_compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The folder of a run that was fine-tuned.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same task and test samples.")],
    draws: Annotated[
        int, typer.Option("--draws", help="Of the bootstrap; each takes the same patients for both.")
    ] = 1000,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where comparison.json goes; only printed otherwise.")
    ] = None,
) -> None:
    """B - A in every metric, with 95 % intervals and p-values by paired bootstrap over patients.

    p is two-sided: min(1, 2 (k + 1) / (draws + 1)), k the smaller of how many differences are at most 0 and at least 0. It is
    not corrected for how many metrics are looked at.
    """
    from imitate_ds import evaluate

    result = evaluate.evaluate_compare(a, b, draws=draws, out=out)
    table = Table(title=f"{result['task']}: {result['samples']} samples of {result['patients']} patients")
    for column in ("metric", "A", "B", "B - A", "95 % interval", "p", "n"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, row in result["metrics"].items():
        values = ["not defined" if row[of] is None else f"{row[of]:.3f}" for of in ("a", "b")]
        known = row["difference"] is not None and row["low"] is not None
        change = [f"{row['difference']:+.3f}", f"{row['low']:+.3f} to {row['high']:+.3f}"] if known else ["", ""]
        table.add_row(escape(name), *values, *change, f"{row['p']:.3f}" if known else "", str(row["n"]))
    console.print(table)
    if out:
        say(f"written: {out / 'comparison.json'}")


def _show(result: dict, out: Path) -> None:
    table = Table(title=f"{result['task']} ({result['protocol']} protocol)")
    for column in ("metric", "value", "95 % interval", "n"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, figure in result["metrics"].items():
        value, low, high = (figure.get(part) for part in ("value", "low", "high"))
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        table.add_row(
            escape(name), "not defined" if value is None else f"{value:.3f}", interval, str(figure.get("n", ""))
        )
    console.print(table)
    say(f"written: {out / 'results.json'}, {out / 'report.html'}")
