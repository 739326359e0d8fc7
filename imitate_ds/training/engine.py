"""The DeepSpeed engine around a model: configuration, optimizer, BatchNorm policy, weights out. The only import of deepspeed."""

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imitate_ds.config import OptimConfig, TrainConfig
from imitate_ds.distributed import training_device, use_group, world
from imitate_ds.run_file import NO_ACCUMULATION
from imitate_ds.training.batch_norm import batch_norm_policy, freeze_batch_norm, has_batch_norm
from imitate_ds.training.local_disk import folder_of_process
from imitate_ds.training.sharded_build import ShardedBuild, join, share_of

# Kernels that DeepSpeed compiles lie on a node-local disk, one folder per version: a stale lock on a shared one hangs
# every rank for ever, and so does one that a killed compilation left here. Set before the import reads it.
KERNELS = Path(tempfile.gettempdir()) / f"imitate_ds-ext-{os.getuid()}-{version('torch')}-{version('deepspeed')}"
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(KERNELS)
    for _lock in (Path(folder) / "lock" for folder, _, files in os.walk(KERNELS) if "lock" in files):
        with suppress(FileNotFoundError):  # another rank has just let go of it
            if time.time() - _lock.stat().st_mtime > 15 * 60:  # no compilation takes that long
                shutil.rmtree(_lock.parent, ignore_errors=True)
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # noqa: E402  # reads the environment that was set above
from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402

# DeepSpeed 0.19.8 calls two collectives by names that torch 2.14 warns of, once per rank.
warnings.filterwarnings("ignore", message=r".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# What a file in ds_configs/ may hold. DeepSpeed accepts any misspelt key in silence, so we do not; the rest of its
# configuration (batch size, precision, clipping, optimizer) belongs to the run file.
DEEPSPEED_KEYS = {
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "aio",
}


def load_deepspeed_json(name: str) -> dict[str, Any]:
    """Read `ds_configs/<name>.json` or the file `name`, and check its keys.

    Raises FileNotFoundError or ValueError naming `train.deepspeed` and what to do.
    """
    here = Path(__file__).resolve()
    folders = [here.parents[2] / "ds_configs", here.parents[1] / "ds_configs"]  # a checkout; an installed package
    candidates = [Path(name), *(folder / f"{name}.json" for folder in folders)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        known = sorted({p.stem for folder in folders for p in folder.glob("*.json")})
        raise FileNotFoundError(f"train.deepspeed = {name!r}: neither a file nor one of {', '.join(known)}")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"train.deepspeed = {name!r}: {path} is not valid JSON: {error}") from None
    if accumulates := [key for key in values if key in ("gradient_accumulation_steps", "train_batch_size")]:
        raise ValueError(f"train.deepspeed = {name!r}: {accumulates[0]} is not allowed in {path}; {NO_ACCUMULATION}")
    unknown = sorted(set(values) - DEEPSPEED_KEYS)
    if unknown:
        raise ValueError(
            f"train.deepspeed = {name!r}: {unknown[0]} is not allowed in {path} (it may hold "
            f"{', '.join(sorted(DEEPSPEED_KEYS))}); batch size, precision, clipping and optimizer belong to the run file"
        )
    zero = values.get("zero_optimization", {})
    if zero.get("offload_optimizer", {}).get("device") == "nvme" and zero.get("stage") != 3:
        raise ValueError(
            f"train.deepspeed = {name!r}: {path} offloads to nvme at ZeRO-{zero.get('stage', 0)}, where DeepSpeed would take the "
            "CPU's memory; stage must be 3, as in zero3_nvme"
        )
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise ValueError(
            f"train.deepspeed = {name!r}: {path} offloads weights to nvme, where DeepSpeed 0.19.8 rounds those of fp32 runs to "
            "bf16; offload_param.device must be cpu, as in zero3_nvme"
        )
    return values


def zero_stage(ds_json: dict[str, Any]) -> int:
    return int(ds_json.get("zero_optimization", {}).get("stage", 0))


def zero_settings(ds_json: dict[str, Any]) -> Any:
    """What the file says of ZeRO, with DeepSpeed's own defaults for what it does not."""
    return DeepSpeedZeroConfig(**ds_json.get("zero_optimization", {}))


def lowered_elements(model: nn.Module) -> int:
    """How many elements of the weights have gradients that DeepSpeed sends in 16 bits under autocast."""
    modules = (module for module in model.modules() if type(module) in LOWER_PRECISION_SAFE_MODULES)
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False) if p.requires_grad)


def deepspeed_config(train: TrainConfig, optim: OptimConfig, *, has_batch_norm: bool) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the ZeRO file plus what the run file decides.

    BatchNorm keeps float32 statistics, which DeepSpeed's bf16 block does not respect; models that have one train under
    autocast instead (checked at ZeRO 0 to 3).
    """
    ds_json = load_deepspeed_json(train.deepspeed)
    if train.precision == "fp16" and has_batch_norm and zero_stage(ds_json) > 0:
        raise ValueError(
            f"train.precision = 'fp16': a model with BatchNorm needs fp16 autocast, whose loss scale DeepSpeed gets wrong "
            f"at ZeRO {zero_stage(ds_json)}; use train.deepspeed: zero0, or train.precision: bf16"
        )
    if train.precision == "fp16" and not has_batch_norm and zero_stage(ds_json) == 0:
        raise ValueError(
            "train.precision = 'fp16': without ZeRO, DeepSpeed divides gradients by a loss scale that it has never "
            "multiplied by; use train.deepspeed: zero1, or train.precision: bf16"
        )
    config = {
        **ds_json,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip,  # DeepSpeed clips at 1.0 when the key is absent
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if train.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[train.precision]
        if has_batch_norm:
            config["torch_autocast"] = {"enabled": True, "dtype": dtype}
        else:
            config[train.precision] = {"enabled": True}
    return config


def whole_rate(parameter: str) -> float:
    """Every parameter learns at the rate of the step."""
    return 1.0


def parameter_groups(
    model: nn.Module, optim: OptimConfig, rate_share: Callable[[str], float] = whole_rate
) -> list[dict[str, Any]]:
    """Trainable parameters with weight decay, and (norms, biases, positions) without, by their share of the learning rate."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = len(getattr(parameter, "ds_shape", parameter.shape)) <= 1 or name.endswith(
                ("positions", "cls", "cls_token", "pos_embed")
            )
            kind = is_plain and not optim.decay_norm_and_bias, rate_share(name)
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": groups[plain, share], "weight_decay": 0.0 if plain else optim.weight_decay, "rate_share": share}
        for plain, share in sorted(groups)
    ]


def build_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    rate_share: Callable[[str], float] = whole_rate,
    *,
    on_cuda: bool,
    offloaded: bool = False,
) -> torch.optim.Optimizer:
    """AdamW or LAMB over the parameter groups; `auto` is DeepSpeed's FusedAdam on CUDA, torch's fused AdamW elsewhere."""
    groups = parameter_groups(model, optim, rate_share)
    name = optim.name
    if name == "auto":
        name = "fused_adam" if on_cuda and not offloaded else "adamw"
    if name.startswith("apex") or name == "fused_adam":
        if not on_cuda:
            raise ValueError(f"optim.name = {name!r}: needs a CUDA device; use adamw, or auto")
        if offloaded:
            raise ValueError(f"optim.name = {name!r}: cannot step parameters that lie on the CPU; use adamw, or auto")
        if name == "fused_adam":
            return deepspeed.ops.adam.FusedAdam(groups, lr=optim.lr, betas=optim.betas, adam_w_mode=True)
        apex = _import_apex(name)
        kind = apex.FusedLAMB if name == "apex_fused_lamb" else apex.FusedAdam
        return kind(groups, lr=optim.lr, betas=optim.betas)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def _import_apex(name: str) -> Any:
    try:
        from apex import optimizers  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            f"optim.name = {name!r}: NVIDIA apex is not importable. It is built from source: git clone "
            "https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
            "--no-build-isolation . (the package named apex on PyPI is something else). Or use optim.name: auto"
        ) from None
    return optimizers


@contextmanager
def one_reduction(engine: Any) -> Iterator[None]:
    """Backward passes in here add up on each rank; the sum meets those of the other ranks once, at the end.

    Until then every rank holds its whole gradient, at ZeRO-2 and 3 too, in the precision of the weights.
    """
    if engine.zero_optimization_stage() > 0:
        with engine.coalesce_grad_reduction():
            yield
    else:  # which DeepSpeed's own context refuses
        with engine.no_sync():
            yield
        engine.allreduce_gradients()


def sharded_build(train: TrainConfig) -> AbstractContextManager[Any]:
    """A context to build the model in: under ZeRO-3 no rank ever holds the whole of it, and its weights are the same."""
    cuts = world().size > 1 and zero_stage(load_deepspeed_json(train.deepspeed)) == 3
    return ShardedBuild() if cuts else nullcontext()


def _hand_over_shares(model: nn.Module, config: dict[str, Any]) -> None:
    """What sharded_build has cut up, to DeepSpeed's own partitions, one parameter at a time."""
    cut = [parameter for parameter in model.parameters() if share_of(parameter)]
    if not cut:
        return
    dtype = next((kind for name, kind in HALVES.items() if config.get(name, {}).get("enabled")), torch.float32)
    deepspeed.init_distributed()
    # an empty module: with none, DeepSpeed leaves out its linear layers that do not keep whole weights for backward
    partitioned = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=dtype)
    for parameter in cut:
        join(parameter)
        parameter.data = parameter.data.to(dtype)
        partitioned._convert_to_zero_parameters([parameter])


def build_engine(
    model: nn.Module, train: TrainConfig, optim: OptimConfig, rate_share: Callable[[str], float] = whole_rate
) -> Any:
    """Hand the model to DeepSpeed. What must not train has to be frozen before this: afterwards weights still move.

    rate_share: of the learning rate of each step, for a parameter by name.
    """
    device = training_device()
    if batch_norm_policy(train, device) == "freeze":
        freeze_batch_norm(model)
    model = model.to(device)
    if device.type == "cpu":
        # Its shared-memory all-reduce takes 20 to 110 s to compile, needs g++ and can hang on a lock; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = deepspeed_config(train, optim, has_batch_norm=has_batch_norm(model))
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") == "nvme":
        offload["nvme_path"] = _disk_to_offload_to(train.deepspeed, offload)
    _hand_over_shares(model, config)
    optimizer = build_optimizer(model, optim, rate_share, on_cuda=device.type == "cuda", offloaded=bool(offload))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    _undo_step_without_gradient(engine)
    use_group(engine.data_parallel_group)  # type: ignore[arg-type]
    if train.grad_cache_chunk:
        _check_one_reduction(engine, train)
    return engine


def _undo_step_without_gradient(engine: Any) -> None:
    """Without ZeRO, DeepSpeed 0.19.8 makes Adam's state in 16 bits by a step of zero gradients: it is counted, which makes the
    first real ones a quarter smaller, and its weight decay is not undone.
    """
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() > 0 or wrapper is engine.basic_optimizer:
        return
    engine.basic_optimizer.state.clear()
    for group in engine.basic_optimizer.param_groups:
        group.pop("step", None)  # of DeepSpeed's FusedAdam
    if hasattr(wrapper, "fp32_groups_flat"):  # fused
        pairs = list(zip(wrapper.fp32_groups_flat, wrapper.fp16_groups_flat, strict=True))
    else:
        groups = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        pairs = [pair for whole, half in groups for pair in zip(whole, half, strict=True)]
    for whole, half in pairs:
        whole.data.copy_(half.data)


def _disk_to_offload_to(name: str, offload: dict[str, Any]) -> str:
    """Raises ValueError naming train.deepspeed."""
    if not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(f"train.deepspeed = {name!r}: offload to nvme needs libaio: apt install libaio-dev, and g++")
    try:
        return str(folder_of_process(offload.get("nvme_path", "")))
    except ValueError as error:
        raise ValueError(f"train.deepspeed = {name!r}: offload_optimizer.{error}") from None


def _check_one_reduction(engine: Any, train: TrainConfig) -> None:
    """DeepSpeed's own refusal would come in the first step, and names no setting."""
    stage = engine.zero_optimization_stage()
    if stage > 0 and not hasattr(engine.optimizer, "_coalesce_grad_reduction"):
        raise ValueError(
            f"train.grad_cache_chunk = {train.grad_cache_chunk}: DeepSpeed's {type(engine.optimizer).__name__}, which "
            f"train.deepspeed = {train.deepspeed!r} and train.precision = {train.precision!r} lead to, cannot add up "
            "gradients of chunks; use train.deepspeed: zero2, or set train.grad_cache_chunk: 0"
        )


class Step(NamedTuple):
    norm: Tensor | float  # of the global gradient before clipping, still on the device
    applied: bool  # False: the gradient was not finite on some rank, and no weight has moved on any


def take_step(engine: Any) -> Step:
    """One optimizer step, on all ranks or on none."""
    if engine.zero_optimization_stage() > 0:
        skipped = engine.skipped_steps
        engine.step()
        norm = engine.get_global_grad_norm()
        return Step(float("nan") if norm is None else norm, engine.skipped_steps == skipped)
    # Without ZeRO DeepSpeed tells the norm in its fp16 and bf16 blocks only, and step() clears the gradients.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    scaler = engine.torch_autocast_z0_gradscaler
    norm = torch.nn.utils.get_total_norm(gradients) / (scaler.get_scale() if scaler else 1.0)
    applied = scaler is not None or bool(norm.isfinite())  # one wait for the device; the scaler skips by itself
    if not applied:
        engine.module.zero_grad(set_to_none=True)  # the optimizer passes over what has no gradient
    engine.step()
    known = engine.get_global_grad_norm()
    return Step(norm if known is None else known, applied)


def loss_scale_state(engine: Any) -> dict[str, Any]:
    """The loss scale of fp16 and what it counts, as JSON values; empty elsewhere."""
    if scaler := engine.torch_autocast_z0_gradscaler:
        return scaler.state_dict()
    scaler = getattr(engine.optimizer, "loss_scaler", None) if engine.fp16_enabled() else None
    return {name: value for name, value in vars(scaler).items() if isinstance(value, int | float)} if scaler else {}


def restore_loss_scale(engine: Any, state: dict[str, Any]) -> None:
    if state and engine.torch_autocast_z0_gradscaler:
        engine.torch_autocast_z0_gradscaler.load_state_dict(state)
    elif state:
        vars(engine.optimizer.loss_scaler).update(state)


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("rate_share", 1.0)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's state, by name."""
    persistent = model.state_dict().keys()  # its values may be empty under ZeRO-3
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def whole_parameter(parameter: nn.Parameter, *, written: bool = False) -> Any:
    """A context in which every rank sees all of a parameter; under ZeRO-3 a collective.

    written: what the ranks write into it stays; under ZeRO-3 what rank 0 writes.
    """
    cut_up = hasattr(parameter, "ds_id")
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if written else None, enabled=cut_up)


def full_state_dict(engine: Any) -> dict[str, Tensor]:
    """Every parameter and buffer, whole, on the CPU; a collective under ZeRO-3, so call it on all ranks.

    The weights the engine computes with, so that an export gives the engine's embeddings.
    """
    state = {name: buffer.detach().cpu().clone() for name, buffer in persistent_buffers(engine.module).items()}
    for name, parameter in engine.module.named_parameters():
        with whole_parameter(parameter):
            state[name] = parameter.detach().cpu().clone()
    return state
