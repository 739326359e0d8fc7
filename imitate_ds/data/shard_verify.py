"""Read every byte of a shard folder again and say what is wrong with it."""

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from imitate_ds.data.radiographs import decode_radiograph
from imitate_ds.data.shard_index import INDEX, ShardEntry, ShardIndex, build_id, file_sha256, load_index, read_shard
from imitate_ds.data.shard_sample import error_rule
from imitate_ds.data.text_cache import verify_text


def verify_shards(root: Path) -> list[str]:
    """One line per problem, which names samples by key; an empty list where all is well.

    Raises what load_index raises where there is nothing to verify.
    """
    index = load_index(root)
    problems: list[str] = []
    if index.build_id != build_id(index.shards):
        problems.append(f"{INDEX}: build_id does not belong to these shards")
    problems += _torn_patients(index)
    for shard in index.shards:
        problems += [f"{shard.name}: {problem}" for problem in _shard_problems(index, shard)]
    return problems + verify_text(root, index)


def _torn_patients(index: ShardIndex) -> list[str]:
    splits: dict[str, set[str]] = defaultdict(set)
    for shard in index.shards:
        for member in shard.members:
            splits[member.patient].add(shard.split)
    torn = sum(len(found) > 1 for found in splits.values())
    return [f"{INDEX}: {torn} of {len(splits)} patients are in more than one split; build again"] if torn else []


def _shard_problems(index: ShardIndex, shard: ShardEntry) -> Iterator[str]:
    if file_sha256(index.root / shard.name) != shard.sha256:
        yield "sha256 differs from the index; copy or build it again"
        return
    yield from _misplaced(index.root / shard.name, shard)
    for member, image, meta in read_shard(index.root, shard):
        if meta.get("split") != shard.split:
            yield f"sample {member.key}: is of another split than its shard"
        if crc32(image) != member.image_crc:
            yield f"sample {member.key}: radiograph differs from its checksum in the index"
        if problem := _image_problem(image, index.image_size):
            yield f"sample {member.key}: radiograph {problem}"
    yield from _mask_problems(index.root / shard.name, index.image_size)


def _mask_problems(path: Path, size: int) -> Iterator[str]:
    with tarfile.open(path) as tar:
        for info in tar:
            file = tar.extractfile(info) if info.name.endswith(".mask.png") else None
            if file and (problem := _image_problem(file.read(), size)):
                yield f"mask {info.name}: {problem}"


def _misplaced(path: Path, shard: ShardEntry) -> Iterator[str]:
    with tarfile.open(path) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    for member in shard.members:
        if places.get(f"{member.key}.jpg") != (member.image_offset, member.image_size):
            yield f"sample {member.key}: no radiograph where the index says"
        if places.get(f"{member.key}.json") != (member.meta_offset, member.meta_size):
            yield f"sample {member.key}: no JSON where the index says"


def _image_problem(data: bytes, size: int) -> str:
    try:
        shape = decode_radiograph(data).shape
    except (ValueError, OSError) as error:
        return f"cannot be decoded: {error_rule(error)}"
    return "" if shape == (size, size) else f"is {shape[0]} x {shape[1]}, not {size} x {size}"
