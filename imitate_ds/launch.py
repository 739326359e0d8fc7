"""Starting a run on a cluster, or here: what will be run is said before it is run.

The work is done by launch/pretrain.sbatch, launch/finetune.sbatch and launch/pretrain.sh, which anybody can start by hand; this
writes their command line and shows what becomes of it. `python -m imitate_ds.launch --config RUN.yaml [--set key=value ...]`
makes the folder of a run and prints it: the scripts ask, since any setting may move it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from imitate_ds.config import RunConfig, build_run_config
from imitate_ds.finetune_config import FinetuneConfig, build_finetune_config
from imitate_ds.run_file import read_settings

LOCAL_SCRIPT = Path("launch/pretrain.sh")

Launcher = Literal["srun", "deepspeed", "local"]


class Plan(NamedTuple):
    """What is to be started, and where. `nodes` may be a range, such as 2-4: Slurm gives what it has."""

    config: Path
    overrides: tuple[str, ...] = ()
    launcher: Launcher = "srun"
    nodes: str = "1"
    gpus_per_node: int = 0
    ranks_per_node: int = 0  # 0: one for each GPU
    cpus_per_node: int = 0  # 0: whole nodes
    options: tuple[str, ...] = ()  # for sbatch
    entrance: Literal["pretrain", "finetune"] = "pretrain"  # by the run file

    @property
    def script(self) -> Path:
        return LOCAL_SCRIPT if self.launcher == "local" else Path(f"launch/{self.entrance}.sbatch")

    @property
    def module(self) -> str:
        return f"imitate_ds.{self.entrance}"

    @property
    def most_nodes(self) -> int:
        return int(self.nodes.rpartition("-")[2])

    @property
    def ranks_of_a_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node

    @property
    def arguments(self) -> list[str]:
        """Of the entrance."""
        return ["--config", str(self.config), *(part for item in self.overrides for part in ("--set", item))]


def launch(plan: Plan, *, dry_run: bool) -> int:
    """Say what will be run, and run it unless this is a dry run: the status of sbatch, or of the run.

    Raises ValueError or FileNotFoundError naming the option, its value and the rule.
    """
    _check(plan)
    config = load_any_run(plan.config, list(plan.overrides))
    plan = plan._replace(entrance="finetune" if isinstance(config, FinetuneConfig) else "pretrain")
    print(describe(plan, config), flush=True)
    if dry_run:
        return 0
    environment, command = submission(plan)
    if not plan.script.is_file():
        raise FileNotFoundError(
            f"{plan.script}: no such file; start runs in the folder that holds launch/, the repository"
        )
    if not shutil.which(command[0]):
        raise FileNotFoundError(
            f"{command[0]} is not here; submit on a login node of the cluster, or use --launcher local"
        )
    return subprocess.run(command, env={**os.environ, **environment}).returncode


def load_any_run(path: Path, overrides: list[str]) -> RunConfig | FinetuneConfig:
    """A run file of pre-training or, where it has a task, of fine-tuning. Raises what their own loaders raise."""
    values = read_settings(path, overrides)
    return build_finetune_config(values) if "task" in values else build_run_config(values)


def submission(plan: Plan) -> tuple[dict[str, str], list[str]]:
    """Environment and command line of what starts the run."""
    if plan.launcher == "local":
        ranks = {"RANKS": str(plan.ranks_of_a_node)} if plan.ranks_of_a_node else {}
        entrance = {"ENTRANCE": plan.module} if plan.entrance != "pretrain" else {}
        return ranks | entrance, [str(plan.script), *plan.arguments]
    environment = {"LAUNCHER": plan.launcher, "RANKS_PER_NODE": str(plan.ranks_of_a_node)}
    gpus = [f"--gpus-per-node={plan.gpus_per_node}"] if plan.gpus_per_node else []
    cpus = [f"--cpus-per-task={plan.cpus_per_node}"] if plan.cpus_per_node else ["--exclusive"]
    return environment, [
        "sbatch",
        f"--nodes={plan.nodes}",
        *gpus,
        *cpus,
        *plan.options,
        str(plan.script),
        *plan.arguments,
    ]


def step_line(plan: Plan, run_dir: Path) -> str:
    """What the job's first node runs, in the words of the shell: what only the job knows stands as its variable."""
    ranks, nodes, arguments = plan.ranks_of_a_node, plan.most_nodes, shlex.join(plan.arguments)
    step = "srun --label --kill-on-bad-exit=0"
    if plan.launcher == "srun":
        size = f"--ntasks={nodes * ranks} --ntasks-per-node={ranks} --cpus-per-task=$((SLURM_CPUS_ON_NODE / {ranks}))"
        return f"{step} {size} $IMITATE_DS_CONTAINER python -m {plan.module} {arguments}"
    size = f'--ntasks={nodes} --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE"'
    return f"{step} {size} bash -c {shlex.quote(_NODE_SCRIPT)} deepspeed {_deepspeed(plan, run_dir)} {arguments}"


def node_lines(plan: Plan, run_dir: Path) -> list[str]:
    """What each node then runs."""
    ranks, arguments = plan.ranks_of_a_node, shlex.join(plan.arguments)
    if plan.launcher == "local":
        count = f"--num_gpus={ranks} " if ranks else ""
        return [f"deepspeed {count}--master_port=29500 --module {plan.module} {arguments}"]
    if plan.launcher == "srun":
        world = f"RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE={plan.most_nodes * ranks}"
        return [f"{ranks} time(s): {world} $IMITATE_DS_CONTAINER python -m {plan.module} {arguments}"]
    return [f"$IMITATE_DS_CONTAINER deepspeed --node_rank=$SLURM_NODEID {_deepspeed(plan, run_dir)} {arguments}"]


def describe(plan: Plan, config: RunConfig | FinetuneConfig) -> str:
    """The plan for a reader, each command as it could be typed."""
    environment, command = submission(plan)
    rows = [
        ("run", f"{config.name}, in {config.run_dir}"),
        ("ranks", _size(plan, config)),
        ("submit" if plan.launcher != "local" else "start", _typed(environment, command)),
    ]
    if plan.launcher != "local":
        rows += [("first node", step_line(plan, config.run_dir))]
    rows += [("each node", line) for line in node_lines(plan, config.run_dir)]
    return "\n".join(f"{name + ':':<12}{text}" for name, text in rows)


# USR1 asks the ranks to save and end; the launcher, which would die of it, ignores it.
_NODE_SCRIPT = 'trap "" USR1; exec $IMITATE_DS_CONTAINER deepspeed --node_rank="$SLURM_NODEID" "$@"'


def _deepspeed(plan: Plan, run_dir: Path) -> str:
    hosts = shlex.quote(f"--hostfile={run_dir}/hostfile")
    return f'{hosts} --no_ssh --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module {plan.module}'


def _size(plan: Plan, config: RunConfig | FinetuneConfig) -> str:
    if not plan.ranks_of_a_node:
        return "one for each GPU of this machine"
    ranks = plan.most_nodes * plan.ranks_of_a_node
    kept = "" if plan.nodes.isdigit() else ", which a run keeps that goes on with fewer nodes"
    return f"{plan.most_nodes} node(s) x {plan.ranks_of_a_node} = {ranks}; global batch {config.train.studies_of(ranks)}{kept}"


def _typed(environment: Mapping[str, str], command: list[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])


def _check(plan: Plan) -> None:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", plan.nodes)
    if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
        raise ValueError(f"--nodes {plan.nodes}: must be a number from 1, or a range of them, as in --nodes 2-4")
    if plan.launcher not in ("srun", "deepspeed", "local"):
        raise ValueError(f"--launcher {plan.launcher}: must be srun, deepspeed or local")
    for name in ("gpus_per_node", "ranks_per_node", "cpus_per_node"):
        if getattr(plan, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(plan, name)}: must not be negative")
    if plan.launcher != "local":
        _check_job(plan)
    elif plan.nodes != "1" or plan.options:
        raise ValueError("--launcher local: is one machine; leave out --nodes and the options of sbatch, or take srun")


def _check_job(plan: Plan) -> None:
    if not plan.ranks_of_a_node:
        raise ValueError("--gpus-per-node 0: no ranks; give the GPUs of a node, or on CPUs --ranks-per-node")
    if 0 < plan.cpus_per_node < plan.ranks_of_a_node:
        raise ValueError(
            f"--cpus-per-node {plan.cpus_per_node}: must be at least one for each of {plan.ranks_of_a_node} ranks"
        )
    if plan.gpus_per_node and plan.ranks_per_node > plan.gpus_per_node:
        raise ValueError(
            f"--ranks-per-node {plan.ranks_per_node}: must be at most --gpus-per-node {plan.gpus_per_node}; a rank has a GPU "
            "of its own"
        )


def _make_folder(arguments: list[str]) -> Path:
    parser = argparse.ArgumentParser(prog="imitate_ds.launch", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    given: Any = parser.parse_args(arguments)
    config = load_any_run(given.config, given.set)
    os.umask(0o077 if config.share == "private" else 0o027)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config.run_dir


if __name__ == "__main__":
    try:
        print(_make_folder(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"imitate_ds.launch: {error}", file=sys.stderr)
        sys.exit(2)
