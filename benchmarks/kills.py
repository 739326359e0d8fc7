"""A real run of two ranks, killed with SIGKILL a hundred times at random moments: is any study lost, or seen twice?

    python benchmarks/kills.py [--kills 100] [--shards shards/phantom]

Each attempt is two processes under gloo that go on from the newest checkpoint. A moment after the start (now and then
while it still starts) one of them, or both, get SIGKILL; what has not ended ten seconds later is killed too, as a
launcher does. Every rank writes down what it consumed: keys, and a hash of the views. Then the run is left alone to its
end, and is compared with one that was never disturbed: the studies of every step that counts, against the plan; views,
bit by bit; the loss of every step. Training is in float32 with the default augmentation. Writes
benchmarks/results/kills.json; stops with status 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from common import REPOSITORY, machine, provenance

from imitate_ds.config import build_data_config
from imitate_ds.data.shard_order import order_lines

RANKS, BATCH, SEED = 2, 16, 42
SETTINGS = [
    *("data.input_size=32", "data.workers=1", "data.val_split=", "train.epochs=100", "train.precision=fp32"),
    *(
        "model.image_encoder=resnet18",
        "model.joint_dim=32",
        "model.text_hidden=32",
        "model.aggregation={pool: 4, slots: 128}",
    ),
    *(f"train.micro_batch_size={BATCH}", "train.log_every=1", "train.images_every=0", "train.save_every=5"),
    *("train.resume=true", "optim.lr=1e-4", f"seed={SEED}"),
]


class Recorded:
    """The batches of a rank; each is written down before it is trained on."""

    def __init__(self, batches, path: Path):
        self.batches, self.path, self.skipped = batches, path, batches.skipped

    def __iter__(self):
        with self.path.open("a") as file:
            for batch in self.batches:
                views = hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()[:16]
                file.write(json.dumps({"step": batch.step, "keys": batch.keys, "views": views}) + "\n")
                file.flush()
                yield batch


def be_a_rank(arguments: list[str]) -> None:
    """pretrain, with its loader recorded."""
    from imitate_ds import pretrain

    build = pretrain.build_train_loader
    path = Path(os.environ["CONSUMED"])
    pretrain.build_train_loader = lambda *given, **options: Recorded(build(*given, **options), path)
    pretrain.main(arguments)


def start(folder: Path, shards: Path, steps: int, attempt: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = [*SETTINGS, f"output_dir={folder}", "name=run", f"data.shards={shards}", f"train.max_steps={steps}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    ranks = []
    for rank in range(RANKS):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_PORT": port}
        env |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        env |= {"CONSUMED": str(consumed_file(folder, attempt, rank))}
        command = [sys.executable, __file__, "--rank", "--config", "launch/runs/phantom_demo.yaml", *arguments]
        with (folder / f"rank{rank}.log").open("a") as log:
            ranks.append(
                subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
            )
    return ranks


def consumed_file(folder: Path, attempt: int, rank: int) -> Path:
    return folder / f"consumed.{attempt}.{rank}.jsonl"


def read_lines(path: Path) -> list[dict]:
    """Whole lines only: the last may have been cut by the kill."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def kill_somewhere(
    ranks: list[subprocess.Popen], folder: Path, attempt: int, chance: random.Random
) -> tuple[str, bool]:
    """Wait a random moment, kill one rank or both: what was done, and whether the other had to be ended."""
    while_starting = chance.random() < 0.15
    if while_starting:
        time.sleep(chance.uniform(0.5, 8))
    else:
        wait_for(lambda: consumed_file(folder, attempt, 0).exists() or any(r.poll() is not None for r in ranks), 120)
        time.sleep(chance.uniform(0, 8))
    victims = chance.choice([[0], [1], [0, 1]])
    if ended := [number for number, rank in enumerate(ranks) if rank.poll() is not None]:
        raise SystemExit(
            f"rank {ended[0]} ended before it was killed\n{(folder / f'rank{ended[0]}.log').read_text()[-3000:]}"
        )
    for rank in victims:
        os.killpg(ranks[rank].pid, signal.SIGKILL)  # the group: its workers go with it, as when a node loses power
    moment = f"{'starting' if while_starting else 'training'}, rank {' and '.join(map(str, victims))}"
    try:
        wait_for(lambda: all(rank.poll() is not None for rank in ranks), 10)
        return moment, False
    except TimeoutError:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
        return moment, True


def wait_for(condition, limit: float) -> None:
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("a rank neither trained nor ended")
        time.sleep(0.02)


def history(folder: Path, attempts: int) -> tuple[dict[int, list[dict]], int]:
    """What each step that counts consumed, by rank, and how many steps were done again after a kill.

    An attempt begins at the checkpoint it resumes from, so what an earlier one did from that step on does not count.
    """
    steps: dict[int, list[dict]] = {}
    repeated = 0
    for attempt in range(attempts):
        found = [consumed_file(folder, attempt, rank) for rank in range(RANKS)]
        lines = [read_lines(path) if path.exists() else [] for path in found]
        if not any(lines):
            continue
        first = min(line["step"] for rank in lines for line in rank)
        discarded = [step for step in steps if step >= first]
        repeated += len(discarded)
        whole = min(map(len, lines))
        for records in zip(*(rank[:whole] for rank in lines), strict=True):
            step = records[0]["step"]
            earlier = steps.get(step)
            assert not earlier or earlier == list(records), f"step {step} was not the same when it was done again"
        for step in discarded:
            del steps[step]
        steps |= {records[0]["step"]: list(records) for records in zip(*(rank[:whole] for rank in lines), strict=True)}
    return steps, repeated


def losses(folder: Path) -> dict[int, float]:
    path = folder / "run" / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}  # the last word on each step


def compare(disturbed: Path, quiet: Path, attempts: int, shards: Path, steps: int) -> dict:
    got, repeated = history(disturbed, attempts)
    undisturbed, _ = history(quiet, 1)
    data = build_data_config({"shards": str(shards)})
    plan = [
        line.split()[1:] for line in order_lines(data, seed=SEED, global_batch_size=RANKS * BATCH, steps=range(steps))
    ]
    consumed = [sorted(key for rank in got.get(step, []) for key in rank["keys"]) for step in range(steps)]
    lost = sum((Counter(plan[step]) - Counter(consumed[step])).total() for step in range(steps))
    twice = sum((Counter(consumed[step]) - Counter(plan[step])).total() for step in range(steps))
    one, other = losses(disturbed), losses(quiet)
    return {
        "steps": steps,
        "studies": steps * RANKS * BATCH,
        "lost": lost,
        "seen_twice_or_foreign": twice,
        "steps_with_other_views": sum(got.get(step) != undisturbed[step] for step in range(steps)),
        "steps_done_again_after_a_kill": repeated,
        "losses_compared": len(one),
        "largest_difference_of_a_loss": max(abs(one[step] - other[step]) for step in other),
        "losses_missing": len(other.keys() - one.keys()),
    }


def disturb(folder: Path, given: argparse.Namespace) -> dict:
    """Start and kill, again and again, then let the run end."""
    chance, began = random.Random(0), time.perf_counter()
    moments: Counter[str] = Counter()
    ended = 0
    for attempt in range(given.kills):
        moment, had_to_end = kill_somewhere(start(folder, given.shards, given.steps, attempt), folder, attempt, chance)
        moments[moment] += 1
        ended += had_to_end
        done = max(losses(folder), default=0)
        print(f"kill {attempt + 1} ({moment}), step {done}, {time.perf_counter() - began:.0f} s", flush=True)
    run_to_the_end(folder, given, given.kills)
    return {"moments": dict(moments), "ranks_that_waited_for_the_dead": ended}


def run_to_the_end(folder: Path, given: argparse.Namespace, attempt: int) -> None:
    statuses = [rank.wait() for rank in start(folder, given.shards, given.steps, attempt)]
    if any(statuses):
        raise SystemExit(f"{folder.name}: status {statuses}\n" + (folder / "rank0.log").read_text()[-3000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--shards", type=Path, default=Path("shards/phantom"))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "kills.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        disturbed, quiet = Path(name) / "disturbed", Path(name) / "quiet"
        disturbed.mkdir()
        quiet.mkdir()
        how = disturb(disturbed, given)
        run_to_the_end(quiet, given, 0)
        found = compare(disturbed, quiet, given.kills + 1, given.shards, given.steps)
    record = {**provenance(), "machine": machine(torch.device("cpu")), "kills": given.kills, **how, **found}
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    wrong = ("lost", "seen_twice_or_foreign", "steps_with_other_views", "losses_missing")
    if any(found[name] for name in wrong) or found["largest_difference_of_a_loss"] > 1e-6:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        be_a_rank(sys.argv[2:])
    else:
        main()
