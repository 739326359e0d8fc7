"""One rank of test_memory.py: builds and trains a tiny model in every way that saves memory, and writes down what came out.

Run as `python -m tests.training.memory_worker OUT_DIR` under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imitate_ds.config import ModelConfig
from imitate_ds.distributed import barrier, init_world, leave_world
from imitate_ds.finetune_config import EncoderConfig
from imitate_ds.models.adaptation import TaskModel
from imitate_ds.models.encoder_parts import encoder_parts
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.training.activation_checkpointing import checkpoint_activations
from imitate_ds.training.engine import build_engine, full_state_dict, sharded_build
from imitate_ds.training.sharded_build import join, share_of
from tests.training.zero_worker import OPTIM, SIZE, build_model, train, train_config

STEPS = 3
WAYS = {  # name: DeepSpeed configuration, checkpoints, chunk of GradCache
    "zero1": ("zero1", "none", 0),
    "zero2 stage": ("zero2", "stage", 0),
    "zero2 offload": ("zero2_offload", "none", 0),
    "zero3 block": ("zero3", "block", 0),
    "zero3 offload": ("zero3_offload", "stage", 0),
    "zero1 chunks": ("zero1", "none", 2),
    "zero3 chunks": ("zero3", "block", 2),
}


def build_encoder(name: str, weights: str = "none") -> nn.Module:
    torch.manual_seed(1)
    return ImageEncoder(ModelConfig(image_encoder=name, weights=weights), SIZE)


def build_low_rank() -> nn.Module:
    torch.manual_seed(1)
    encoder = ImageEncoder(ModelConfig(image_encoder="resnet10t"), SIZE)
    config = EncoderConfig(train="lora", model=ModelConfig(image_encoder="resnet10t"))
    return TaskModel(encoder, nn.Linear(512, 2), config)


def compare_builds(out: Path) -> dict[str, dict]:
    """Built by two ranks and by one: are the weights the same, and how much of them does a rank hold?"""
    weights = out / "weights.safetensors"
    if init_world().is_main:
        torch.manual_seed(9)
        backbone = ImageEncoder(ModelConfig(image_encoder="resnet10t")).backbone
        save_file(backbone.state_dict(), weights)
    barrier()
    builds = {
        "resnet": lambda: build_encoder("resnet10t"),
        "resnet from a file": lambda: build_encoder("resnet10t", str(weights)),
        "convnext": lambda: build_encoder("convnext_atto"),
        "vit": lambda: build_encoder("test_vit"),
        "low rank": build_low_rank,
        "the whole model": build_model,
    }
    found = {}
    for name, build in builds.items():
        whole = build()
        drawn = torch.get_rng_state()
        with sharded_build(train_config(3)):
            cut = build()
        same_draws = torch.equal(torch.get_rng_state(), drawn)
        rows = [share.rows.numel() for parameter in cut.parameters() if (share := share_of(parameter))]
        held = sum(rows) + sum(parameter.numel() for parameter in cut.parameters())
        for parameter in cut.parameters():
            join(parameter)
        ours = cut.state_dict()
        found[name] = {
            "same": all(torch.equal(tensor, ours[key]) for key, tensor in whole.state_dict().items()),
            "frozen": [p.requires_grad for p in cut.parameters()] == [p.requires_grad for p in whole.parameters()],
            "draws": same_draws,
            "share": held / sum(parameter.numel() for parameter in whole.parameters()),
        }
    return found


def train_one(way: str) -> dict:
    deepspeed, checkpoints, chunk = WAYS[way]
    here = init_world()
    settings = train_config(1, batch_norm="mean", chunk=chunk).model_copy(update={"deepspeed": deepspeed})
    with sharded_build(settings):
        model = build_model()
        if checkpoints != "none":
            checkpoint_activations(encoder_parts(model.image_encoder, checkpoints))  # type: ignore[arg-type]
    engine = build_engine(model, settings, OPTIM)
    losses, norms = train(engine, here.rank, here.size, range(STEPS), "mean", chunk)
    state: dict[str, Tensor] = full_state_dict(engine)
    counter = next(value for name, value in state.items() if name.endswith("num_batches_tracked"))
    return {"losses": losses, "norms": norms, "counted": int(counter)}


def main(out: Path) -> None:
    here = init_world()
    record = {"builds": compare_builds(out), "ways": {way: train_one(way) for way in WAYS}}
    (out / f"rank{here.rank}.json").write_text(json.dumps(record))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
