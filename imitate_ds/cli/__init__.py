"""`imitate-ds`: one subcommand per entrance, no logic of its own."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from imitate_ds.cli.data import data_app, shards_app, splits_app
from imitate_ds.cli.evaluate import evaluate_app
from imitate_ds.cli.output import console, errors, say
from imitate_ds.launch import Launcher

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(shards_app, name="shards")
app.add_typer(data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(splits_app, name="splits")


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

    failed = run_benchmark(config, override, jobs=jobs, prepare=prepare, say=say)
    raise typer.Exit(1 if failed else 0)


@app.command()
def scale(
    config: Annotated[Path, typer.Option("--config", help="Sweep file (YAML).")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides one setting.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once on this machine, each a process of its own.")] = 1,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm", help="Train nothing: list the runs for an array of jobs, say what is left, draw the page."
        ),
    ] = False,
) -> None:
    """Pre-train at every size that a sweep names, and fit power laws; goes on where it was stopped."""
    from imitate_ds.scale import scale as run_sweep

    failed = run_sweep(config, override, jobs=jobs, slurm=slurm, say=say)
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
def profile(
    config: Annotated[Path, typer.Option("--config", help="Run file (YAML).")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides one setting.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many are measured; a few more come before and after.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", help="Unless given, OUTPUT_DIR/NAME.profile.")] = None,
) -> None:
    """Take a few real steps of a run file: time, operations and memory by part, in profile.html, profile.json, trace.json.gz.

    For several ranks: deepspeed --module imitate_ds.profiling --config RUN.yaml
    """
    from imitate_ds.profiling import main as profile_main

    given = ["--config", str(config), "--steps", str(steps), *(["--out", str(out)] if out else [])]
    profile_main([*given, *(part for item in override or [] for part in ("--set", item))])


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
    from imitate_ds.cli.status_view import status_view
    from imitate_ds.status import follow

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


@app.command()
def plan(
    config: Annotated[Path, typer.Option("--config", help="Run file (YAML).")],
    gpu: Annotated[str, typer.Option("--gpu", help="As imitate_ds/devices.py names it: h100-80, a100-40, l40s, ...")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides one setting.")] = None,
    nodes: Annotated[int, typer.Option("--nodes")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", help="One rank for each.")] = 8,
    interconnect: Annotated[
        float, typer.Option("--interconnect", help="GB/s out of a node, of all its ports; 400 Gbit/s are 50.")
    ] = 50,
    studies: Annotated[
        int | None, typer.Option("--studies", min=1, help="Of an epoch, where the shards are not here.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all of it, and every constant.")] = None,
) -> None:
    """What a run would need and take on GPUs that need not be here: memory by ZeRO stage, time, energy; and what to set."""
    from imitate_ds.config import load_run_config
    from imitate_ds.devices import device_called
    from imitate_ds.planning.assumptions import gpu_machine
    from imitate_ds.planning.planner import make_plan
    from imitate_ds.planning.report import plan_values, plan_view, settings_line

    run, device = load_run_config(config, override), device_called(gpu)
    machine = gpu_machine(gpu, device, run.train, nodes=nodes, per_node=gpus_per_node, interconnect=interconnect)
    with errors.status("tracing a step"):
        found = make_plan(run, machine, studies=studies)
    console.print(plan_view(found))
    console.print(f"\n{settings_line(found)}", style="bold", highlight=False, markup=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps(plan_values(found), indent=1) + "\n")
        say(f"written: {json_file}")


def main() -> None:
    """Run a command; what is wrong with the input, or missing here, is one clear line and status 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("IMITATE_DS_TRACEBACK"):
            raise
        errors.print(f"imitate-ds: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
