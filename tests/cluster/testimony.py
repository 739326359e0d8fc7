"""What a run consumed and learned through all that happened to it, against the plan and against a run that was left alone."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from imitate_ds.config import RunConfig
from imitate_ds.data.shard_order import order_lines


class Verdict(NamedTuple):
    steps: int
    studies: int
    lost: int  # studies of the plan that a step did not get
    foreign: int  # studies that a step got twice, or that are not its own
    repeated: int  # steps that were done again after a fault
    losses_missing: int
    loss_difference: float  # the largest, relative


def judge(run_dir: Path, undisturbed: Path, consumed: Path, config: RunConfig, global_batch_size: int) -> Verdict:
    """Compare a run that has ended with the plan of its studies, and with the losses of the undisturbed one."""
    expected = losses(undisturbed)
    steps = max(expected)
    got, repeated = history(consumed)
    lines = order_lines(config.data, seed=config.seed, global_batch_size=global_batch_size, steps=range(steps))
    plan = {int(step): Counter(keys) for step, *keys in map(str.split, lines)}
    found = losses(run_dir)
    return Verdict(
        steps=steps,
        studies=sum(map(Counter.total, plan.values())),
        lost=sum((keys - got[step]).total() for step, keys in plan.items()),
        foreign=sum((keys - plan.get(step, Counter())).total() for step, keys in got.items()),
        repeated=repeated,
        losses_missing=len(expected.keys() - found.keys()),
        loss_difference=max(abs(found[step] / loss - 1) for step, loss in expected.items() if step in found),
    )


def history(consumed: Path) -> tuple[dict[int, Counter], int]:
    """The studies of every step that counts, of all ranks together, and how many steps were done again.

    A start begins at the checkpoint it goes on from: what an earlier one did from that step on does not count.
    """
    steps: dict[int, Counter] = defaultdict(Counter)
    repeated = 0
    for _, ranks in sorted(starts(consumed).items()):
        if not any(ranks):
            continue
        first = min(line["step"] for lines in ranks for line in lines)
        discarded = [step for step in steps if step >= first]
        repeated += len(discarded)
        for step in discarded:
            del steps[step]
        for line in (line for lines in ranks for line in lines):
            steps[line["step"]].update(line["keys"])
    return steps, repeated


def starts(consumed: Path) -> dict[int, list[list[dict]]]:
    """Of every start, what each rank wrote down."""
    found: dict[int, list[list[dict]]] = defaultdict(list)
    for path in sorted(consumed.glob("*.jsonl")):
        found[int(path.name.split(".")[0])].append(read_lines(path))
    return found


def losses(run_dir: Path) -> dict[int, float]:
    """Of every step, the last word on it."""
    path = run_dir / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def read_lines(path: Path) -> list[dict]:
    """Whole lines only: the last may have been cut off."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
