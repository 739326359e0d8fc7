"""One rank of test_engine.py: trains a tiny model at every ZeRO stage and writes down what came out.

Run as `python -m tests.training.zero_worker OUT_DIR` under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from imitate_ds.batch import Batch, Features, Losses, Tokens
from imitate_ds.config import ModelConfig, ObjectiveConfig, OptimConfig, TemperatureConfig, TrainConfig
from imitate_ds.distributed import barrier, init_world, leave_world
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.models.text_tower import TextTower
from imitate_ds.objective import imitate_loss
from imitate_ds.training.batch_norm import set_training_mode
from imitate_ds.training.checkpoint import Checkpoints, find_checkpoint, load_checkpoint, read_state
from imitate_ds.training.checkpoint_files import Keep
from imitate_ds.training.engine import build_engine, full_state_dict, take_step
from imitate_ds.training.grad_cache import backward_in_chunks
from tests.tiny_bert import tiny_bert

STEPS, STUDIES, TEXT_WIDTH, SIZE, WORDS = 4, 8, 16, 32, 20
OBJECTIVE = ObjectiveConfig(target_norm="ref", temperature=TemperatureConfig(learnable=True))
STRIPS = OBJECTIVE.model_copy(update={"backend": "strips"})
OPTIM = OptimConfig(lr=1e-3, grad_clip=1.0)
MODEL = ModelConfig.model_validate(
    {
        "image_encoder": "resnet10t",
        "joint_dim": 16,
        "text_hidden": 32,
        "image_hidden": 32,
        "projection_norm": "layer",
        "aggregation": {"keep": [0.25, 0.15, 0.1, 0.1], "pool": 4, "heads": 2, "slots": 160},
    }
)


def build_model(layers: int | Literal["all"] | None = None) -> ImitateModel:
    """layers: of a text encoder, that learn; None: there is none."""
    tower = None if layers is None else TextTower(tiny_bert(WORDS, dropout=0.0), layers)
    torch.manual_seed(0)
    width = tower.width if tower else TEXT_WIDTH
    return ImitateModel(MODEL, width, input_size=SIZE, temperature=OBJECTIVE.temperature, text_tower=tower)


def global_batch(step: int) -> Batch:
    """The whole batch of a step: ragged masks, two views."""
    generator = torch.Generator().manual_seed(step)
    return Batch(
        keys=[f"{step:02x}{i:014x}" for i in range(STUDIES)],
        images=torch.randint(0, 256, (STUDIES, 2, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        findings=torch.randn(STUDIES, TEXT_WIDTH, generator=generator),
        impression=torch.randn(STUDIES, TEXT_WIDTH, generator=generator),
        has_findings=torch.tensor([True, True, False, True, False, True, True, True]),
        has_impression=torch.tensor([True, True, True, True, True, False, True, True]),
        step=step,
    )


def rank_batch(step: int, rank: int, world_size: int) -> Batch:
    return global_batch(step).split(world_size)[rank]


def batch_with_tokens(step: int) -> Batch:
    """In step 1 the second half of it is without any text."""
    batch, generator = global_batch(step), torch.Generator().manual_seed(step)
    has = torch.stack([batch.has_findings, batch.has_impression], dim=1)
    has[STUDIES // 2 :] &= step != 1
    lengths = torch.randint(3, 12, has.shape, generator=generator) * has
    ids = torch.randint(5, 5 + WORDS, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    return batch._replace(has_findings=has[:, 0], has_impression=has[:, 1], tokens=Tokens(ids, lengths))


def train_config(stage: int, precision: str = "fp32", batch_norm: str = "freeze", chunk: int = 0) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "micro_batch_size": STUDIES // 2,
            "deepspeed": f"zero{stage}",
            "batch_norm": batch_norm,
            "precision": precision,
            "grad_cache_chunk": chunk,
        }
    )


def train(
    engine,
    rank: int,
    world_size: int,
    steps: range,
    policy: str = "freeze",
    chunk: int = 0,
    objective=OBJECTIVE,
    make_batch: Callable[[int], Batch] = global_batch,
) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        set_training_mode(engine.module, policy)
        batch = make_batch(step).split(world_size)[rank]

        def loss_of(features: Features, batch: Batch = batch) -> tuple[Tensor, Losses]:
            terms = imitate_loss(features, batch, objective)
            return terms.total, terms

        if chunk:
            loss = backward_in_chunks(engine, batch.split(len(batch.keys) // chunk), Features.join, loss_of)[1].total
        else:
            loss = loss_of(engine(batch))[0]
            engine.backward(loss)
        norms.append(float(take_step(engine).norm))
        losses.append(loss.item())
    return losses, norms


def main(out: Path) -> None:
    here = init_world()
    record: dict = {}
    for stage in range(4):
        engine = build_engine(build_model(), train_config(stage), OPTIM)
        folder = out / f"zero{stage}"
        losses, norms = train(engine, here.rank, here.size, range(2))
        Checkpoints(folder, Keep(last=2)).save(engine, 2, {"step": 2})
        more = train(engine, here.rank, here.size, range(2, STEPS))
        state = full_state_dict(engine)
        engine.eval()
        with torch.no_grad():
            embedding = engine(rank_batch(99, here.rank, here.size)).image_impression[:, 0].tolist()

        again = build_engine(build_model(), train_config(stage), OPTIM)
        checkpoint = find_checkpoint(folder)
        assert checkpoint is not None
        assert load_checkpoint(again, checkpoint) == {"step": 2} == read_state(checkpoint)
        resumed = train(again, here.rank, here.size, range(2, STEPS))

        cached = build_engine(build_model(), train_config(stage, chunk=2), OPTIM)
        chunked = train(cached, here.rank, here.size, range(STEPS), chunk=2)
        apart = {name: (rows - state[name]).abs().max().item() for name, rows in full_state_dict(cached).items()}

        # Two steps: by the fourth, a unit that switches has made 2e-4 of the seventh digit in which the forms differ.
        other = build_engine(build_model(), train_config(stage), OPTIM)
        strips = train(other, here.rank, here.size, range(2), objective=STRIPS)

        tokens, towers = {"make_batch": batch_with_tokens}, {}
        for layers, size in (("all", 0), (1, 2)):
            tower = build_engine(build_model(layers), train_config(stage, chunk=size), OPTIM)
            towers[layers] = train(tower, here.rank, here.size, range(2), chunk=size, **tokens)
        tower = build_engine(build_model(1), train_config(stage, "bf16"), OPTIM)
        towers["bf16"] = train(tower, here.rank, here.size, range(1), **tokens)

        autocast = build_engine(build_model(), train_config(stage, "bf16", "mean"), OPTIM)
        half = train(autocast, here.rank, here.size, range(2), "mean")[0]
        if here.is_main:
            torch.save(state, out / f"state{stage}.pt")
        record[f"zero{stage}"] = {
            "losses": losses + more[0],
            "norms": norms + more[1],
            "resumed": resumed[0],
            "embedding": embedding,
            "chunked": chunked,
            "apart": apart,
            "strips": strips,
            "bf16": half,
            "towers": towers,
        }
        barrier()
    (out / f"rank{here.rank}.json").write_text(json.dumps(record))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
