"""How much of an encoder learns: what moves, what does not, at which rate, and what is left of low-rank updates."""

import pytest
import torch

from imitate_ds.batch import LabeledBatch
from imitate_ds.config import ModelConfig
from imitate_ds.finetune_config import EncoderConfig
from imitate_ds.heads.classification import ClassificationHead
from imitate_ds.models.adaptation import TaskModel, encoder_levels, merge_updates
from imitate_ds.models.image_encoder import ImageEncoder

ENCODERS = ("resnet10t", "test_vit", "test_convnext")


def task_model(name: str, **settings) -> TaskModel:
    torch.manual_seed(0)
    config = ModelConfig(image_encoder=name)
    encoder = ImageEncoder(config, 64)
    head = ClassificationHead(encoder.channels, 2)
    return TaskModel(encoder, head, EncoderConfig(model=config, **settings))


def batch(count: int = 4) -> LabeledBatch:
    images = torch.randint(0, 256, (count, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 1], [1, 0]], dtype=torch.int8).repeat(count // 2, 1)
    return LabeledBatch([str(i) for i in range(count)], images, labels, images[:, :0], [], [], 0)


def learn(model: TaskModel, steps: int = 2) -> set[str]:
    """Which tensors of the encoder, buffers too, have moved."""
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        loss = model.head.combine(model.head.sums(model(batch()), batch()))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name for name, value in model.encoder.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", ENCODERS)
def test_frozen_moves_nothing_not_even_statistics(name):
    model = task_model(name, train="frozen")
    assert learn(model) == set()
    assert not any(module.training for module in model.encoder.modules() if module is not model.encoder)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"head"}


@pytest.mark.parametrize("name", ENCODERS)
def test_last_n_moves_the_last_levels_only(name):
    model = task_model(name, train="last_n", last_n=2)
    moved = learn(model)
    levels = model.levels
    assert moved & set(levels), "something of the encoder learns"
    assert {levels[n] for n in moved if n in levels} == {2, 3}
    trained = {n for n, p in model.encoder.named_parameters() if p.requires_grad}
    assert trained == {n for n, level in levels.items() if level >= 2}


@pytest.mark.parametrize("name", ENCODERS)
def test_full_moves_all_levels_each_at_its_rate(name):
    model = task_model(name, train="full", lr_share=0.5, layer_decay=0.5)
    assert {model.levels[n] for n in learn(model) if n in model.levels} == {0, 1, 2, 3}
    shares = {model.levels[n]: model.rate_share(f"encoder.{n}") for n in model.levels}
    assert shares == {0: 0.0625, 1: 0.125, 2: 0.25, 3: 0.5}
    assert model.rate_share("head.layers.0.weight") == 1


@pytest.mark.parametrize("name", ENCODERS)
def test_lora_begins_as_the_encoder_it_updates_and_merges_into_it(name):
    model = task_model(name, train="lora", lora_rank=2)
    plain = task_model(name, train="frozen")
    model.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), plain(batch()))
    moved = learn(model)
    assert moved
    assert all(n.endswith((".0.a", ".0.b")) for n in moved)
    trained = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in plain.encoder.parameters())
    assert trained < 0.25 * whole
    model.eval()
    with torch.no_grad():
        before = model(batch())
        merge_updates(model.encoder)
        torch.testing.assert_close(model(batch()), before)
    assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_works_for_a_level_and_levels_come_in_order(name):
    encoder = task_model(name).encoder
    levels = list(encoder_levels(encoder).values())
    assert levels == sorted(levels)
    assert set(levels) == {0, 1, 2, 3}


def test_what_has_no_parameters_goes_with_what_learns():
    """Stochastic depth drops paths where the blocks around it learn, and nowhere else."""
    config = ModelConfig(image_encoder="test_convnext", drop_path=0.3)

    def dropping(**settings) -> set[bool]:
        encoder = ImageEncoder(config, 64)
        head = ClassificationHead(encoder.channels, 2)
        model = TaskModel(encoder, head, EncoderConfig(model=config, **settings)).train()
        return {module.training for module in model.encoder.modules() if type(module).__name__ == "DropPath"}

    assert dropping(train="full") == {True}
    assert dropping(train="frozen") == {False}
    assert dropping(train="last_n", last_n=1) == {True, False}


def test_last_n_is_refused_where_levels_cannot_be_told_apart():
    with pytest.raises(ValueError, match=r"encoder\.train = 'last_n': .* take frozen, lora or full"):
        task_model("twins_pcpvt_small", train="last_n")
