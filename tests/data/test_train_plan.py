"""What a data section opens and plans (the order itself: test_shard_plan.py; batches of it: test_loader.py)."""

import shutil

import pytest

from imitate_ds.config import build_data_config
from imitate_ds.data.shards import build_shards, load_index
from imitate_ds.data.sources.phantom import PhantomSource
from imitate_ds.data.train_plan import build_train_plan, open_train_folders


def test_a_share_that_leaves_a_folder_without_patients_is_refused(phantom_shards, tmp_path):
    source = PhantomSource(2, seed=2, size=64, val_share=0.0, test_share=0.0)
    build_shards(source, tmp_path, image_size=64, workers=0, progress=False)
    data = build_data_config({"shards": [{"shards": str(phantom_shards)}, {"shards": str(tmp_path)}], "share": 0.01})
    with pytest.raises(
        ValueError, match=r"data\.share = 0\.01: leaves data\.shards\[[01]\] without a patient; raise it"
    ):
        build_train_plan(data, open_train_folders(data), seed=3, global_batch_size=6)


def test_missing_validation_tars_are_found_before_training(phantom_shards, tmp_path):
    shards = shutil.copytree(phantom_shards, tmp_path / "shards")
    (shards / load_index(shards).of_split("val")[0].name).unlink()
    with pytest.raises(FileNotFoundError, match="val-000000"):
        open_train_folders(build_data_config({"shards": str(shards), "max_skipped": 50}))
