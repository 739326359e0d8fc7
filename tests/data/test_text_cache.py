import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imitate_ds.data.shard_index import load_index, read_shard
from imitate_ds.data.shards import build_shards, verify_shards
from imitate_ds.data.sources.phantom import PhantomSource
from imitate_ds.data.text_cache import (
    ENCODER_FILE,
    embed_shards,
    fit_texts,
    load_text_cache,
    text_info,
    verify_text,
)
from imitate_ds.models.lsa_encoder import LsaEncoder
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_encoder_folder import DESCRIPTION


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    build_shards(PhantomSource(60, size=64), out, image_size=32, workers=0, samples_per_shard=24, progress=False)
    return out


@pytest.fixture
def shards(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def embed(shards: Path, dim: int = 8) -> LsaEncoder:
    encoder = LsaEncoder.fit(fit_texts(shards), dim=dim)
    embed_shards(shards, encoder, progress=False)
    return encoder


def test_rows_are_the_encoders_in_the_order_of_the_members(shards):
    encoder = embed(shards)
    assert (text_info(load_index(shards))["width"], text_info(load_index(shards))["build_id"]) == (
        8,
        load_index(shards).build_id,
    )
    for shard in load_index(shards).shards:
        cache = load_text_cache(shards, shard)
        metas = [meta for _, _, meta in read_shard(shards, shard)]
        for name, rows in (("findings", cache.findings), ("impression", cache.impression)):
            torch.testing.assert_close(rows, encoder.encode([meta[name] for meta in metas]).half(), rtol=0, atol=1e-3)
            assert rows.dtype == torch.float16
        whole = [" ".join(filter(None, (meta["findings"], meta["impression"]))) for meta in metas]
        torch.testing.assert_close(cache.report, encoder.encode(whole).half(), rtol=0, atol=1e-3)
        assert cache.has_findings.tolist() == [bool(meta["findings"]) for meta in metas]
        assert cache.has_impression.tolist() == [bool(meta["impression"]) for meta in metas]
        assert not cache.findings[~cache.has_findings].any()
        assert not cache.impression[~cache.has_impression].any()
    assert load_text_encoder(str(shards / "text_encoder")).fingerprint == encoder.fingerprint
    assert verify_shards(shards) == []


def test_some_phantoms_lack_a_section(shards):
    embed(shards)
    caches = [load_text_cache(shards, shard) for shard in load_index(shards).shards]
    assert not all(cache.has_findings.all() and cache.has_impression.all() for cache in caches)


def test_fit_texts_are_the_training_sections_once_per_study(shards):
    metas = [meta for shard in load_index(shards).of_split("train") for _, _, meta in read_shard(shards, shard)]
    expected = sorted(meta[name] for meta in metas for name in ("findings", "impression") if meta[name])
    assert sorted(fit_texts(shards)) == expected


def test_each_distinct_text_is_encoded_once(shards):
    class Counting:
        kind, width, fingerprint = "counting", 4, "0" * 16

        def __init__(self):
            self.seen: list[list[str]] = []

        def encode(self, texts, batch_size=64):
            self.seen.append(list(texts))
            return torch.zeros(len(texts), 4)

        def save(self, folder):
            folder.mkdir()

    encoder = Counting()
    embed_shards(shards, encoder, progress=False)
    assert all(len(texts) == len(set(texts)) for texts in encoder.seen)
    assert len(encoder.seen) == len(load_index(shards).shards)


def test_another_encoder_replaces_everything(shards):
    first, second = embed(shards, dim=8), embed(shards, dim=6)
    assert first.fingerprint != second.fingerprint
    assert text_info(load_index(shards))["width"] == 6
    for shard in load_index(shards).shards:
        assert load_text_cache(shards, shard).findings.shape == (shard.samples, 6)
    assert load_text_encoder(str(shards / "text_encoder")).width == 6


def test_the_saved_encoder_may_embed_its_own_folder_again(shards):
    embed(shards)
    before = {shard: load_text_cache(shards, shard) for shard in load_index(shards).shards}
    embed_shards(shards, load_text_encoder(str(shards / "text_encoder")), progress=False)
    for shard, cache in before.items():
        assert all(map(torch.equal, cache, load_text_cache(shards, shard)))


def test_an_embedding_that_failed_midway_counts_as_none(shards):
    embed(shards)

    class Failing(LsaEncoder):
        def encode(self, texts, batch_size=64):
            raise RuntimeError("out of memory")

    failing = Failing.fit(fit_texts(shards), dim=4)
    with pytest.raises(RuntimeError):
        embed_shards(shards, failing, progress=False)
    with pytest.raises(FileNotFoundError, match=r"no text\.json, so no text embeddings; run 'imitate-ds shards embed'"):
        text_info(load_index(shards))


def test_embeddings_of_another_build_or_encoder_are_refused(shards):
    index = load_index(shards)
    shard = index.shards[0]
    path = shards / shard.text_name
    with pytest.raises(FileNotFoundError, match="run 'imitate-ds shards embed'"):
        load_text_cache(shards, shard)
    embed(shards)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for key, message in [("shard_sha256", "of another build"), ("encoder", "of another encoder")]:
        save_file(load_file(path), path, {**metadata, key: "something else"})
        with pytest.raises(ValueError, match=f"{message}.*; run 'imitate-ds shards embed'"):
            load_text_cache(shards, shard)
        assert len(verify_shards(shards)) == 1
    save_file({name: rows[1:].clone() for name, rows in load_file(path).items()}, path, metadata)
    with pytest.raises(ValueError, match=f"not {shard.samples} x 8"):
        load_text_cache(shards, shard)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no text embeddings"):
        load_text_cache(shards, shard)


def test_a_damaged_text_index_is_refused(shards):
    embed(shards)
    values = json.loads((shards / "text.json").read_text())
    without_width = {name: value for name, value in values.items() if name != "width"}
    damaged = [[values], {**values, "format": "imitate_ds.text/0"}, {**values, "build_id": "0"}, without_width]
    for text in ("{", *map(json.dumps, damaged)):
        (shards / "text.json").write_text(text)
        with pytest.raises(ValueError, match="run 'imitate-ds shards embed'"):
            text_info(load_index(shards))["width"]
        assert len(verify_text(shards, load_index(shards))) == 1


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_sidecar_is_named(shards, size):
    embed(shards)
    index = load_index(shards)
    path = shards / index.shards[0].text_name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"damaged text embeddings: .*/train-000000\.text\.safetensors; run 'imitate-ds"
    ):
        load_text_cache(shards, index.shards[0])
    (problem,) = verify_text(shards, index)
    assert str(path) in problem


def test_verify_sees_an_encoder_that_is_not_the_one_and_sidecars_without_index(shards):
    index = load_index(shards)
    assert verify_text(shards, index) == []  # not embedded yet
    embed(shards)
    assert verify_text(shards, index) == []
    LsaEncoder.fit(fit_texts(shards), dim=4).save(shards / "text_encoder")
    (problem,) = verify_text(shards, index)
    assert "another encoder than text.json names" in problem
    shutil.rmtree(shards / "text_encoder")
    assert len(verify_text(shards, index)) == 1
    (shards / "text.json").unlink()
    (problem,) = verify_text(shards, index)
    assert f"{len(index.shards)} text sidecars, but no text.json" in problem


def test_synthetic_texts_are_marked_and_the_encoder_is_known_by_its_file(shards):
    embed(shards)
    assert text_info(load_index(shards))["synthetic"] is True
    with safe_open(shards / load_index(shards).shards[0].text_name, framework="pt") as file:
        assert file.metadata()["synthetic"] == "true"
    assert ENCODER_FILE == DESCRIPTION


def test_numbers_that_float16_cannot_hold_are_refused(shards):
    encoder = LsaEncoder.fit(fit_texts(shards), dim=4)
    encoder.encode = lambda texts, batch_size=64: torch.full((len(texts), 4), 1e6)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        embed_shards(shards, encoder, progress=False)
