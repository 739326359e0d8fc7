"""`imitate-ds profile`, for real: a tiny run on phantom shards, and the page, the figures and the trace that it leaves."""

import gzip
import json
import signal
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from imitate_ds.config import build_run_config
from imitate_ds.profiling import profile
from imitate_ds.training.drain import Drain
from tests.tiny_model import TINY_MODEL


@pytest.fixture
def config(tmp_path, phantom_shards):
    return build_run_config(
        {
            "name": "tiny",
            "output_dir": str(tmp_path / "runs"),
            "data": {"shards": str(phantom_shards), "input_size": 32, "workers": 0},
            "model": TINY_MODEL,
            "train": {"micro_batch_size": 8, "deepspeed": "zero1"},
        }
    )


class _Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value[:19] for name, value in attrs if name in ("src", "href")]


def _keys_and_texts(shards):
    for path in shards.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    yield from (
                        member.name.split(".")[0],
                        *(record[part] for part in ("findings", "impression") if record[part]),
                    )


def test_a_few_steps_leave_figures_that_add_up_a_page_and_a_trace_without_patients(
    process_group, config, phantom_shards, tmp_path
):
    out = tmp_path / "profile"
    found = profile(config, steps=2, out=out)
    assert sorted(path.name for path in out.iterdir()) == ["profile.html", "profile.json", "trace.json.gz"]
    assert not config.run_dir.exists()
    assert json.loads((out / "profile.json").read_text()) == found

    assert found["time_accounted_for"] == pytest.approx(1, abs=0.03)
    assert sum(part["share"] for part in found["time"].values()) == pytest.approx(found["time_accounted_for"])
    assert sum(found["flops_by_part"].values()) == found["flops_per_study"]
    assert found["studies_per_second"] * found["seconds_per_step"] == pytest.approx(8)
    assert 0 < found["own_lines_share"] < 1
    assert "mfu" not in found
    assert found["operators"][0]["milliseconds"] >= found["operators"][1]["milliseconds"] > 0

    sources = _Sources()
    sources.feed((out / "profile.html").read_text())
    assert sources.found == ["data:image/svg+xml;"]  # nothing from elsewhere

    trace = gzip.decompress((out / "trace.json.gz").read_bytes()).decode()
    assert {"imitate_ds: forward", "imitate_ds: loss"} <= {
        event.get("name") for event in json.loads(trace)["traceEvents"]
    }
    words = set(_keys_and_texts(phantom_shards))
    assert len(words) > 240
    assert not [word for word in words if word in trace]


def test_asked_to_end_it_says_so_and_writes_nothing(process_group, config, tmp_path, capfd):
    drain = Drain()
    drain.hear(signal.SIGTERM)
    assert profile(config, drain, steps=1, out=tmp_path / "profile") == {}
    assert "stopped by SIGTERM on rank 0; nothing is written: start it again" in capfd.readouterr().out
    assert not list((tmp_path / "profile").iterdir())


def test_refusals(config, monkeypatch):
    rule = r"--out .*tiny: must not be the folder of the run, output_dir/name; name another one"
    with pytest.raises(ValueError, match=rule):
        profile(config, out=config.run_dir)
    monkeypatch.chdir(config.output_dir.parent)
    with pytest.raises(ValueError, match=rule):
        profile(config, out=Path("runs/../runs/tiny"))
    with pytest.raises(ValueError, match="--steps 0: must be at least 1"):
        profile(config, steps=0)
