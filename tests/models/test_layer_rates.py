"""Layer-wise rates: every block has one of its own, in the order of the network, as timm groups them."""

import pytest
import timm
from timm.optim import param_groups_layer_decay

from imitate_ds.config import AggregationConfig, ModelConfig
from imitate_ds.models.layer_rates import layer_rates


def rates(name: str, decay: float = 0.5, levels: int = 4) -> dict[str, float]:
    return layer_rates(ModelConfig(image_encoder=name, aggregation=AggregationConfig(keep=(0.1,) * levels)), 64, decay)


def test_every_block_of_a_vit_has_its_rate():
    found = rates("vit_tiny_patch16_224")
    for block in range(12):
        mine = {share for name, share in found.items() if name.startswith(f"backbone.model.blocks.{block}.")}
        assert mine == {0.5 ** (12 - block)}
    assert found["backbone.model.pos_embed"] == found["backbone.model.patch_embed.proj.weight"] == 0.5**13


@pytest.mark.parametrize("name", ["test_convnext", "resnet10t", "test_vit3"])
def test_rates_are_those_of_timms_own_groups(name):
    network = timm.create_model(name)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=0.5)
    theirs = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    found = rates(name)
    ours = {name.removeprefix("backbone.").removeprefix("model.").replace("_", "."): s for name, s in found.items()}
    assert ours == {key.replace("_", "."): theirs[key] for key in theirs if key.replace("_", ".") in ours}
    assert len(ours) == len(found)


@pytest.mark.parametrize("name", ["swin_s3_tiny_224", "mobilenetv3_small_050"])
def test_rates_grow_from_the_stem_to_the_last_level(name):
    shares = list(rates(name, levels=3).values())
    assert shares == sorted(shares)
    assert shares[-1] == 0.5
    assert len(set(shares)) > 6
