"""The DeepSpeed engine around a model: configuration, optimizer, BatchNorm policy, weights out. The only import of deepspeed."""

import json
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imitate_ds.config import OptimConfig, TrainConfig
from imitate_ds.distributed import mean_over_ranks, training_device, world

# Kernels that DeepSpeed compiles lie on a node-local disk, one folder per version: a stale lock on a shared one hangs
# every rank for ever. Set before the import reads it.
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    str(Path(tempfile.gettempdir()) / f"imitate_ds-ext-{os.getuid()}-{version('torch')}-{version('deepspeed')}"),
)
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

# DeepSpeed 0.19.8 calls a collective by a name that torch 2.14 warns of, once per rank.
warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*", category=FutureWarning)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# What a file in ds_configs/ may hold. DeepSpeed accepts any misspelt key in silence, so we do not; the rest of its
# configuration (batch size, precision, clipping, optimizer) belongs to the run file.
DEEPSPEED_KEYS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "prescale_gradients",
    "aio",
}


def load_deepspeed_json(name: str) -> dict[str, Any]:
    """Read `ds_configs/<name>.json` or the file `name`, and check its keys.

    Raises FileNotFoundError or ValueError naming `train.deepspeed` and what to do.
    """
    folders = [Path("ds_configs"), Path(__file__).resolve().parents[2] / "ds_configs"]
    candidates = [Path(name), *(folder / f"{name}.json" for folder in folders)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        known = sorted({p.stem for folder in folders for p in folder.glob("*.json")})
        raise FileNotFoundError(f"train.deepspeed = {name!r}: neither a file nor one of {', '.join(known)}")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"train.deepspeed = {name!r}: {path} is not valid JSON: {error}") from None
    unknown = sorted(set(values) - DEEPSPEED_KEYS)
    if unknown:
        raise ValueError(
            f"train.deepspeed = {name!r}: {unknown[0]} is not allowed in {path} (it may hold "
            f"{', '.join(sorted(DEEPSPEED_KEYS))}); batch size, precision, clipping and optimizer belong to the run file"
        )
    return values


def zero_stage(ds_json: dict[str, Any]) -> int:
    return int(ds_json.get("zero_optimization", {}).get("stage", 0))


def deepspeed_config(train: TrainConfig, optim: OptimConfig, *, has_batch_norm: bool) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the ZeRO file plus what the run file decides.

    BatchNorm keeps float32 statistics, which DeepSpeed's bf16 block does not respect; models that have one train under
    autocast instead (checked at ZeRO 0 to 3).
    """
    config = {
        **load_deepspeed_json(train.deepspeed),
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


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay, and (norms, biases, positions) without."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim <= 1 or name.endswith(("positions", "cls", "cls_token", "pos_embed"))
            (plain if is_plain and not optim.decay_norm_and_bias else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim: OptimConfig, *, on_cuda: bool) -> torch.optim.Optimizer:
    """AdamW or LAMB over the parameter groups; `auto` is DeepSpeed's FusedAdam on CUDA, torch's fused AdamW elsewhere."""
    groups = parameter_groups(model, optim)
    name = optim.name
    if name == "auto":
        name = "fused_adam" if on_cuda else "adamw"
    if name.startswith("apex") or name == "fused_adam":
        if not on_cuda:
            raise ValueError(f"optim.name = {name!r}: needs a CUDA device; use adamw, or auto")
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


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def batch_norm_policy(train: TrainConfig, device: torch.device) -> str:
    """Resolve `auto` and refuse what the device cannot do."""
    on_cuda = device.type == "cuda"
    if train.batch_norm == "sync" and not on_cuda:
        raise ValueError(
            "train.batch_norm = 'sync': SyncBatchNorm needs CUDA; use mean (what auto picks here) or freeze"
        )
    return ("sync" if on_cuda else "mean") if train.batch_norm == "auto" else train.batch_norm


def apply_batch_norm_policy(model: nn.Module, policy: str) -> nn.Module:
    """sync: statistics over all ranks. mean: each rank its own, averaged by average_batch_norm_statistics.
    freeze: statistics and affine parameters stay as they are."""
    if policy == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if policy == "freeze":
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.requires_grad_(False)
    return model


def set_training_mode(model: nn.Module, policy: str) -> None:
    """model.train(), with BatchNorm left in evaluation mode under `freeze`."""
    model.train()
    if policy == "freeze":
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()


def average_batch_norm_statistics(model: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics: DeepSpeed does not, and saves rank 0's."""
    if world().size == 1:
        return
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(mean_over_ranks(module.running_mean))
            module.running_var.copy_(mean_over_ranks(module.running_var))


def build_engine(model: nn.Module, train: TrainConfig, optim: OptimConfig) -> Any:
    """Hand the model to DeepSpeed. What must not train has to be frozen before this: afterwards weights still move."""
    device = training_device()
    model = apply_batch_norm_policy(model, batch_norm_policy(train, device)).to(device)
    if device.type == "cpu":
        # Its shared-memory all-reduce takes 20 to 110 s to compile, needs g++ and can hang on a lock; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, optim, on_cuda=device.type == "cuda"),
        config=deepspeed_config(train, optim, has_batch_norm=has_batch_norm(model)),
    )
    return engine


def take_step(engine: Any) -> Tensor | float:
    """One optimizer step; returns the global norm of its gradient before clipping, still on the device."""
    if engine.zero_optimization_stage() > 0:
        engine.step()
        norm = engine.get_global_grad_norm()
        return float("nan") if norm is None else norm
    # Without ZeRO DeepSpeed does not tell the norm, and step() clears the gradients.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    scaler = engine.torch_autocast_z0_gradscaler
    engine.step()
    return norm / scaler.get_scale() if scaler else norm


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def full_state_dict(engine: Any) -> dict[str, Tensor]:
    """Every parameter and buffer, whole, on the CPU; a collective under ZeRO-3, so call it on all ranks.

    The weights the engine computes with, so that an export gives the engine's embeddings.
    """
    module = engine.module
    state: dict[str, Tensor] = {name: b.detach().cpu().clone() for name, b in module.named_buffers()}
    persistent = set(module.state_dict().keys())
    state = {name: b for name, b in state.items() if name in persistent}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            state[name] = parameter.detach().cpu().clone()
    return state
