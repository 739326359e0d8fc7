"""Settings that make a step faster or smaller leave the loss curve what it is: benchmarks/speedups.py, in small."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_loss_curves_stay_those_of_the_plain_run(repository, tmp_path):
    out = tmp_path / "speedups.json"
    wanted = ["block", "bf16", "grad cache"]
    command = [sys.executable, "benchmarks/speedups.py", "--steps", "20", "--ranks", "1", "--out", str(out)]
    done = subprocess.run([*command, "--only", *wanted], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())["switches"]
    assert {*wanted, "plain", "plain convnext"} == found.keys()
    assert found["block"]["largest_relative_difference"] == 0  # a second pass is the first one again, to the last bit
    for name in wanted:
        assert found[name]["steps"] == 20
        assert found[name]["largest_relative_difference"] <= found[name]["tolerance"], name
