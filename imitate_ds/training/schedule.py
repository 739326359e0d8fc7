"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from imitate_ds.config import OptimConfig


def restart_period(samples: int, global_batch_size: int, epochs: int) -> int:
    """Steps of `epochs` epochs, fractions of a batch counted: 33,341 for 213,384 pairs at batch 128 and 20 epochs."""
    return max(1, int(samples / global_batch_size * epochs))


def learning_rate(step: int, total_steps: int, optim: OptimConfig, *, period: int | None = None) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine to final_lr_share, over all steps or `period` by period."""
    warmup = round(optim.warmup_share * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "cosine_restarts":
        if period is None:
            raise ValueError("optim.schedule = 'cosine_restarts' needs a period")
        progress = ((step - warmup) % period) / period
    else:
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = optim.final_lr_share
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
