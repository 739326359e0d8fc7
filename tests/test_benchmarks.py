"""The benchmarks run: at sizes that take seconds, and say nothing about speed."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

FORMS = ["strips", "gemm", "gemm_twice", "published", "dense", "open_clip", "memeff"]


def run_loss(repository, out, *arguments: str) -> str:
    command = [sys.executable, "benchmarks/loss.py", "--device", "cpu", "--out", str(out), "--width", "32"]
    done = subprocess.run([*command, "--text-width", "48", *arguments], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forms_of_the_loss_agree_where_they_are_timed(repository, tmp_path):
    out = tmp_path / "results" / "loss.json"
    sizes = ["--pair", "48x48", "32x128", "--step", "48x48", "32x128"]
    printed = run_loss(repository, out, *sizes, "--minutes", "0.1", "--forms", *FORMS)
    assert "strips" in printed
    times = json.loads(out.read_text())["times"]
    assert times["machine"]["torch"]
    assert times["forms"]["open_clip"]["leaves_out"]
    for kind, names in {"pair": {"strips", "dense"}, "step": {"strips", "dense", "published"}}.items():
        square, rectangle = times["cells"][kind]["48x48"], times["cells"][kind]["32x128"]
        for name in names:  # to float64, so that a form that computes something else is not timed as one of them
            assert square[name]["gradient_error"] < 1e-5, (kind, name)
            assert rectangle[name]["over_gemm"] > 0
        assert square["gemm"]["flops"] < square["gemm_twice"]["flops"]
        # All strips of so few rows are kept: one product less a pair, and the prior once.
        assert square["strips"]["flops"] < square["gemm"]["flops"]
    assert times["cells"]["pair"]["48x48"]["memeff"]["note"] == "CUDA only"


def test_memory_of_strips_is_measured_in_a_process_of_its_own(repository, tmp_path):
    out = tmp_path / "loss.json"
    run_loss(repository, out, "--rss", "256")
    (peak,) = json.loads(out.read_text())["strips_memory"]["peaks"]
    assert 0 < peak["peak_bytes"] < 2**27


def test_a_form_that_would_take_too_long_is_skipped(repository, tmp_path):
    out = tmp_path / "loss.json"
    run_loss(repository, out, "--pair", "16x16", "--minutes", "0", "--forms", "strips")
    cells = json.loads(out.read_text())["times"]["cells"]
    assert cells["pair"]["16x16"]["strips"]["note"].startswith("skipped")


def test_messages_of_the_exchanges_are_those_of_the_formula(repository, tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, "benchmarks/scaling.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # it stops where bytes or products are not those of its formulas
    record = json.loads(out.read_text())
    assert record["measured"]["2"]["exchanges"]["owner"]["messages"]
    assert record["model"]["kind"] == "model, not measured"
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
