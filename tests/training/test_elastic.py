"""A run goes on with other ranks, at other ZeRO stages: the same losses, and nothing of the state is lost."""

import json

import pytest
import torch

from imitate_ds.training.checkpoint_files import checkpoint_folders, read_manifest, verify_checkpoint
from imitate_ds.training.engine_state import MOMENTS, WEIGHT
from imitate_ds.training.tensor_files import WHOLE, TensorFiles
from tests.launching import run

pytestmark = pytest.mark.slow

STEPS = 50


def go_on(folder, stage, stop, ranks, *options):
    out = folder / f"until-{stop}.json"
    run(
        "tests.training.elastic_worker",
        str(folder / "checkpoints"),
        str(stage),
        str(stop),
        str(out),
        *options,
        ranks=ranks,
    )
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return go_on(tmp_path_factory.mktemp("undisturbed"), 0, STEPS, 2)


def tensors_of(checkpoint):
    """Everything in a checkpoint, put together from whatever pieces it is in."""
    found = {}
    with TensorFiles(sorted(checkpoint.glob("*.safetensors"))) as files:
        for kind in (WEIGHT, *MOMENTS):
            for name in files.names(kind):
                pieces = files._pieces[kind, name]
                found[kind, name] = files.read(kind, name, 0, sum(piece.numel for piece in pieces))
        return found | {(WHOLE, name): files.whole(name) for name in files.names(WHOLE)}


def assert_equal_to_the_bit(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(key[0] == MOMENTS[1] and tensor.any() for key, tensor in one.items())


def test_four_two_one_and_three_ranks_at_other_stages_equal_two_undisturbed(tmp_path, undisturbed):
    plan = [(1, 14, 4), (3, 26, 2), (2, 38, 1), (1, STEPS, 3)]  # stage, until which step, ranks
    losses, sums, start = {}, {}, 0
    saved = tmp_path / "checkpoints"
    for number, (stage, stop, ranks) in enumerate(plan):
        ended = go_on(tmp_path, stage, stop, ranks, *(["--background"] if number == 1 else []))
        assert ended["start"] == start
        if start:
            (again,) = checkpoint_folders(tmp_path / f"again-{start}")
            assert_equal_to_the_bit(saved / again.name, again)
        losses |= ended["losses"]
        sums, start = ended["sums"], stop
    assert losses.keys() == undisturbed["losses"].keys()
    for step, loss in undisturbed["losses"].items():
        assert losses[step] == pytest.approx(loss, rel=1e-5), step
    for name, value in undisturbed["sums"].items():
        tolerance = (
            {"rel": 0, "abs": 0}
            if "running" in name or name.endswith("num_batches_tracked")
            else {"rel": 1e-3, "abs": 1e-3}
        )
        assert sums[name] == pytest.approx(value, **tolerance), name
    newest = checkpoint_folders(saved)[-1]
    assert verify_checkpoint(newest) is None
    assert read_manifest(newest)["world_size"] == 3
    assert read_manifest(newest)["optimizer_steps"] == STEPS
