"""What saves memory changes nothing else: two DeepSpeed ranks, sharded from the start, with checkpoints, offloaded."""

import json

import pytest

from tests.launching import run
from tests.training.memory_worker import STEPS, WAYS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("memory")
    run("tests.training.memory_worker", str(out), limit=900)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_the_plain_run(two_ranks, way):
    for rank in two_ranks:
        plain, found = rank["ways"]["zero1 chunks" if "chunks" in way else "zero1"], rank["ways"][way]
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(plain["norms"], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_batch_norm_counts_every_forward_pass_once(two_ranks, way):
    passes = STEPS * (2 if "chunks" in way else 1)
    assert [rank["ways"][way]["counted"] for rank in two_ranks] == [passes, passes]


def test_a_model_built_in_shares_has_the_weights_of_the_whole(two_ranks):
    for rank in two_ranks:
        assert len(rank["builds"]) == 6
        for name, built in rank["builds"].items():
            assert built["same"], name
            assert built["draws"], name
            assert built["frozen"], name
            assert built["share"] == pytest.approx(0.5, abs=0.01), name
