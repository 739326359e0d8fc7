"""`imitate-ds data`, `shards` and `splits`: from a collection on disk to what a run reads."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from imitate_ds.cli.output import console, say
from imitate_ds.run_file import load_yaml

shards_app = typer.Typer(no_args_is_help=True, help="Build, check, embed and describe tar shards.")
data_app = typer.Typer(
    no_args_is_help=True, help="Look at collections as they were downloaded, before shards are built."
)
splits_app = typer.Typer(no_args_is_help=True, help="Lists of samples: label shares, validation parts.")


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
        say(line)
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
        say(f"next: imitate-ds shards embed {plan.out} --text-encoder lsa")
    else:
        say(f"{plan.out}: labels, masks or boxes without reports, so there is nothing to embed")


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
    from imitate_ds.models.text_encoder import load_text_encoder

    if text_encoder == "lsa":
        from imitate_ds.models.lsa_encoder import LsaEncoder

        encoder = LsaEncoder.fit(fit_texts(folder), dim=256 if dim is None else dim)
    elif dim is None:
        encoder = load_text_encoder(text_encoder)
    else:
        raise ValueError(f"--dim {dim}: is for --text-encoder lsa; the width of {text_encoder} is its own")
    embed_shards(folder, encoder)
    say(f"{folder}: embedded, {encoder.width} numbers a section, encoder {encoder.fingerprint}")


@shards_app.command("verify")
def shards_verify(folder: Path) -> None:
    """Check every tar and sidecar against the index; status 1 when something is wrong."""
    from imitate_ds.data.shards import verify_shards

    problems = verify_shards(folder)
    for problem in problems:
        say(problem)
    say(f"{folder}: {len(problems)} problem(s)" if problems else f"{folder}: all shards verify")
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
        say(f"picture: {picture} (patient data: keep it where the shards may be)")


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
        say(f"written: {out} (keys are pseudonyms: keep it where the shards may be)")
    say(f"{report.leaking:,} of {report.samples_b:,} samples of B leak" if report.leaks else "no leak found")
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
    share: Annotated[float, typer.Option(help="data.share of the run.")] = 1.0,
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
    mixture = [{"shards": folder, "weight": times} for folder, times in zip(folders, weights, strict=True)]
    data = build_data_config({"shards": mixture, "train_split": split, "apart": apart, "share": share})
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
        say(f"{out / f'{name}.txt'}: {count:,} samples")


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
