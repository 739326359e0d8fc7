"""A small model that was never trained, as an export of the phantom shards."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def export(phantom_shards, tmp_path_factory) -> Path:
    import torch

    from imitate_ds.config import build_run_config
    from imitate_ds.data.shards import load_index
    from imitate_ds.data.text_cache import text_info
    from imitate_ds.hub import save_pretrained
    from imitate_ds.models.imitate import ImitateModel

    values = {
        "name": "t",
        "data": {"shards": str(phantom_shards), "input_size": 64},
        "model": {
            "image_encoder": "resnet10t",
            "joint_dim": 32,
            "text_hidden": 32,
            "aggregation": {"pool": 4, "eval_draws": 1},
        },
    }
    config = build_run_config(values)
    torch.manual_seed(0)
    model = ImitateModel(config.model, text_info(load_index(phantom_shards))["width"], input_size=64)
    folder = tmp_path_factory.mktemp("model") / "export"
    card = {"data": "phantom", "synthetic": True, "image_size": 64}
    save_pretrained(model, folder, config=config, text_encoder_folder=phantom_shards / "text_encoder", card=card)
    return folder
