"""One rank of test_elastic.py: goes on from the newest checkpoint, on as many ranks and at the stage it is told.

Run as `python -m tests.training.elastic_worker FOLDER STAGE STOP LOSSES.json [--background]` under RANK, WORLD_SIZE, ...
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from imitate_ds.batch import Batch
from imitate_ds.data.shard_plan import rank_rows
from imitate_ds.distributed import init_world, leave_world
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.objective import imitate_loss
from imitate_ds.training.batch_norm import BATCH_NORMS, set_training_mode
from imitate_ds.training.checkpoint import Checkpoints, find_checkpoint, load_checkpoint
from imitate_ds.training.checkpoint_files import Keep
from imitate_ds.training.engine import build_engine, full_state_dict, take_step
from tests.training.zero_worker import MODEL, OBJECTIVE, OPTIM, SIZE, STUDIES, TEXT_WIDTH, global_batch, train_config

# At a rate of 1e-4 the seventh digit of a loss grows to the fourth within 30 steps, on any ranks.
GENTLE = OPTIM.model_copy(update={"lr": 1e-6})


def build_model(seed: int) -> ImitateModel:
    """With statistics, and so frozen weights, that only a checkpoint can restore where the seed is another one."""
    torch.manual_seed(seed)
    model = ImitateModel(MODEL, TEXT_WIDTH, input_size=SIZE, temperature=OBJECTIVE.temperature)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
    return model


def rank_batch(step: int, rank: int, size: int) -> Batch:
    """This rank's rows; ranks hold as many, or one more than others."""
    whole, rows = global_batch(step), rank_rows(STUDIES, rank, size)
    part = slice(rows.start, rows.stop)
    return Batch(*(value[part] if isinstance(value, (list, torch.Tensor)) else value for value in whole))


def main(folder: Path, stage: int, stop: int, out: Path, *, background: bool) -> None:
    here = init_world()
    checkpoint = find_checkpoint(folder)
    engine = build_engine(build_model(seed=stop if checkpoint else 0), train_config(stage), GENTLE)
    start = load_checkpoint(engine, checkpoint)["step"] if checkpoint else 0
    if checkpoint:  # what was loaded, written anew: to be compared with what had been saved
        Checkpoints(folder.parent / f"again-{start}", Keep(last=1)).save(engine, start, {"step": start})
    checkpoints = Checkpoints(folder, Keep(last=3), in_background=background)
    losses = {}
    for step in range(start, stop):
        set_training_mode(engine.module, "freeze")
        batch = rank_batch(step, here.rank, here.size)
        loss = imitate_loss(engine(batch), batch, OBJECTIVE).total
        engine.backward(loss)
        assert take_step(engine).applied
        losses[step] = loss.item()
        if background and step == start:
            checkpoints.save(engine, step + 1, {"step": step + 1})  # while it is written, training goes on
        checkpoints.poll()
    checkpoints.save(engine, stop, {"step": stop})
    checkpoints.finish()
    state = full_state_dict(engine)
    if here.is_main:
        sums = {name: tensor.double().sum().item() for name, tensor in state.items()}
        out.write_text(json.dumps({"losses": losses, "sums": sums, "start": start}))
    leave_world()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), background="--background" in sys.argv
    )
