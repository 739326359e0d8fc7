"""What makes a run the same run: the settings and data it must go on with, and what may change on the way."""

import json
from pathlib import Path
from typing import Any

from imitate_ds.distributed import gather_objects
from imitate_ds.run_file import Section, flat_settings

# Settings that may change when a run goes on; all others must be those it was begun with.
FREE_SETTINGS = {
    "name",
    "output_dir",
    "share",
    "report_images",
    "data.shards",  # folders may move; their builds, weights and embeddings may not change
    "data.val_split",
    "data.val_list",
    "data.test_split",
    "data.test_list",
    "data.train_list",  # may move; the samples on it may not change
    "data.workers",
    "data.max_skipped",
    "data.verify",
    "data.augment_on",
    "data.cache_dir",
    "data.cache_gib",
    "train.micro_batch_size",  # what counts is the global batch size, which stays
    "train.global_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.deepspeed",
    "train.resume",
    "train.save_every",
    "train.save_in_background",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.best_metric",
    "train.max_bad_steps",
    "train.timeout_s",
    "train.eval_every",
    "train.log_every",
    "train.images_every",
    "train.patience",
    "encoder.init",  # may move; its weights may not change
    "text.encoder",  # likewise
}
# Settings that older checkpoints do not name, and what those were made with.
ADDED = {
    "data.share": 1.0,
    "model.in_chans": 3,
    "model.freeze": [],
    "train.fp8": False,
    "optim.layer_decay": 1.0,
    "text.mode": "cached",
    "text.trainable_layers": "all",
    "text.max_tokens": 0,
    "text.lr_share": 0.1,
}
# Settings that may differ between the ranks of one run: each machine may have its own disk, and its own processors.
RANKS_OWN = {"data.shards", "data.workers", "data.cache_dir", "data.cache_gib"}


def identity(config: Section, data: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON values. data: what the run reads, and how many at once."""
    settings = _settings(config)
    return {**{key: value for key, value in settings.items() if key not in FREE_SETTINGS}, **data}


def check_ranks_agree(config: Section, data: dict[str, Any]) -> None:
    """Raise the same ValueError on every rank where one was given another run: they would wait for each other for ever."""
    settings = _settings(config) | data
    first, *others = gather_objects({key: value for key, value in settings.items() if key not in RANKS_OWN})
    for rank, other in enumerate(others, start=1):
        for key in first:
            if other[key] != first[key]:
                raise ValueError(
                    f"{key} = {other[key]!r} on rank {rank}: must be {first[key]!r}, as on rank 0; start every rank with "
                    "the same run file, overrides and shards"
                )


def check_same_run(now: dict[str, Any], then: dict[str, Any], checkpoint: Path) -> None:
    """Raise ValueError naming what has changed since the checkpoint was made."""
    for key in now:
        if now[key] != (made_with := then.get(key, ADDED.get(key))):
            raise ValueError(
                f"{key} = {now[key]!r}: {checkpoint.name} was made with {made_with!r}, and a run goes on as it "
                "began; set it back, or choose another name"
            )


def _settings(config: Section) -> dict[str, Any]:
    return flat_settings(json.loads(config.model_dump_json()))
