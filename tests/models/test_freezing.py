"""Freezing by pattern: what is named does not learn and does not drift, and what names nothing is refused."""

import pytest
import torch
from torch import nn

from imitate_ds.config import ModelConfig, OptimConfig
from imitate_ds.models.image_encoder import ImageEncoder, synchronise_batch_norm
from imitate_ds.training.batch_norm import set_training_mode
from imitate_ds.training.engine import parameter_groups


def encoder(name: str, *patterns: str, **settings) -> ImageEncoder:
    return ImageEncoder(ModelConfig(image_encoder=name, freeze=patterns, **settings), 64)


def frozen(model: ImageEncoder) -> set[str]:
    return {name for name, parameter in model.parameters_by_timm_name().items() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("name", "patterns", "first", "free"),
    [
        ("test_convnext", ("stem*", "stages.0.*"), "stem.0.weight", "stages.1.blocks.0.conv_dw.weight"),
        (
            "test_vit",
            ("patch_embed.*", "pos_embed", "blocks.[0-3].*"),
            "blocks.3.mlp.fc2.bias",
            "blocks.4.norm1.weight",
        ),
        ("resnet10t", ("conv1*", "bn1*", "layer[12]*"), "layer2.0.conv1.weight", "layer3.0.conv1.weight"),
    ],
)
def test_patterns_name_weights_as_timm_does(name, patterns, first, free):
    model = encoder(name, *patterns)
    assert first in frozen(model)
    assert free not in frozen(model)
    learning = sum(p.numel() for group in parameter_groups(model, OptimConfig()) for p in group["params"])
    assert (
        learning
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
        < sum(p.numel() for p in model.parameters())
    )


def test_frozen_norms_do_not_drift_and_frozen_paths_are_not_dropped():
    model = encoder("resnet10t", "conv1*", "bn1*", "layer1*", drop_path=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_training_mode(nn.Sequential(model), "mean")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    model(images)[-1].square().mean().backward()
    optimizer.step()
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in still if "running" in name} == {n for n in before if "running" in n and _early(n)}
    assert {n for n in before if _early(n)} <= still
    assert not any(module.training for name, module in model.named_modules() if _early(name + "."))
    assert all(module.training for name, module in model.named_modules() if "layer4" in name)
    assert not any(module.training for module in model.eval().modules())


def _early(name: str) -> bool:
    return name.startswith(("backbone.conv1", "backbone.bn1.", "backbone.layer1."))


def test_synchronised_norms_stay_frozen():
    model = synchronise_batch_norm(encoder("resnet10t", "bn1*"))
    assert frozen(model) == {"bn1.weight", "bn1.bias"}
    assert not model.train().backbone.get_submodule("bn1").training


def test_a_pattern_that_names_nothing_is_refused_with_what_was_meant():
    with pytest.raises(
        ValueError, match=r"model.freeze = \['stem\*', 'stage.0.\*'\]: 'stage.0.\*' .* did you mean stages.0"
    ):
        encoder("test_convnext", "stem*", "stage.0.*")
    with pytest.raises(ValueError, match=r"'xyz' matches no weight; names begin with stem, stages"):
        encoder("test_convnext", "xyz")
