"""What a pre-training run is made of: its inputs, its model, one step of it, and what it leaves.

Between the rooms below and the entrances: `pretrain` does many steps, `replay` one of them again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from imitate_ds import hub
from imitate_ds.batch import Batch, Features, Losses
from imitate_ds.config import RunConfig, TextConfig, TrainConfig
from imitate_ds.data.shard_index import ShardIndex
from imitate_ds.data.shard_plan import PLAN
from imitate_ds.data.text_cache import fetch_encoder, text_info
from imitate_ds.data.train_plan import build_train_plan, open_train_folders
from imitate_ds.data.transforms import TrainViews
from imitate_ds.distributed import count_rows, node_count, training_device, world
from imitate_ds.flight import flight
from imitate_ds.models.encoder_parts import encoder_parts
from imitate_ds.models.float8 import use_float8
from imitate_ds.models.image_encoder import ImageEncoder, synchronise_batch_norm
from imitate_ds.models.imitate import TEXT_TOWER, ImitateModel
from imitate_ds.models.layer_rates import layer_rates
from imitate_ds.models.text_encoder_folder import HUGGINGFACE
from imitate_ds.objective import exchange_texts, imitate_loss
from imitate_ds.ops.contrastive import choose_backend
from imitate_ds.training.activation_checkpointing import checkpoint_activations
from imitate_ds.training.batch_norm import average_batch_norm_statistics, batch_norm_policy
from imitate_ds.training.checkpoint import read_state
from imitate_ds.training.course import Horizon
from imitate_ds.training.engine import full_state_dict, load_deepspeed_json, zero_stage
from imitate_ds.training.grad_cache import backward_in_chunks, chunk_count
from imitate_ds.training.identity import identity
from imitate_ds.training.loop import StepOutput

if TYPE_CHECKING:
    from imitate_ds.models.text_tower import TextSource

IMAGE_ENCODER = "image_encoder."  # what the names of its parameters begin with


class Inputs(NamedTuple):
    """What a run is made from, opened and checked before anything is built."""

    folders: list[ShardIndex]
    text_encoder: str  # fingerprint of the one that embedded the shards
    text_width: int
    horizon: Horizon
    batch_norm: str  # resolved policy
    nodes: int
    online: "TextSource | None" = None  # the text encoder that runs in training, if one does


def open_inputs(config: RunConfig, checkpoint: Path | None) -> Inputs:
    """Raises ValueError or FileNotFoundError naming the setting. A collective."""
    folders = open_train_folders(config.data)
    if config.data.val_split and config.train.eval_every:
        _check_val_split(config, folders)
    info = text_info(folders[0])
    batch_size = global_batch_size(config.train, checkpoint)
    plan = build_train_plan(config.data, folders, seed=config.seed, global_batch_size=batch_size)
    total = plan.steps_per_epoch * config.train.epochs
    total = min(total, config.train.max_steps or total)
    horizon = Horizon(plan.samples, batch_size, plan.steps_per_epoch, total)
    policy = batch_norm_policy(config.train, training_device())
    online = _open_text_source(config.text, folders[0]) if config.text.mode == "online" else None
    return Inputs(folders, info["encoder"], info["width"], horizon, policy, node_count(), online)


def _open_text_source(text: TextConfig, folder: ShardIndex) -> "TextSource":
    from imitate_ds.models.text_tower import open_text_source  # transformers takes seconds to import

    return open_text_source(text, online_encoder(text, folder))


def online_encoder(text: TextConfig, folder: ShardIndex) -> str:
    """A folder or a name at the hub: of the text encoder that runs in training. Raises ValueError naming text.mode."""
    if text.encoder:
        return text.encoder
    kind = text_info(folder)["kind"]
    if kind != HUGGINGFACE:
        raise ValueError(
            f"text.mode = 'online': '{folder.root}' is embedded by {kind}, which cannot learn; name a Hugging Face "
            "encoder, as in --set text.encoder=emilyalsentzer/Bio_ClinicalBERT, or embed the shards with one: "
            "'imitate-ds shards embed DIR --text-encoder NAME'"
        )
    return str(fetch_encoder(folder))


def global_batch_size(train: TrainConfig, checkpoint: Path | None) -> int:
    """Of the run: as many samples a step as it began with, whatever the number of ranks is now."""
    ranks = world().size
    wanted = train.studies_of(ranks)
    if checkpoint and not train.global_batch_size:
        wanted = read_state(checkpoint)["identity"]["global batch size"]
    if wanted < 2 * ranks:
        raise ValueError(
            f"train.global_batch_size = {wanted}: must be at least 2 for each of {ranks} ranks; raise it, or use fewer ranks"
        )
    return wanted


def _check_val_split(config: RunConfig, folders: list[ShardIndex]) -> None:
    splits = sorted({split for folder in folders for split in folder.splits})
    if config.data.val_split not in splits:
        where = ", ".join(part.shards for part in config.data.shards)
        raise ValueError(
            f"data.val_split = {config.data.val_split!r}: '{where}' has {', '.join(splits)}; name one of "
            "them, or train without validation: --set data.val_split="
        )


def with_operands(config: RunConfig) -> RunConfig:
    """objective.operands with `auto` resolved: float16 where that is faster and the run does not insist on float32.

    Raises ValueError for an objective.backend that this device has not, before anything is opened.
    """
    try:
        choose_backend(config.objective.backend, training_device(), samples=1)
    except ValueError as error:
        raise ValueError(f"objective.{error}") from None
    if config.objective.operands != "auto":
        return config
    half = training_device().type == "cuda" and config.train.precision != "fp32"
    objective = config.objective.model_copy(update={"operands": "fp16" if half else "fp32"})
    return config.model_copy(update={"objective": objective})


def run_identity(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    data = {
        "global batch size": inputs.horizon.global_batch_size,
        "shards": " ".join(folder.build_id for folder in inputs.folders),
        "weights of shards": [part.weight for part in config.data.shards],
        "version of the plan": PLAN,
        "text encoder": inputs.text_encoder,
        "text encoder in training": inputs.online and inputs.online.fingerprint,
    }
    return identity(config, data)


def build_model(config: RunConfig, inputs: Inputs) -> ImitateModel:
    tower = inputs.online.build_tower(config.text.trainable_layers) if inputs.online else None
    torch.manual_seed(config.seed)
    model = _model(config, inputs, tower)
    if world().is_main and model.image_encoder.remark:
        print(model.image_encoder.remark, flush=True)
    if inputs.batch_norm == "sync":
        model = synchronise_batch_norm(model)
    save_memory(model.image_encoder, config.train)
    _save_time(model, config.train)
    return model


def save_memory(encoder: ImageEncoder, train: TrainConfig) -> None:
    """train.activation_checkpointing; also in fine-tuning."""
    if train.activation_checkpointing != "none":
        checkpoint_activations(encoder_parts(encoder, train.activation_checkpointing))


def _save_time(model: ImitateModel, train: TrainConfig) -> None:
    """train.fp8 and train.compile."""
    at_zero_3 = zero_stage(load_deepspeed_json(train.deepspeed)) == 3
    if train.fp8:
        if at_zero_3:
            raise ValueError(
                "train.fp8 = True: has not been tried at ZeRO-3; use train.deepspeed: zero2, or train.fp8: false"
            )
        use_float8(model.image_encoder.backbone, training_device())
    if not train.compile:
        return
    if at_zero_3:
        raise ValueError(
            f"train.compile = {list(train.compile)}: at ZeRO-3 DeepSpeed brings weights together in hooks that torch.compile "
            "cannot follow; use train.deepspeed: zero2, or set train.compile: []"
        )
    from imitate_ds.models.compiled import compile_towers  # the compiler takes seconds to import

    compile_towers(model, train.compile, lambda said: print(f"warning: rank {world().rank}: {said}", flush=True))


def _model(config: RunConfig, inputs: Inputs, tower: nn.Module | None = None) -> ImitateModel:
    """Without a text tower, as it is exported, unless one is given."""
    size, temperature = config.data.input_size, config.objective.temperature
    width = inputs.online.width if inputs.online else inputs.text_width
    return ImitateModel(config.model, width, input_size=size, temperature=temperature, text_tower=tower)


def rate_share(config: RunConfig) -> Callable[[str], float]:
    """Of the learning rate, for a parameter of the model by name: less in every layer of the image encoder towards the stem, and
    in the text encoder.
    """
    decay = config.optim.layer_decay
    rates = {} if decay == 1 else layer_rates(config.model, config.data.input_size, decay)

    def share(parameter: str) -> float:
        if parameter.startswith(TEXT_TOWER):
            return config.text.lr_share
        return rates[parameter.removeprefix(IMAGE_ENCODER)] if rates and parameter.startswith(IMAGE_ENCODER) else 1.0

    return share


def train_step(engine: Any, config: RunConfig, views: TrainViews, batch: Batch) -> StepOutput:
    """Forward and backward of one step, and how well the micro-batch retrieves itself."""
    if batch.draws is not None:
        batch = batch._replace(images=views(batch.images[:, 0], batch.draws), draws=None)
    features, losses = _forward_and_backward(engine, config, batch)
    flight.begin("between steps")
    scalars = {"loss": losses.total, **{k: v for k, v in losses._asdict().items() if k != "total"}}
    learned, constant = features.temperature, losses.total.new_full((), config.objective.temperature.init)
    scalars["temperature"] = constant if learned is None else learned.squeeze()
    similarity = _similarities(features)
    for level, matrix in similarity.items():
        hits = matrix.argmax(dim=1) == torch.arange(len(matrix), device=matrix.device)
        scalars[f"in_batch_accuracy/{level}"] = hits.float().mean()
    scalars = {name: value.detach() for name, value in scalars.items()}
    return StepOutput(scalars["loss"], scalars, partial(_pictures, batch, similarity))


def _forward_and_backward(engine: Any, config: RunConfig, batch: Batch) -> tuple[Features, Losses]:
    """The whole batch at once, or in chunks (train.grad_cache_chunk) to the same loss."""
    texts = exchange_texts(batch, config.objective)  # on their way while the encoder runs

    def loss_of(features: Features) -> tuple[Tensor, Losses]:
        losses = imitate_loss(features, batch, config.objective, texts)
        return losses.total, losses

    if (parts := _chunks(config, batch)) > 1:
        return backward_in_chunks(engine, batch.split(parts), Features.join, loss_of)
    features = engine(batch)
    flight.begin("loss")
    total, losses = loss_of(features)
    flight.begin("backward")
    engine.backward(total)
    return features, losses


def _chunks(config: RunConfig, batch: Batch) -> int:
    """In how many parts a batch passes the encoder (train.grad_cache_chunk). With that set a collective."""
    chunk = config.train.grad_cache_chunk
    return chunk_count(count_rows(len(batch.keys)).counts, chunk) if chunk else 1


def _similarities(features: Features) -> dict[str, Tensor]:
    """Cosine of every image (first view) with every text of the micro-batch, by level, [B, B]."""
    pairs = {"impression": (features.image_impression, features.text_impression)}
    if features.image_findings is not None:
        pairs["findings"] = (features.image_findings, features.text_findings)
    return {level: image[:, 0].detach() @ text.detach().T for level, (image, text) in pairs.items()}


def _pictures(batch: Batch, similarity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Similarity matrices, and the two views of the first eight studies one above the other."""
    pictures = {f"similarity/{level}": (matrix[None] + 1) / 2 for level, matrix in similarity.items()}
    views = batch.images[:8]  # [8, V, 1, H, W]
    pictures["views"] = torch.cat([torch.cat(list(study), dim=-2) for study in views], dim=-1)
    return pictures


def export(engine: Any, config: RunConfig, inputs: Inputs) -> None:
    """Write run_dir/export: weights and configuration that `imitate_ds.load_model` reads. A collective."""
    average_batch_norm_statistics(engine.module)
    state = full_state_dict(engine)
    if not world().is_main:
        return
    first = inputs.folders[0]
    if (now := text_info(first)["encoder"]) != inputs.text_encoder:
        raise RuntimeError(
            f"data.shards = '{first.root}': embedded anew during the run (encoder {now}, the run began with "
            f"{inputs.text_encoder}); embed with the first one again and go on with --set train.resume=true"
        )
    empty = config.model.model_copy(update={"weights": "none"})  # all of them are in `state`
    model = _model(config.model_copy(update={"model": empty}), inputs)
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(TEXT_TOWER)})
    horizon = inputs.horizon
    card = {
        "data": sources_of(inputs),
        "synthetic": all(folder.synthetic for folder in inputs.folders),
        "image_size": first.image_size,
        "build_id": " ".join(folder.build_id for folder in inputs.folders),
        "train_split": config.data.train_split,
        "samples": horizon.samples,
        "steps": horizon.total_steps,
        "global_batch_size": horizon.global_batch_size,
    }
    if inputs.online:
        card["text encoder"] = f"online, trainable_layers {config.text.trainable_layers}"
    with _text_encoder_folder(config, inputs, state) as encoder:
        hub.save_pretrained(model, config.run_dir / "export", config=config, text_encoder_folder=encoder, card=card)


@contextmanager
def _text_encoder_folder(config: RunConfig, inputs: Inputs, state: Mapping[str, Tensor]) -> Iterator[Path]:
    """The text encoder that belongs to the exported model: that of the shards, or as it has become in training."""
    if inputs.online is None:
        yield fetch_encoder(inputs.folders[0])
        return
    with TemporaryDirectory(dir=config.run_dir, prefix=".text_encoder.") as scratch:
        folder = Path(scratch) / "text_encoder"
        inputs.online.trained(state).save(folder)
        yield folder


def sources_of(inputs: Inputs) -> str:
    return " + ".join(dict.fromkeys(folder.source for folder in inputs.folders))
