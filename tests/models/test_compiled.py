"""Compiled towers learn what plain ones learn, and say why where they cannot be compiled. All of them: benchmarks/speedups.py."""

import pytest
import torch
from torch._dynamo.utils import counters as of_the_compiler
from torch._inductor import config as inductor

from imitate_ds.config import ModelConfig, build_run_config
from imitate_ds.finetune_config import build_finetune_config
from imitate_ds.models.compiled import compile_towers
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.objective import imitate_loss
from imitate_ds.recipe import _save_time
from imitate_ds.training.flops import count_flops
from imitate_ds.training.held_memory import count_saved
from tests.training.zero_worker import MODEL, OBJECTIVE, SIZE, TEXT_WIDTH, global_batch

RUN = {"name": "x", "data": {"shards": "x"}}


def build(towers: list[str], said: list[str]) -> ImitateModel:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**MODEL.model_dump(), "projection_norm": "batch"})
    model = ImitateModel(config, TEXT_WIDTH, input_size=SIZE).train()
    compile_towers(model, towers, said.append)
    return model


def learn(model: ImitateModel, steps: range) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-4), []
    for step in steps:
        batch = global_batch(step)
        loss = imitate_loss(model(batch), batch, OBJECTIVE).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(towers: list[str], said: list[str], steps: int = 3) -> tuple[list[float], ImitateModel]:
    model = build(towers, said)
    return learn(model, range(steps)), model


def batches_seen(model: ImitateModel) -> dict[str, int]:
    """By every BatchNorm."""
    return {name: int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}


def test_a_compiled_tower_learns_the_same():
    said: list[str] = []
    losses, model = train(["projections"], said)
    plain, other = train([], said)
    assert not said
    assert losses == pytest.approx(plain, rel=1e-5)
    assert model.state_dict().keys() == other.state_dict().keys()
    batches, wanted = batches_seen(model), batches_seen(other)
    assert batches == wanted
    assert wanted["text_projection.layers.1.num_batches_tracked"] == 3


def test_a_counted_step_runs_uncompiled_and_the_next_one_compiled():
    said: list[str] = []
    torch.compiler.reset()
    of_the_compiler.clear()
    found = []
    for towers in ([], ["projections"]):
        model = build(towers, said)
        with count_flops(model) as flops, count_saved(model) as saved:
            losses = learn(model, range(1))
        assert not of_the_compiler["stats"]
        losses += learn(model, range(1, 2))
        found.append((losses, flops, saved.most))
    assert of_the_compiler["stats"]["unique_graphs"] == 2
    assert not said
    plain, compiled = found
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    assert compiled[1:] == plain[1:]


def test_chunks_of_many_sizes_are_compiled():
    said: list[str] = []
    torch.compiler.reset()
    of_the_compiler.clear()
    model, batch = build(["projections"], said), global_batch(0)
    for studies in (2, 3, 4, 5, 6):
        with torch.no_grad():
            model.impression_head(torch.randn(studies, model.image_encoder.channels[-1]))
            model.text_projection(batch.impression[:studies])
    assert not said
    assert of_the_compiler["stats"]["unique_graphs"] == 10  # torch's own limit is eight


def test_without_a_compiler_a_tower_goes_on_and_says_why_once():
    said: list[str] = []
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}):
        losses, _ = train(["projections"], said)
    torch.compiler.reset()
    assert len(said) == 1
    assert said[0].startswith("train.compile: projections goes on uncompiled: ")
    assert "No working C++ compiler" in said[0]
    assert losses == train([], said)[0]


def refuse_backward(graph: torch.fx.Graph) -> None:
    """A pass of the compiler that cannot cope with what a backward pass is given."""
    if any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder")):
        raise NotImplementedError("a backward pass is too much")


def test_where_the_backward_pass_alone_cannot_be_compiled_a_tower_goes_on_from_the_first_step():
    said: list[str] = []
    torch.compiler.reset()
    with inductor.patch({"post_grad_custom_pre_pass": refuse_backward, "force_disable_caches": True}):
        losses, model = train(["projections"], said, steps=2)
    torch.compiler.reset()
    assert len(said) == 1
    assert "projections goes on uncompiled" in said[0]
    assert "a backward pass is too much" in said[0]
    plain, other = train([], said, steps=2)
    assert losses == plain
    assert batches_seen(model) == batches_seen(other)


def test_what_cannot_be_compiled_together_is_refused():
    train_section = {"compile": ["image_encoder"], "activation_checkpointing": "block"}
    with pytest.raises(ValueError, match=r"train\.activation_checkpointing = 'block': a compiled image encoder"):
        build_run_config({**RUN, "train": train_section})
    with pytest.raises(ValueError, match=r"train\.compile"):
        build_run_config({**RUN, "train": {"compile": ["loss"]}})
    task = {"encoder": {"model": {}}, "task": {"kind": "classification"}, "train": {"compile": ["image_encoder"]}}
    with pytest.raises(ValueError, match=r"train\.compile = \['image_encoder'\]: is for contrastive pre-training"):
        build_finetune_config({**RUN, **task})
    config = build_run_config({**RUN, "train": {"compile": ["projections"], "deepspeed": "zero3"}})
    with pytest.raises(ValueError, match=r"train\.compile = \['projections'\]: at ZeRO-3"):
        _save_time(ImitateModel(MODEL, TEXT_WIDTH, input_size=SIZE), config.train)
