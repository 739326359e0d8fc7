"""What a run should be told of before it is lost: steps without a finite gradient, losses that jump, a temperature that died,
a rank that all others wait for."""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from imitate_ds.distributed import from_main, gather_objects, world
from imitate_ds.training.checkpoint import Checkpoints
from imitate_ds.training.checkpoint_files import Keep

BAD_STEPS = "bad_steps"
HISTORY = 50  # logged losses that a new one is compared with, and at least so many before it is
ENOUGH = 10
SPIKE = 8  # times the usual distance from the median
LAGGING = 0.2  # of the time that the others wait for one rank


class BadSteps:
    """Steps that were skipped, since the gradient of some rank was not finite. Every method is a collective."""

    def __init__(self, run_dir: Path, limit: int, *, start_step: int):
        self.folder, self.limit = run_dir / BAD_STEPS, limit
        self._weights = Checkpoints(self.folder, Keep(last=1))
        self.count = from_main(lambda: _forget_after(self.folder, start_step))

    def note(
        self, engine: Any, step: int, keys: list[str], losses: Mapping[str, Tensor], norm: Tensor | float, state: dict
    ) -> None:
        """Write down a step that was skipped, and the weights it began with, for `imitate-ds replay`.

        Raises FloatingPointError on all ranks above the limit.
        """
        here = {name: _as_json(value) for name, value in losses.items()}
        ranks = gather_objects({"keys": keys, "losses": here})
        self._weights.save(engine, step, state)
        record = {"step": step, "gradient_norm": _as_json(norm), "ranks": ranks}
        path = self.folder / f"step-{step:08d}.json"
        from_main(lambda: path.write_text(json.dumps(record, indent=1), encoding="utf-8"))
        self.count += 1
        if self.count > self.limit:
            bad = sorted({name for rank in ranks for name, value in rank["losses"].items() if isinstance(value, str)})
            raise FloatingPointError(
                f"step {step}: {', '.join(bad) or 'the gradient'} is not finite, by now in {self.count} steps that were skipped "
                f"(train.max_bad_steps = {self.limit}). {path} has keys and losses; 'imitate-ds replay {self.folder.parent} "
                f"--step {step}' does that step again. Lower optim.lr, or use train.precision: fp32 to see whether it is the "
                "precision; --set train.resume=true goes on from the newest checkpoint"
            )


class Watch:
    """Looks at what is logged, and says what is unusual."""

    def __init__(self, lowest_temperature: float = 0.0):
        self.lowest_temperature = lowest_temperature  # of a temperature that is learned; 0: it is not
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._dead = False
        self._slow: tuple[int, int] = (-1, 0)

    def warnings(self, scalars: Mapping[str, float]) -> list[str]:
        """What is to be said of one logged step."""
        return [*self._spike(scalars["loss"]), *self._temperature(scalars), *self._slowest(scalars)]

    def _spike(self, loss: float) -> list[str]:
        found: list[str] = []
        if len(self._losses) >= ENOUGH and math.isfinite(loss):
            usual = statistics.median(self._losses)
            spread = statistics.median(abs(value - usual) for value in self._losses)
            if loss - usual > SPIKE * max(spread, 1e-3 * abs(usual)):
                found.append(
                    f"the loss jumped to {loss:.4g}, from about {usual:.4g}; what was in the batch: imitate-ds shards order"
                )
        if math.isfinite(loss):
            self._losses.append(loss)
        return found

    def _temperature(self, scalars: Mapping[str, float]) -> list[str]:
        """Said once: a temperature at its floor does not come back."""
        if not self.lowest_temperature or self._dead:
            return []
        self._dead = scalars["temperature"] < 1.02 * self.lowest_temperature
        told = (
            f"the learned temperature is at its floor, {self.lowest_temperature:g}; lower optim.lr, or set it constant"
        )
        return [told] if self._dead else []

    def _slowest(self, scalars: Mapping[str, float]) -> list[str]:
        """Said when the same rank lags three times in a row."""
        if scalars.get("lag_share", 0.0) <= LAGGING:
            self._slow = (-1, 0)
            return []
        rank, times = int(scalars["slowest_rank"]), self._slow[1] + 1 if self._slow[0] == scalars["slowest_rank"] else 1
        self._slow = rank, times
        if times != 3:
            return []
        return [
            f"rank {rank} is behind: another one waits {scalars['lag_share']:.0%} of the time longer than it in collectives; "
            f"it waits {scalars['slowest_rank_data_wait_share']:.0%} of the time for data. 'imitate-ds doctor' looks for why"
        ]


def _as_json(value: Tensor | float) -> float | str:
    """JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _forget_after(folder: Path, step: int) -> int:
    """Remove the records of steps that are about to be done again; how many are left."""
    records = sorted(folder.glob("step-*.json"))
    again = [path for path in records if int(path.stem.removeprefix("step-")) >= step]
    for path in again:
        path.unlink()
    return len(records) - len(again)


def straggler(before: Tensor, now: Tensor, seconds: float) -> dict[str, float]:
    """Who is waited for. before, now [ranks, 2]: seconds in collectives, and waiting for data, since the start.

    The rank that the others wait for is the one that waits least itself; lag_share is by how much less than the one that
    waits most.
    """
    if world().size == 1:
        return {}
    spent = (now - before) / max(seconds, 1e-9)
    slowest = int(spent[:, 0].argmin())
    lag = float(spent[:, 0].max() - spent[slowest, 0])
    return {
        "lag_share": min(1.0, lag),
        "slowest_rank": slowest,
        "slowest_rank_data_wait_share": min(1.0, float(spent[slowest, 1])),
    }
