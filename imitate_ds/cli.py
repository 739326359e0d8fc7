"""`imitate-ds`: one subcommand per entrance, no logic of its own."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imitate_ds.launch import Launcher
from imitate_ds.run_file import load_yaml

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
shards_app = typer.Typer(no_args_is_help=True, help="Build, check, embed and describe tar shards.")
data_app = typer.Typer(
    no_args_is_help=True, help="Look at collections as they were downloaded, before shards are built."
)
splits_app = typer.Typer(no_args_is_help=True, help="Lists of samples: label shares, validation parts.")
evaluate_app = typer.Typer(no_args_is_help=True, help="Measure an exported model; writes results.json and report.html.")
app.add_typer(shards_app, name="shards")
app.add_typer(data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(splits_app, name="splits")
console, errors = Console(), Console(stderr=True)

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


@app.command()
def pretrain(
    config: Annotated[Path, typer.Option("--config", help="Run file (YAML).")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides one setting.")] = None,
) -> None:
    """Pre-train in one process; for several ranks: deepspeed --module imitate_ds.pretrain --config RUN.yaml"""
    from imitate_ds.pretrain import main as pretrain_main

    pretrain_main(["--config", str(config), *(part for item in override or [] for part in ("--set", item))])


@app.command()
def finetune(
    config: Annotated[Path, typer.Option("--config", help="Run file (YAML).")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides one setting.")] = None,
) -> None:
    """Train a head for a task in one process; for several ranks: deepspeed --module imitate_ds.finetune --config RUN.yaml"""
    from imitate_ds.finetune import main as finetune_main

    finetune_main(["--config", str(config), *(part for item in override or [] for part in ("--set", item))])


@app.command()
def benchmark(
    config: Annotated[Path, typer.Option("--config", help="Benchmark file (YAML).")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides one setting.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each a process of its own.")] = 1,
    prepare: Annotated[bool, typer.Option("--prepare", help="Write the run files only, for an array of jobs.")] = False,
) -> None:
    """Tune every encoder for every task, at every label share and seed; goes on where it was stopped."""
    from imitate_ds.benchmark import benchmark as run_benchmark

    failed = run_benchmark(config, override, jobs=jobs, prepare=prepare, say=_say)
    raise typer.Exit(1 if failed else 0)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    step: Annotated[int, typer.Option(help="Counted from 0, as in RUN/bad_steps.")],
    precision: Annotated[str, typer.Option(help="Another one than the run's: fp32, bf16 or fp16.")] = "",
) -> None:
    """Do one step of a run again, from the weights it began with, to see what went wrong in it."""
    from imitate_ds.replay import main as replay_main

    replay_main(run, step, precision)


@app.command()
def doctor(
    shards: Annotated[
        Path | None, typer.Option("--shards", help="Also measure how fast this shard folder is read.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Also try the folder that runs are written to.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that any one answer may take.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at versions, GPUs, storage, limits and the lines between ranks; status 1 when something is broken.

    Alone, or on every rank: srun, torchrun or deepspeed start it as they start training.
    """
    from imitate_ds.diagnosis.finding import Options
    from imitate_ds.doctor import diagnose, findings_json, findings_table, is_broken

    with errors.status("looking; about half a minute"):
        findings = diagnose(Options(shards, run_dir, timeout))
    if as_json and findings:
        print(findings_json(findings))
    elif findings:
        console.print(findings_table(findings))
    raise typer.Exit(1 if is_broken(findings) else 0)


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; of several, a line each.")],
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Read the newest checkpoint against its checksums; of one run, unless told."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line a run.")] = False,
    watch: Annotated[
        float, typer.Option("--watch", min=0, help="Look again every so many seconds, while a run goes on.")
    ] = 0,
) -> None:
    """How runs stand, from their files: state, progress, losses, checkpoint, ranks that are silent or behind, failures."""
    from imitate_ds.status import follow, status_view

    for statuses in follow(runs, verify=verify, every_s=watch):
        if as_json:
            for it in statuses:
                print(json.dumps(it.as_dict()), flush=True)
            continue
        if watch:
            console.clear()
        console.print(status_view(statuses))


@app.command()
def launch(
    config: Annotated[Path, typer.Option("--config", help="Run file (YAML).")],
    nodes: Annotated[
        str, typer.Option(help="A number, or a range: 2-4 goes on with two after the loss of a node.")
    ] = "1",
    gpus_per_node: Annotated[int, typer.Option(help="One rank for each.")] = 0,
    ranks_per_node: Annotated[int, typer.Option(help="On CPUs, or for fewer ranks than GPUs.")] = 0,
    cpus_per_node: Annotated[int, typer.Option(help="Of the job; 0 takes whole nodes.")] = 0,
    launcher: Annotated[Launcher, typer.Option(help="srun or deepspeed under Slurm; local: this machine.")] = "srun",
    account: Annotated[str, typer.Option(help="As of sbatch.")] = "",
    partition: Annotated[str, typer.Option(help="As of sbatch.")] = "",
    time: Annotated[str, typer.Option(help="As of sbatch; at the limit the run saves and queues again.")] = "",
    sbatch: Annotated[list[str] | None, typer.Option(help="Any other option of sbatch: --sbatch=--exclusive")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides one setting.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be run.")] = False,
) -> None:
    """Say what sbatch and each node will run, then submit it."""
    from imitate_ds.launch import Plan
    from imitate_ds.launch import launch as launch_plan

    given = {"account": account, "partition": partition, "time": time}
    options = [f"--{name}={value}" for name, value in given.items() if value] + (sbatch or [])
    size = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
        "cpus_per_node": cpus_per_node,
    }
    plan = Plan(config, tuple(override or ()), launcher, **size, options=tuple(options))
    raise typer.Exit(launch_plan(plan, dry_run=dry_run))


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="The name of a source, as shards/README.md lists them.")],
    root: Annotated[Path | None, typer.Option("--root", help="The collection, as it was downloaded.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="key=value for the source.")] = None,
    show_names: Annotated[
        bool, typer.Option("--show-names", help="Print paths of missing files; they can hold ids of patients.")
    ] = False,
) -> None:
    """Count what a collection holds, beside what was published, and name what is missing; status 1 when anything is."""
    from imitate_ds.data.collection_check import check_collection, check_lines, check_table
    from imitate_ds.data.sources import open_source

    check = check_collection(open_source(source, root, **_options(option or [])))
    console.print(check_table(check))
    for line in check_lines(check, show_names=show_names):
        _say(line)
    raise typer.Exit(0 if check.is_whole else 1)


@shards_app.command("build")
def shards_build(
    source: Annotated[
        str | None, typer.Argument(help="openi, chexpert, table, ...; shards/README.md lists them all.")
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="The collection, as it was downloaded.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where tars and index.json go.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="shards/*.yaml; what is given here wins.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Side of the stored square, pixels.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 2,
    part: Annotated[str, typer.Option("--part", help="I/N: the I-th of N parts, from 0, as in a job array.")] = "0/1",
    option: Annotated[list[str] | None, typer.Option("--option", help="key=value for the source.")] = None,
) -> None:
    """Read a collection, write tar shards and their index."""
    from imitate_ds.data.shard_recipe import load_recipe
    from imitate_ds.data.shard_stats import report_table
    from imitate_ds.data.shards import build_shards
    from imitate_ds.data.sources import open_source

    given = {"source": source, "root": root, "out": out, "image_size": image_size, "options": _options(option or [])}
    plan = load_recipe(recipe, **given)
    collection = open_source(plan.source, plan.root, **plan.options)
    report = build_shards(
        collection,
        plan.out,
        image_size=plan.image_size,
        workers=workers,
        part=_part(part),
        samples_per_shard=plan.samples_per_shard,
    )
    console.print(report_table(report))
    if collection.has_reports:
        _say(f"next: imitate-ds shards embed {plan.out} --text-encoder lsa")
    else:
        _say(f"{plan.out}: labels, masks or boxes without reports, so there is nothing to embed")


@shards_app.command("merge")
def shards_merge(folder: Path) -> None:
    """Write the index of a build done in parts, once all of them are there (the last part does so by itself)."""
    from imitate_ds.data.shard_stats import report_table
    from imitate_ds.data.shards import merge_parts

    console.print(report_table(merge_parts(folder)))


@shards_app.command("embed")
def shards_embed(
    folder: Path,
    text_encoder: Annotated[str, typer.Option(help="lsa, or a Hugging Face name or folder.")] = "lsa",
    dim: Annotated[int | None, typer.Option(help="Width of the lsa embedding; 256 unless given.")] = None,
) -> None:
    """Embed the report sections of every shard once, with a frozen text encoder."""
    from imitate_ds.data.text_cache import embed_shards, fit_texts
    from imitate_ds.models.text_encoder import LsaEncoder, load_text_encoder

    if text_encoder == "lsa":
        encoder = LsaEncoder.fit(fit_texts(folder), dim=256 if dim is None else dim)
    elif dim is None:
        encoder = load_text_encoder(text_encoder)
    else:
        raise ValueError(f"--dim {dim}: is for --text-encoder lsa; the width of {text_encoder} is its own")
    embed_shards(folder, encoder)
    _say(f"{folder}: embedded, {encoder.width} numbers a section, encoder {encoder.fingerprint}")


@shards_app.command("verify")
def shards_verify(folder: Path) -> None:
    """Check every tar and sidecar against the index; status 1 when something is wrong."""
    from imitate_ds.data.shards import verify_shards

    problems = verify_shards(folder)
    for problem in problems:
        _say(problem)
    _say(f"{folder}: {len(problems)} problem(s)" if problems else f"{folder}: all shards verify")
    raise typer.Exit(1 if problems else 0)


@shards_app.command("stats")
def shards_stats(
    folder: Path,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw a few samples into this PNG.")] = None,
) -> None:
    """Sections present, words, duplicates, views, splits and labels. Prints counts, never a report."""
    from imitate_ds.data.shard_stats import samples_picture, shard_stats, stats_table

    console.print(stats_table(shard_stats(folder)))
    if picture:
        samples_picture(folder, picture)
        _say(f"picture: {picture} (patient data: keep it where the shards may be)")


@shards_app.command("check-leak")
def shards_check_leak(
    a: Annotated[str, typer.Argument(metavar="A", help="The shard folder a model was trained on.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The shard folder it is to be evaluated on.")],
    split_a: Annotated[str, typer.Option(help="One split of A; all of them unless given.")] = "",
    split_b: Annotated[str, typer.Option(help="One split of B; all of them unless given.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Write the pairs of keys into this CSV.")] = None,
) -> None:
    """Patients, studies, radiographs and reports of A that are in B too; status 1 when there are any."""
    from imitate_ds.data.shard_index import open_index
    from imitate_ds.data.shard_leak import check_leak, leak_table, save_leaks

    report = check_leak(open_index(a), open_index(b), split_a=split_a, split_b=split_b)
    console.print(leak_table(report))
    if out:
        save_leaks(report, out)
        _say(f"written: {out} (keys are pseudonyms: keep it where the shards may be)")
    _say(f"{report.leaking:,} of {report.samples_b:,} samples of B leak" if report.leaks else "no leak found")
    raise typer.Exit(1 if report.leaks else 0)


@shards_app.command("order")
def shards_order(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="As data.shards of the run, in its order.")],
    seed: Annotated[int, typer.Option(help="The run's seed.")],
    steps: Annotated[str, typer.Option(help="A:B, steps A to B-1, counted from 0.")],
    global_batch: Annotated[int, typer.Option(help="train.micro_batch_size x ranks.")],
    weight: Annotated[list[float] | None, typer.Option(help="One for each DIR, as in the run file.")] = None,
    split: Annotated[str, typer.Option(help="data.train_split of the run.")] = "train",
    apart: Annotated[str, typer.Option(help="data.apart of the run: study or patient.")] = "study",
    world_size: Annotated[int, typer.Option(help="Also say which rank had which samples.")] = 0,
    workers: Annotated[int, typer.Option(help="data.workers, to say which worker read them.")] = 0,
    start_step: Annotated[int, typer.Option(help="Where the run began or was resumed, to say which worker.")] = 0,
) -> None:
    """Print the keys of each step's global batch, one sorted line a step: what was in the batch when the loss spiked."""
    from imitate_ds.config import build_data_config
    from imitate_ds.data.shard_order import order_lines

    weights = weight or [1.0] * len(folders)
    if len(weights) != len(folders):
        raise ValueError(f"--weight: {len(weights)} of them for {len(folders)} folders; give one for each, or none")
    mixture = [{"shards": folder, "weight": share} for folder, share in zip(folders, weights, strict=True)]
    data = build_data_config({"shards": mixture, "train_split": split, "apart": apart})
    for line in order_lines(
        data,
        seed=seed,
        global_batch_size=global_batch,
        steps=_steps(steps),
        world_size=world_size,
        workers=workers,
        start_step=start_step,
    ):
        print(line)


@splits_app.command("make")
def splits_make(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder made by `shards build`, or its URL.")],
    out: Annotated[Path, typer.Option("--out", help="Where NAME.txt of every part goes.")],
    part: Annotated[list[str], typer.Option("--part", help="NAME=LOW:HIGH, a range of shares, as in train=0:0.9")],
    split: Annotated[str, typer.Option(help="The split that is taken apart.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Of the random order.")] = 0,
    unit: Annotated[
        Literal["patient", "sample"], typer.Option(help="What is drawn; sample, as papers do.")
    ] = "patient",
) -> None:
    """Parts of a split as lists of keys with a checksum: label shares, or a validation part."""
    from imitate_ds.data.shard_index import open_index
    from imitate_ds.data.split_lists import make_split_lists, parse_part

    counts = make_split_lists(open_index(folder), split, dict(map(parse_part, part)), out, seed=seed, unit=unit)
    for name, count in counts.items():
        _say(f"{out / f'{name}.txt'}: {count:,} samples")


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
        _say(f"pictures: {out / 'grounding'} (patient data: keep them where the shards may be)")


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
        _say(f"written: {out / 'comparison.json'}")


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
    _say(f"written: {out / 'results.json'}, {out / 'report.html'}")


def _say(text: str) -> None:
    """One line as it is: folder names may hold brackets, and are longer than a terminal is wide."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _options(pairs: list[str]) -> dict[str, object]:
    """key=value pairs, values read as YAML: studies=2400 is a number."""
    options = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ValueError(f"--option {pair}: must be key=value, as in --option studies=1000")
        options[key] = load_yaml(text)
    return options


def _steps(text: str) -> range:
    first, _, stop = text.partition(":")
    if not (first.isdigit() and stop.isdigit() and int(first) < int(stop)):
        raise ValueError(f"--steps {text}: must be A:B with 0 <= A < B, as in --steps 1200:1203")
    return range(int(first), int(stop))


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise ValueError(f"--part {text}: must be I/N with 0 <= I < N, as in --part 0/8")
    return int(number), int(of)


def main() -> None:
    """Run a command; what is wrong with the input, or missing here, is one clear line and status 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("IMITATE_DS_TRACEBACK"):
            raise
        errors.print(f"imitate-ds: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
