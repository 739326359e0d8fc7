"""One cluster of three nodes for all tests in here, and what they submit to it."""

from collections.abc import Callable, Iterator

import pytest

from tests.cluster.runs import Run, submit
from tests.cluster.slurm import Cluster, why_not_here

STEPS = 60

Start = Callable[..., Run]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if lacking := why_not_here():
        pytest.skip(lacking)
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def start(cluster, phantom_shards, tmp_path_factory) -> Start:
    """Submit a run, by its name."""
    runs = tmp_path_factory.mktemp("runs")

    def start(name: str, *settings: str, options=("--nodes=2",), entrance="witness", **environment: str) -> Run:
        settings = (f"train.max_steps={STEPS}", *settings)
        return submit(
            cluster, runs, phantom_shards, name, *settings, options=options, entrance=entrance, environment=environment
        )

    return start


@pytest.fixture(scope="session")
def undisturbed(start) -> Run:
    """Two ranks under plain srun, left alone."""
    run = start("undisturbed")
    run.wait_for_end()
    return run
