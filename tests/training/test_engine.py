"""The engine: two DeepSpeed ranks at ZeRO 0 to 3 against one plain process, resume, export, and what it refuses."""

import json

import pytest
import torch
from torch import nn

from imitate_ds.config import OptimConfig, TrainConfig
from imitate_ds.distributed import init_world
from imitate_ds.objective import imitate_loss
from imitate_ds.training.batch_norm import set_training_mode
from imitate_ds.training.engine import (
    build_engine,
    build_optimizer,
    deepspeed_config,
    load_deepspeed_json,
    parameter_groups,
    take_step,
)
from tests.launching import run
from tests.training.zero_worker import (
    OBJECTIVE,
    OPTIM,
    STEPS,
    batch_with_tokens,
    build_model,
    global_batch,
    rank_batch,
    train_config,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("zero")
    run("tests.training.zero_worker", str(out))
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    return alone(build_model(), STEPS, global_batch)


def alone(model, steps, make_batch):
    """The same steps in plain PyTorch on the whole batch."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
    optimizer = build_optimizer(model, OPTIM, on_cuda=False)
    losses, norms = [], []
    for step in range(steps):
        set_training_mode(model, "freeze")
        batch = make_batch(step)
        loss = imitate_loss(model(batch), batch, OBJECTIVE).total
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip).item())
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_equal_one_process(two_ranks, one_process, stage):
    _, ranks = two_ranks
    _, losses, norms = one_process
    for rank in ranks:
        assert rank[f"zero{stage}"]["losses"] == pytest.approx(losses, rel=2e-5)
        assert rank[f"zero{stage}"]["norms"] == pytest.approx(norms, rel=2e-4)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("layers", ["all", 1])
def test_a_text_encoder_learns_on_two_ranks_as_in_one_process(two_ranks, layers, stage):
    """Also where a rank has no text at all; with one layer also in chunks, of which some have none."""
    _, losses, norms = alone(build_model(layers), 2, batch_with_tokens)
    for rank in two_ranks[1]:
        found = rank[f"zero{stage}"]["towers"]
        assert found[str(layers)][0] == pytest.approx(losses, rel=2e-5)
        assert found[str(layers)][1] == pytest.approx(norms, rel=2e-4)
        assert found["bf16"][0] == pytest.approx(losses[:1], rel=0.05)


@pytest.mark.parametrize("stage", range(4))
def test_strips_train_as_the_dense_form_does(two_ranks, stage):
    for rank in two_ranks[1]:
        losses, norms = rank[f"zero{stage}"]["strips"]
        assert losses == pytest.approx(rank[f"zero{stage}"]["losses"][:2], rel=2e-6)
        assert norms == pytest.approx(rank[f"zero{stage}"]["norms"][:2], rel=2e-5)


@pytest.mark.parametrize("stage", range(4))
def test_exported_weights_give_the_engines_embedding(two_ranks, stage):
    out, ranks = two_ranks
    model = build_model()
    model.load_state_dict(torch.load(out / f"state{stage}.pt", weights_only=True))
    model.eval()
    for rank in range(2):
        with torch.no_grad():
            embedding = model(rank_batch(99, rank, 2)).image_impression[:, 0]
        torch.testing.assert_close(embedding, torch.tensor(ranks[rank][f"zero{stage}"]["embedding"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", range(4))
def test_resume_is_exact(two_ranks, stage):
    for rank in two_ranks[1]:
        assert rank[f"zero{stage}"]["resumed"] == rank[f"zero{stage}"]["losses"][2:]


@pytest.mark.parametrize("stage", range(4))
def test_chunks_give_the_step_of_the_whole_batch(two_ranks, stage):
    for rank in two_ranks[1]:
        whole, (losses, norms) = rank[f"zero{stage}"], rank[f"zero{stage}"]["chunked"]
        assert losses == pytest.approx(whole["losses"], rel=2e-5)
        assert norms == pytest.approx(whole["norms"], rel=2e-5)
        assert max(whole["apart"].values()) < 2e-5


@pytest.mark.parametrize("stage", range(4))
def test_bf16_autocast_trains_a_model_with_batch_norm(two_ranks, one_process, stage):
    losses = two_ranks[1][0][f"zero{stage}"]["bf16"]
    assert all(0 < loss < 100 for loss in losses)


def test_gradient_clipping_is_always_written():
    config = deepspeed_config(TrainConfig(), OptimConfig(grad_clip=0.0), has_batch_norm=True)
    assert config["gradient_clipping"] == 0.0


def test_precision_follows_batch_norm():
    bf16 = TrainConfig(precision="bf16")
    assert "torch_autocast" in deepspeed_config(bf16, OptimConfig(), has_batch_norm=True)
    assert deepspeed_config(bf16, OptimConfig(), has_batch_norm=False)["bf16"] == {"enabled": True}


def test_fp16_with_batch_norm_is_refused_where_deepspeed_gets_the_loss_scale_wrong():
    with pytest.raises(ValueError, match=r"train\.precision = 'fp16'"):
        deepspeed_config(TrainConfig(precision="fp16", deepspeed="zero1"), OptimConfig(), has_batch_norm=True)
    zero0 = deepspeed_config(TrainConfig(precision="fp16", deepspeed="zero0"), OptimConfig(), has_batch_norm=True)
    assert zero0["torch_autocast"] == {"enabled": True, "dtype": "float16"}


def test_fp16_without_batch_norm_is_refused_without_zero():
    with pytest.raises(ValueError, match=r"train\.precision = 'fp16': without ZeRO"):
        deepspeed_config(TrainConfig(precision="fp16", deepspeed="zero0"), OptimConfig(), has_batch_norm=False)
    assert deepspeed_config(TrainConfig(precision="fp16"), OptimConfig(), has_batch_norm=False)["fp16"]["enabled"]


def test_every_file_in_ds_configs_is_valid(repository):
    names = sorted(path.stem for path in (repository / "ds_configs").glob("*.json"))
    assert names == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]
    for name in names:
        zero = load_deepspeed_json(name)["zero_optimization"]
        # In DeepSpeed's own bucket, of half a billion elements, all gradients wait for the last, and nothing overlaps.
        assert zero["stage"] == 0 or (zero["overlap_comm"] and zero["reduce_bucket_size"] <= 1e7)


def test_offloaded_parameters_are_not_stepped_on_the_device():
    auto = build_optimizer(build_model(), OptimConfig(), on_cuda=True, offloaded=True)
    assert type(auto) is torch.optim.AdamW
    with pytest.raises(ValueError, match="lie on the CPU"):
        build_optimizer(build_model(), OptimConfig(name="fused_adam"), on_cuda=True, offloaded=True)


def test_norms_biases_and_positions_are_not_decayed():
    model = build_model()
    decay, plain = parameter_groups(model, OptimConfig())
    plain_ids = {id(p) for p in plain["params"]}
    for name, parameter in model.named_parameters():
        undecayed = name.endswith("bias") or parameter.ndim == 1 or "position" in name or "cls" in name
        assert (id(parameter) in plain_ids) == undecayed, name
    assert plain["weight_decay"] == 0.0
    assert decay["weight_decay"] == 0.05
    (everything,) = parameter_groups(model, OptimConfig(decay_norm_and_bias=True))
    assert len(everything["params"]) == len(list(model.parameters()))


def test_unknown_deepspeed_key_is_refused(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimisation": {"stage": 2}}')
    with pytest.raises(ValueError, match="zero_optimisation is not allowed"):
        load_deepspeed_json(str(path))
    for key in ("gradient_accumulation_steps", "train_batch_size"):
        path.write_text(json.dumps({key: 8}))
        with pytest.raises(ValueError, match=rf"{key} is not allowed .*train\.grad_cache_chunk"):
            load_deepspeed_json(str(path))
    path.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}')
    with pytest.raises(ValueError, match=r"train\.deepspeed = .* offloads weights to nvme"):
        load_deepspeed_json(str(path))
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}')
    with pytest.raises(ValueError, match=r"train\.deepspeed = .* offloads to nvme at ZeRO-2, .*; stage must be 3"):
        load_deepspeed_json(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_deepspeed_json(str(path))
    with pytest.raises(FileNotFoundError, match="zero1"):
        load_deepspeed_json("zero9")


def test_apex_asked_for_and_absent_says_how_to_build_it():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        build_optimizer(build_model(), OptimConfig(name="apex_fused_lamb"), on_cuda=False)
    with pytest.raises(ValueError, match=r"github\.com/NVIDIA/apex"):
        build_optimizer(build_model(), OptimConfig(name="apex_fused_adam"), on_cuda=True)


def test_bf16_without_zero_takes_the_steps_of_zero_1(process_group):
    """DeepSpeed makes Adam's state there by a step of its own, which would count."""
    init_world()
    found = []
    for stage in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))
        engine = build_engine(model, train_config(stage, "bf16"), OptimConfig(lr=1e-2))
        losses = []
        for step in range(4):
            inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            loss = engine(inputs.bfloat16()).float().square().mean()
            engine.backward(loss)
            assert take_step(engine).applied
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
