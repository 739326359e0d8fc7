"""What several test modules share: the repository, and one small folder of phantom shards."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first: the last one to end should be a short one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory) -> Path:
    """240 phantom studies at 64 px in shards of 48, embedded by LSA. Read only: copy it to damage it."""
    from imitate_ds.data.shards import build_shards
    from imitate_ds.data.sources.phantom import PhantomSource
    from imitate_ds.data.text_cache import embed_shards, fit_texts
    from imitate_ds.models.lsa_encoder import LsaEncoder

    folder = tmp_path_factory.mktemp("phantom") / "shards"
    source = PhantomSource(studies=240, seed=7, val_share=0.2)
    build_shards(source, folder, image_size=64, workers=1, samples_per_shard=48, progress=False)
    embed_shards(folder, LsaEncoder.fit(fit_texts(folder), dim=32, seed=0))
    return folder


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """Lets runs start their process group in here, as one rank, and takes it down at the end: gloo left alone aborts at exit.

    One group for all tests: DeepSpeed remembers the first that it has met.
    """
    given = {name: os.environ.pop(name, None) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    yield
    os.environ.update({name: value for name, value in given.items() if value is not None})
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()
