import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imitate_ds.batch import Batch
from imitate_ds.config import RunConfig, build_run_config
from imitate_ds.data.loader import build_eval_loader, build_train_loader
from imitate_ds.data.shard_index import file_sha256
from imitate_ds.data.shard_order import order_lines
from imitate_ds.data.shard_reader import ShardReader
from imitate_ds.data.shards import build_shards, load_index
from imitate_ds.data.sources.phantom import PhantomSource
from imitate_ds.data.text_cache import TEXT_INDEX, embed_shards, fit_texts, load_text_cache, text_info
from imitate_ds.data.train_plan import build_train_plan, open_train_folders
from imitate_ds.data.transforms import TrainViews
from imitate_ds.models.lsa_encoder import LsaEncoder
from tests.data.hostile_server import serve

pytestmark = pytest.mark.filterwarnings(
    "error:The given NumPy array is not writable", "ignore:This DataLoader will create"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """64 phantom studies in shards of 10, with embeddings."""
    root = tmp_path_factory.mktemp("shards")
    source = PhantomSource(64, seed=1, size=64, val_share=0.2, test_share=0.0)
    build_shards(source, root, image_size=64, workers=0, samples_per_shard=10, progress=False)
    embed_shards(root, LsaEncoder.fit(fit_texts(root), dim=8))
    return root


@pytest.fixture
def shards(built, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "shards"))


def _config(root: Path, *, micro_batch_size: int = 6, seed: int = 3, **data) -> RunConfig:
    data = {"shards": str(root), "input_size": 32, "workers": 0, **data}
    return build_run_config({"name": "x", "seed": seed, "data": data, "train": {"micro_batch_size": micro_batch_size}})


def _train(config: RunConfig, stop_step: int, start_step: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    loader = build_train_loader(config, rank=rank, world_size=world_size, start_step=start_step, stop_step=stop_step)
    batches = list(loader)
    assert len(batches) == len(loader) == stop_step - start_step
    return batches


def _steps_per_epoch(config: RunConfig) -> int:
    folders = open_train_folders(config.data)
    batch = config.train.micro_batch_size
    return build_train_plan(config.data, folders, seed=config.seed, global_batch_size=batch).steps_per_epoch


def _same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def _join(parts: tuple[Batch, ...]) -> Batch:
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in Batch._fields
        if isinstance(getattr(parts[0], name), torch.Tensor)
    }
    return parts[0]._replace(keys=[key for part in parts for key in part.keys], **tensors)


def test_a_batch_is_what_the_shards_hold(built):
    index = load_index(built)
    batch = _train(_config(built), 1)[0]
    assert batch.images.shape == (6, 2, 1, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.findings.shape == (6, 8)
    assert batch.findings.dtype == batch.impression.dtype == torch.float32
    assert batch.has_findings.dtype == batch.has_impression.dtype == torch.bool
    assert batch.step == 0
    for row, key in enumerate(batch.keys):
        shard, place = next((s, i) for s in index.shards for i, m in enumerate(s.members) if m.key == key)
        text = load_text_cache(built, shard)
        assert shard.split == "train"
        assert torch.equal(batch.findings[row], text.findings[place].float())
        assert torch.equal(batch.impression[row], text.impression[place].float())
        assert batch.has_findings[row] == text.has_findings[place]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 3)])
def test_any_ranks_and_workers_give_the_same_global_batches(built, world_size, workers):
    config = _config(built)
    steps = _steps_per_epoch(config) + 3  # into the second epoch
    whole = _train(config, steps)
    split = _config(built, micro_batch_size=6 // world_size, workers=workers)
    parts = [_train(split, steps, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [_join(part) for part in zip(*parts, strict=True)]
    assert [batch.step for batch in joined] == list(range(steps))
    assert all(_same(one, other) for one, other in zip(whole, joined, strict=True)), "views and embeddings, bit by bit"


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_in_mid_epoch_gives_the_tail(built, workers):
    config = _config(built)
    per_epoch = _steps_per_epoch(config)
    whole = _train(config, per_epoch + 4)
    tail = _train(_config(built, workers=workers), per_epoch + 4, start_step=per_epoch - 2)
    assert all(_same(one, other) for one, other in zip(whole[per_epoch - 2 :], tail, strict=True))
    assert _train(config, 5, start_step=5) == []


def test_epochs_differ_in_order_and_views(built):
    config = _config(built)
    per_epoch = _steps_per_epoch(config)
    batches = _train(config, 2 * per_epoch)
    first, second = (_join(tuple(batches[i : i + per_epoch])) for i in (0, per_epoch))
    assert first.keys != second.keys
    assert len(set(first.keys)) == len(first.keys)
    both = set(first.keys) & set(second.keys)
    assert len(both) > 20
    for key in both:
        one, other = first.images[first.keys.index(key)], second.images[second.keys.index(key)]
        assert not torch.equal(one, other)


def test_a_loader_may_be_read_again(built):
    loader = build_train_loader(_config(built), rank=0, world_size=1, stop_step=2)
    assert all(_same(one, other) for one, other in zip(list(loader), list(loader), strict=True))


def test_the_report_may_stand_for_the_impression(built):
    plain, report = (_train(_config(built, impression_text=text), 4) for text in ("impression", "report"))
    texts = {
        member.key: load_text_cache(built, shard).report[row].float()
        for shard in load_index(built).of_split("train")
        for row, member in enumerate(shard.members)
    }
    for one, other in zip(plain, report, strict=True):
        assert torch.equal(other.impression, torch.stack([texts[key] for key in other.keys]))
        assert torch.equal(other.has_impression, one.has_findings | one.has_impression)
        assert torch.equal(other.findings, one.findings)


def _damage_image(root: Path, key: str) -> None:
    """Flip every bit of one JPEG inside its tar, whose size stays."""
    shard, member = next((s, m) for s in load_index(root).shards for m in s.members if m.key == key)
    with (root / shard.name).open("r+b") as tar:
        tar.seek(member.image_offset)
        data = tar.read(member.image_size)
        tar.seek(member.image_offset)
        tar.write(bytes(byte ^ 0xFF for byte in data))


def _damage_embedding(root: Path, key: str) -> None:
    """Make one findings embedding NaN, leaving the file's metadata."""
    shard, row = next((s, i) for s in load_index(root).shards for i, m in enumerate(s.members) if m.key == key)
    path = root / shard.text_name
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["findings"][row, 0] = float("nan")
    save_file(tensors, path, metadata)
    info = json.loads((root / TEXT_INDEX).read_text())
    info["files"][path.name] = (path.stat().st_size, file_sha256(path))
    (root / TEXT_INDEX).write_text(json.dumps(info))


@pytest.mark.parametrize("damage", [_damage_image, _damage_embedding])
def test_a_damaged_sample_is_replaced_counted_and_named(shards, caplog, damage):
    whole = _train(_config(shards), 3)
    victim = whole[1].keys[4]
    damage(shards, victim)
    found = _train(_config(shards, max_skipped=1), 3)
    assert f"sample {victim} skipped in step 1" in caplog.text
    assert [len(set(batch.keys)) for batch in found] == [6, 6, 6], "batches stay full"
    assert victim not in found[1].keys
    assert [key for batch in found for key in batch.keys if key not in whole[batch.step].keys] == [found[1].keys[4]]
    assert _same(found[0], whole[0])
    assert all(torch.isfinite(batch.findings).all() for batch in found)
    split = _config(shards, micro_batch_size=3, max_skipped=1, workers=2)
    parts = [_train(split, 3, rank=rank, world_size=2) for rank in (0, 1)]
    joined = [_join(part) for part in zip(*parts, strict=True)]
    assert all(_same(one, other) for one, other in zip(found, joined, strict=True)), "the same substitute anywhere"


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_samples_stop_the_run(shards, workers):
    whole = _train(_config(shards), 3)
    victims = [whole[0].keys[0], whole[1].keys[1], whole[2].keys[2]]
    for victim in victims:
        _damage_image(shards, victim)
    assert len(_train(_config(shards, max_skipped=3, workers=workers), 3)) == 3
    loader = build_train_loader(_config(shards, max_skipped=2, workers=workers), rank=0, world_size=1, stop_step=3)
    with pytest.raises(
        RuntimeError, match=rf"data\.max_skipped = 2: 3 damaged .* epoch 0.*{victims[2]}.*shards verify"
    ):
        list(loader)


def test_damage_is_counted_by_epoch(shards):
    config = _config(shards, max_skipped=1)
    per_epoch = _steps_per_epoch(config)
    batches = _train(config, 2 * per_epoch)
    seen = [{key for batch in batches[i : i + per_epoch] for key in batch.keys} for i in (0, per_epoch)]
    _damage_image(shards, min(seen[0] & seen[1]))
    assert len(_train(config, 2 * per_epoch)) == 2 * per_epoch


def test_a_shard_of_damage_ends_at_once(shards):
    for shard in load_index(shards).of_split("train"):
        (shards / shard.name).write_bytes(bytes(shard.bytes))
    with pytest.raises(RuntimeError, match=r"data\.max_skipped = 5: 6 damaged samples"):
        _train(_config(shards, max_skipped=5), 1)


def _find(root: Path, key: str):
    return next((s, m) for s in load_index(root).shards for m in s.members if m.key == key)


def _flip_one_bit(root: Path, key: str) -> None:
    """In the entropy-coded middle of a JPEG: most decoders say nothing, and show another picture."""
    shard, member = _find(root, key)
    with (root / shard.name).open("r+b") as tar:
        tar.seek(member.image_offset + member.image_size // 2)
        byte = tar.read(1)[0]
        tar.seek(-1, os.SEEK_CUR)
        tar.write(bytes([byte ^ 0x10]))


def test_checksums_find_what_a_decoder_does_not(shards, caplog):
    whole = _train(_config(shards), 2)
    victim = whole[1].keys[0]
    _flip_one_bit(shards, victim)
    found = _train(_config(shards, max_skipped=1), 2)
    assert f"sample {victim} skipped in step 1: checksum differs from the index" in caplog.text
    assert victim not in found[1].keys
    with pytest.raises(RuntimeError, match=rf"max_skipped = 0: 1 damaged .* {victim} \(checksum differs"):
        _train(_config(shards), 2)


def test_sampled_checksums_take_every_sixteenth_sample_in_turn(built):
    reader = ShardReader([load_index(built)], "train", verify="sampled")
    places = [reader.row_of(number)._replace(visit=visit) for number in range(10) for visit in range(16)]
    checked = [where for where in places if reader._verifies(where)]
    assert sorted({where.row for where in checked}) == list(range(10)), "each in one pass of sixteen"
    assert len(checked) == 10
    assert not any(ShardReader([load_index(built)], "train", verify="off")._verifies(where) for where in places)


def _cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "rule"),
    [(Path.unlink, "no such file or directory"), (_cut_in_half, "shard ends too early")],
    ids=["vanished", "truncated"],
)
def test_a_lost_shard_is_skipped_and_counted_and_the_plan_stays(shards, tmp_path, harm, rule):
    whole = _train(_config(shards), 3)
    lost = load_index(shards).of_split("train")[1]
    harm(shards / lost.name)
    with pytest.raises((FileNotFoundError, ValueError), match=lost.name):
        _train(_config(shards), 3)
    config, record = _config(shards, max_skipped=50), tmp_path / "skipped.jsonl"
    batches = build_train_loader(config, rank=0, world_size=1, stop_step=3, record=record)
    found = list(batches)
    gone = {member.key for member in lost.members}
    readable = [
        {key for key in batch.keys if key in set(other.keys)} for batch, other in zip(whole, found, strict=True)
    ]
    assert all(set(batch.keys) - gone <= kept for batch, kept in zip(whole, readable, strict=True)), "the plan stays"
    assert [len(set(batch.keys)) for batch in found] == [6, 6, 6], "batches stay full"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert {line["key"] for line in lines} <= gone
    assert batches.skipped == {rule: len(lines)}
    assert set(lines[0]) == {"step", "key", "rule"}


def test_embeddings_of_another_build_are_found_while_a_run_reads(shards):
    config = _config(shards, max_skipped=50)
    batches = iter(build_train_loader(config, rank=0, world_size=1, stop_step=6))
    next(batches)
    first, second, *_ = load_index(shards).of_split("train")
    reader = build_train_loader(config, rank=0, world_size=1, stop_step=6)
    shutil.copy(shards / second.text_name, shards / first.text_name)
    found = list(reader)
    assert all(torch.isfinite(batch.findings).all() and len(set(batch.keys)) == 6 for batch in found)
    assert sum(reader.skipped.values()) > 0
    assert set(reader.skipped) == {"text embeddings differ from their checksum in text.json"}


def test_views_made_on_the_device_are_those_a_worker_makes(built):
    config = _config(built)
    views = TrainViews(config.data.augment, config.data.input_size)
    for one, other in zip(_train(config, 3), _train(_config(built, augment_on="device", workers=2), 3), strict=True):
        assert other.draws is not None
        assert other.images.shape[:3] == (6, 1, 1)
        made = other._replace(images=views(other.images[:, 0], other.draws), draws=None)
        assert _same(one, made)


def test_folders_mix_and_must_share_encoder_and_size(built, shards, tmp_path):
    twice = [{"shards": str(built), "weight": 0.5}, {"shards": str(shards), "weight": 1.0}]
    config = _config(built, shards=twice)
    batches = _train(config, _steps_per_epoch(config))
    seen = Counter(key for batch in batches for key in batch.keys)
    assert all(len(set(batch.keys)) == 6 for batch in batches), "the same study in two folders does not meet itself"
    assert set(seen.values()) == {1, 2}
    embed_shards(shards, LsaEncoder.fit(fit_texts(shards)[:40], dim=8))
    with pytest.raises(ValueError, match=r"data\.shards: .* are embedded by different text encoders; .*--text-encoder"):
        _train(config, 1)
    source = PhantomSource(8, seed=2, size=64, val_share=0.0, test_share=0.0)
    build_shards(source, tmp_path / "small", image_size=48, workers=0, progress=False)
    with pytest.raises(ValueError, match=r"data\.shards: images of \[48, 64\] pixels; build all"):
        _train(_config(built, shards=[{"shards": str(built)}, {"shards": str(tmp_path / "small")}]), 1)


def test_radiographs_of_one_patient_may_be_kept_apart(built):
    config = _config(built, apart="patient")
    patients = {member.key: member.patient for shard in load_index(built).shards for member in shard.members}
    for batch in _train(config, _steps_per_epoch(config)):
        assert len({patients[key] for key in batch.keys}) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_folder_gives_the_batches_of_a_local_one(built, tmp_path, workers):
    with serve(built) as server:
        cache = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 0.1, "workers": workers}
        remote = _train(_config(built, shards=server.url, **cache), 12)
        assert all(_same(one, other) for one, other in zip(_train(_config(built), 12), remote, strict=True))
        asked = server.requests["train-000000.tar"]
        again = _train(_config(built, shards=server.url, **cache), 12)
        assert all(_same(one, other) for one, other in zip(remote, again, strict=True))
        assert server.requests["train-000000.tar"] == asked, "the second run finds it in the cache"
        tiny = {**cache, "cache_gib": 1e-5}
        with pytest.raises(ValueError, match=r"data\.cache_gib = 1e-05: http://.* needs .* GiB, for the shards"):
            _train(_config(built, shards=server.url, **tiny), 1)


def test_order_prints_what_was_in_the_batch(built):
    config = _config(built, workers=2)
    batches = _train(config, 5)
    data, options = config.data, {"seed": config.seed, "global_batch_size": 6}
    lines = list(order_lines(data, steps=range(2, 5), **options))
    assert lines == [" ".join([str(step), *sorted(batches[step].keys)]) for step in range(2, 5)]
    by_rank = list(order_lines(data, steps=range(2, 4), world_size=2, workers=2, start_step=1, **options))
    assert by_rank[1] == " ".join(["2 rank 1 worker 1", *batches[2].keys[3:]])
    assert by_rank[2] == " ".join(["3 rank 0 worker 0", *batches[3].keys[:3]])


def test_a_share_of_the_patients_is_all_that_is_read(built):
    index = load_index(built)
    patient_of = {member.key: member.patient for shard in index.of_split("train") for member in shard.members}

    def keys_of(share):
        config = _config(built, share=share)
        batches = _train(config, 2 * _steps_per_epoch(config))
        lines = order_lines(config.data, seed=config.seed, global_batch_size=6, steps=range(len(batches)))
        assert [line.split()[1:] for line in lines] == [sorted(batch.keys) for batch in batches]
        return {key for batch in batches for key in batch.keys}

    whole, half, quarter = keys_of(1.0), keys_of(0.5), keys_of(0.25)
    assert quarter < half < whole
    patients = {patient_of[key] for key in half}
    assert len(patients) == round(0.5 * len(set(patient_of.values())))
    assert {key for key, patient in patient_of.items() if patient in patients} == half


def test_too_few_samples(built):
    with pytest.raises(ValueError, match=r"data\.shards: .* fewer than one global batch of 256 .*micro_batch_size"):
        build_train_loader(_config(built, micro_batch_size=128), rank=0, world_size=2, stop_step=1)


def test_an_unknown_split_names_those_there_are(built):
    with pytest.raises(ValueError, match=r"'dev'.* has no such split; it has: train, val"):
        build_eval_loader(load_index(built), "dev", input_size=32, batch_size=4, workers=0)


def test_missing_or_foreign_embeddings_fail_at_the_door(shards):
    config = _config(shards)
    text = next(iter(shards.glob("train-*.text.safetensors")))
    text.unlink()
    with pytest.raises(FileNotFoundError, match="shards embed"):
        build_train_loader(config, rank=0, world_size=1, stop_step=1)
    shutil.copy(next(iter(shards.glob("val-*.text.safetensors"))), text)
    with pytest.raises(ValueError, match="shards embed"):
        build_train_loader(config, rank=0, world_size=1, stop_step=1)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (3, 0), (40, 0)])
def test_evaluation_covers_every_key_with_equal_batches(built, world_size, workers):
    expected = [member.key for shard in load_index(built).of_split("val") for member in shard.members]
    ranks = []
    for rank in range(world_size):
        loader = build_eval_loader(
            load_index(built), "val", input_size=32, batch_size=4, workers=workers, rank=rank, world_size=world_size
        )
        ranks.append(list(loader))
        assert len(loader) == len(ranks[-1])
    assert len({tuple(len(batch.keys) for batch in batches) for batches in ranks}) == 1
    keys = [key for batches in ranks for batch in batches for key in batch.keys]
    assert list(dict.fromkeys(keys)) == expected
    assert [batch.step for batch in ranks[0]] == list(range(len(ranks[0])))


def test_evaluation_sees_the_whole_radiograph_and_its_report(built):
    index = load_index(built)
    reader = ShardReader([index], "val")
    batch = next(iter(build_eval_loader(index, "val", input_size=64, batch_size=3, workers=0)))
    samples = [reader.read(reader.row_of(number)) for number in range(3)]
    assert batch.images.shape == (3, 1, 1, 64, 64)
    assert torch.equal(batch.images[:, 0], torch.stack([sample.image for sample in samples]))
    assert torch.equal(batch.impression, torch.stack([sample.impression for sample in samples]))


def test_evaluation_without_text_needs_no_embeddings(shards):
    for text in [*shards.glob("*.text.safetensors"), shards / "text.json"]:
        text.unlink()
    batch = next(
        iter(build_eval_loader(load_index(shards), "val", input_size=32, batch_size=3, workers=0, with_text=False))
    )
    assert batch.findings.shape == batch.impression.shape == (3, 0)
    assert not batch.has_findings.any()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_refuses_a_damaged_sample_by_key(shards, workers):
    key = load_index(shards).of_split("val")[0].members[2].key
    _damage_image(shards, key)
    with pytest.raises(ValueError, match=rf"sample {key}: .*shards verify"):
        list(build_eval_loader(load_index(shards), "val", input_size=32, batch_size=4, workers=workers))


def test_few_tars_are_open_at_a_time(built, monkeypatch):
    monkeypatch.setattr("imitate_ds.data.shard_reader.OPEN_SHARDS", 2)
    reader = ShardReader([load_index(built)], "train")
    before = len(os.listdir("/proc/self/fd"))
    again = [reader.read(reader.row_of(number)).key for number in [*range(reader.samples), 0, 25]]
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    assert again[-2:] == [again[0], again[25]]


def test_workers_outlive_the_signals_that_drain_a_run(built):
    others = set(multiprocessing.active_children())
    batches = iter(build_train_loader(_config(built, workers=2), rank=0, world_size=1, stop_step=12))
    first = [next(batches), next(batches)]  # one of each worker: both are past their start
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as Slurm does: not from the parent
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    assert [batch.step for batch in [*first, *batches]] == list(range(12))


def test_a_process_ends_though_a_loader_still_has_workers(built):
    """Workers that ignored every SIGTERM were waited for without end."""
    program = (
        "import sys; from imitate_ds.data.loader import build_eval_loader; from imitate_ds.data.shards import load_index;"
        "from pathlib import Path; index = load_index(Path(sys.argv[1]));"
        "kept = iter(build_eval_loader(index, 'train', input_size=32, batch_size=2, workers=2));"
        "print(next(kept).step); sys.kept = [kept]; kept.__class__.__del__ = None"
    )
    done = subprocess.run([sys.executable, "-c", program, str(built)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_batches_that_are_kept_stay_as_they_were(built):
    """Their buffers are not written again; those that are let go are."""
    config = _config(built, workers=2)
    batches = build_train_loader(config, rank=0, world_size=1, stop_step=24)
    kept = [(batch.step, batch.images[2:3]) for batch in batches if batch.step % 3 == 0]
    whole = {batch.step: batch for batch in _train(_config(built), 24)}
    assert len(kept) == 8
    assert all(torch.equal(rows, whole[step].images[2:3]) for step, rows in kept)


def test_two_iterators_of_one_loader_do_not_write_into_each_others_batches(built):
    config = _config(built, workers=2)
    loader = build_train_loader(config, rank=0, world_size=1, stop_step=16)
    first = iter(loader)
    kept = [next(first) for _ in range(4)]
    second = list(loader)
    kept += first
    whole = _train(_config(built), 16)
    assert all(_same(one, other) for one, other in zip(kept, whole, strict=True))
    assert all(_same(one, other) for one, other in zip(second, whole, strict=True))


def test_a_radiograph_of_another_size_is_damage(shards, caplog):
    victim = _train(_config(shards), 2)[1].keys[2]
    shard, member = _find(shards, victim)
    picture = io.BytesIO()
    Image.new("L", (40, 40), 128).save(picture, "JPEG", comment=b" " * 10)
    data = picture.getvalue()
    assert len(data) <= member.image_size
    with (shards / shard.name).open("r+b") as tar:
        tar.seek(member.image_offset)
        tar.write(data + bytes(member.image_size - len(data)))
    found = _train(_config(shards, verify="off", max_skipped=1, workers=2), 2)
    assert victim not in found[1].keys
    assert f"sample {victim} skipped in step 1: radiograph of another size than the index says" in caplog.text


def test_a_resumed_run_goes_on_counting_and_notes_nothing_twice(shards, tmp_path):
    config, record = _config(shards, max_skipped=20), tmp_path / "skipped.jsonl"
    for batch in _train(_config(shards), 6)[::2]:
        _damage_image(shards, batch.keys[1])

    def train(config: RunConfig, start: int) -> int:
        options = {"rank": 0, "world_size": 1, "start_step": start, "stop_step": 6, "record": record}
        return len(list(build_train_loader(config, **options)))

    assert train(config, 0) == 6
    undisturbed = record.read_text()
    for start in (2, 3, 5):
        assert train(config, start) == 6 - start
        assert record.read_text() == undisturbed
    before = sum(json.loads(line)["step"] < 5 for line in undisturbed.splitlines())
    assert before >= 3
    with pytest.raises(RuntimeError, match=f"max_skipped = 2: {before} damaged"):
        train(_config(shards, max_skipped=2), 5)


def test_order_answers_for_a_damaged_folder(shards):
    (shards / load_index(shards).of_split("train")[0].name).unlink()
    assert len(list(order_lines(_config(shards).data, seed=1, global_batch_size=6, steps=range(2)))) == 2


def test_a_damaged_remote_tar_is_fetched_once_and_skipped(shards, tmp_path):
    whole = _train(_config(shards), 2)
    lost = load_index(shards).of_split("train")[1]
    tar = bytearray((shards / lost.name).read_bytes())
    tar[700] ^= 1
    (shards / lost.name).write_bytes(tar)
    with serve(shards) as server:
        remote = _config(shards, shards=server.url, cache_dir=str(tmp_path / "cache"), max_skipped=50)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("imitate_ds.data.shard_store.FIRST_WAIT_S", 0.01)
            found = _train(remote, 2)
        assert server.requests[lost.name] <= 12, (
            "the attempts of the loader and of its prefetch, not those of every sample"
        )
    gone = {member.key for member in lost.members}
    assert all(len(set(batch.keys)) == 6 and not gone & set(batch.keys) for batch in found)
    assert all(set(one.keys) - gone <= set(other.keys) for one, other in zip(whole, found, strict=True))


def test_validation_refuses_another_encoder_than_the_runs(shards):
    loader = {"input_size": 32, "batch_size": 4, "workers": 0}
    encoder = text_info(load_index(shards))["encoder"]
    assert len(build_eval_loader(load_index(shards), "val", text_encoder=encoder, **loader)) > 0
    with pytest.raises(ValueError, match=r"data\.shards: embedded anew during the run"):
        build_eval_loader(load_index(shards), "val", text_encoder="another", **loader)
