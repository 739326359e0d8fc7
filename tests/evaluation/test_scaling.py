"""Rows of a sweep, the lines they lie on, and the page."""

import csv
import json

import pytest
from matplotlib.figure import Figure

from imitate_ds.evaluation.scaling_laws import AXES, FRONTIER, lines_of, measures
from imitate_ds.evaluation.scaling_page import _draw, _looks, write_scaling
from imitate_ds.evaluation.scaling_rows import Planned, ScalingRow, read_row

COUNTERS = {
    "format": "imitate_ds.counters/1",
    "flops_per_study": 4e9,
    "parameters": 11_000_000,
    "trainable_parameters": 10_000_000,
    "device": "NVIDIA H100 80GB HBM3",
    "precision": "bf16",
    "peak_flops": 1e15,
}


def _row(encoder="small", share=1.0, seed=0, batch=32, **changes) -> ScalingRow:
    """A run that obeys L = 2 + 3e3 (size x studies)^-.5, a little off by its seed."""
    size, studies = {"small": 1e9, "large": 8e9}[encoder], round(1600 * share)
    loss = (2 + 3e3 * (size * studies / 1e4) ** -0.5) * (1 + 0.002 * seed)
    values = dict.fromkeys(ScalingRow._fields)
    values |= {"run": f"{encoder}-{batch}-{share}-{seed}", "encoder": encoder, "batch": batch, "negatives": "global"}
    values |= {"share": share, "budget": 0, "seed": seed, "state": "finished", "reason": "", "train_studies": studies}
    values |= {
        "planned_steps": studies // batch,
        "steps": studies // batch,
        "studies_seen": studies,
        "flops_per_study": size,
    }
    values |= {"flops": size * studies, "val_loss": loss, "train_loss": 4 * loss, "auroc": 0.8 - 0.01 * loss}
    return ScalingRow(**{**values, "device": "cpu", "precision": "fp32", **changes})


@pytest.fixture
def rows():
    return [_row(e, share, seed) for e in ("small", "large") for share in (0.1, 0.25, 0.5, 1.0) for seed in (0, 1)]


def test_a_row_is_what_the_files_of_a_run_say(tmp_path):
    records = [
        {"step": step, "split": "train", "loss": 10.0 - step, "studies_per_second": 5.0 if step == 1 else 500.0}
        for step in range(1, 11)
    ]
    records += [{"step": 10, "split": "val", "loss": 3.5}]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + '{"step": 11, "sp'
    )
    (tmp_path / "counters.json").write_text(json.dumps(COUNTERS))
    planned = Planned("small", 64, "global", 0.5, 0, 3, 900, 10)
    row = read_row(planned, tmp_path, {"state": "finished", "step": 10, "ranks": 4, "reason": ""})
    assert (row.studies_seen, row.flops) == (640, 640 * 4e9)
    assert (row.val_loss, row.train_loss, row.auroc) == (3.5, 0.5, None)
    assert row.studies_per_second == 500
    assert row.tflops == pytest.approx(4e9 * 500 / 4 / 1e12)
    assert row.mfu == pytest.approx(4e9 * 500 / 4 / 1e15)
    (tmp_path / "counters.json").write_text(json.dumps({**COUNTERS, "peak_flops": None}))
    assert read_row(planned, tmp_path, {"state": "finished", "step": 10, "ranks": 4}).mfu is None
    empty = read_row(planned, tmp_path / "none", {})
    assert (empty.state, empty.flops, empty.val_loss, empty.steps) == ("not begun", None, None, 0)
    probe = {
        "task": "probe",
        "protocol": "strict",
        "model": {},
        "data": {"split": "val"},
        "settings": {"train_split": "train"},
    }
    results = [{**probe, "metrics": {"100%/auroc_macro": {"value": 0.7, "low": 0.6, "high": 0.8}}}]
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    splits = {("val", "train"): 0.7, ("test", "train"): None, ("val", "val"): None, None: None}
    assert {of: read_row(planned, tmp_path, {}, of).auroc for of in splits} == splits
    (tmp_path / "counters.json").write_text('{"format": "x/2"}')
    with pytest.raises(ValueError, match=r"counters\.json: format = 'x/2': must be"):
        read_row(planned, tmp_path, {})


def test_runs_lie_on_lines_of_their_encoder_and_the_best_on_one_of_their_own(rows):
    loss, error = measures(rows)
    compute, data, batch = AXES
    lines = {line.name: line for line in lines_of(rows, compute, loss)}
    assert set(lines) == {"small", "large", FRONTIER}
    assert [len(lines[name].rows) for name in ("small", "large")] == [8, 8]
    best = lines[FRONTIER].law
    assert best is not None
    assert best.intervals is not None
    assert best.intervals["exponent"][0] < 0.5 < best.intervals["exponent"][1]
    assert best.floor == pytest.approx(2, rel=0.1)
    assert {line.name for line in lines_of(rows, data, error)} == {"small", "large"}
    assert lines_of(rows, batch, loss) == [], "one batch size is no axis"


def test_runs_of_one_length_lie_on_the_line_of_the_best_alone(rows):
    """As with a budget of studies: what a smaller share of the data costs is no compute."""
    sizes = {"small": 1.0, "large": 8.0, "huge": 30.0}
    budget = [
        _row("small", share, seed)._replace(
            encoder=e, budget=4800, flops=1e12 * size, val_loss=5 * size**-0.2 / share**0.1 + seed / 100
        )
        for e, size in sizes.items()
        for share in (0.25, 0.5, 1.0)
        for seed in (0, 1)
    ]
    lines = {line.name: line for line in lines_of(budget, AXES[0], measures(budget)[0])}
    assert [name for name, line in lines.items() if line.law] == [FRONTIER]
    assert lines[FRONTIER].law.exponent == pytest.approx(0.2, abs=0.02)  # type: ignore[union-attr]
    assert {row.share for row in lines[FRONTIER].rows} == {1.0}
    assert {len(line.rows) for name, line in lines.items() if name != FRONTIER} == {2}
    assert "small, 0.25 of the data" in lines
    assert all(line.law for line in lines_of(budget, AXES[1], measures(budget)[0]))


def test_of_several_budgets_a_law_of_compute_is_of_one_share():
    rows = [
        _row(share=share)._replace(budget=budget, flops=1e9 * budget, val_loss=9 * budget**-0.1 / share**0.2)
        for budget in (1000, 4000, 16000)
        for share in (0.5, 1.0)
    ]
    lines = lines_of(rows, AXES[0], measures(rows)[0])
    assert [line.name for line in lines] == ["0.5 of the data", "1 of the data", FRONTIER]
    assert all(line.law and line.law.exponent == pytest.approx(0.1) for line in lines)


def test_a_failed_run_and_a_loss_that_is_not_of_all_stand_on_no_line(rows):
    failed = rows[0]._replace(state="failed", val_loss=None, reason="no such file")
    assert measures([failed, *rows[1:]])[0].name == "val_loss"
    without = [rows[0]._replace(val_loss=None), *rows[1:]]
    (measure, _) = measures(without)
    assert measure.name == "train_loss"
    batches = [_row(batch=batch, seed=seed) for batch in (16, 32, 64) for seed in (0, 1)]
    assert lines_of(batches, AXES[2], measures(batches)[0])[0].name == "all runs"
    assert lines_of(batches, AXES[2], measure) == [], "a training loss grows with the batch, whatever is learned"
    assert FRONTIER in {line.name for line in lines_of(batches, AXES[0], measures(batches)[0])}
    assert FRONTIER not in {line.name for line in lines_of(batches, AXES[0], measure)}


def test_an_encoder_has_one_colour_and_its_lines_each_a_marker():
    rows = [_row(encoder, share, seed) for encoder in ("small", "large") for share in (0.5, 1.0) for seed in (0, 1)]
    measure = measures(rows)[0]
    lines = lines_of([row._replace(budget=4800) for row in rows], AXES[0], measure)
    looks = _looks(lines)
    assert len(looks) == len(set(looks.values())) == 5
    small, large = ({looks[line.name] for line in lines if line.rows[0].encoder == name} for name in ("small", "large"))
    assert {colour for colour, _ in small - {looks[FRONTIER]}}.isdisjoint(colour for colour, _ in large)
    alone = _looks([line for line in lines if line.rows[0].encoder == "small" and line.name != FRONTIER])
    assert len({colour for colour, _ in alone.values()}) == 3  # with that of the line of the best


def test_laws_of_one_encoder_are_told_apart():
    rows = [
        _row("small", share, batch=batch, seed=seed)
        for share in (0.25, 0.5, 1.0)
        for batch in (32, 64)
        for seed in (0, 1)
    ]
    rows = [row._replace(train_studies=round(1000 * row.share)) for row in rows]
    rows += [row._replace(encoder="large") for row in rows]
    axes = Figure().subplots()
    lines = lines_of(rows, AXES[1], measures(rows)[0])
    assert len(lines) == 4
    assert all(line.law for line in lines)
    _draw(axes, lines)
    handles, _ = axes.get_legend_handles_labels()
    assert len({(it.get_color(), it.get_linestyle(), it.get_marker()) for it in handles}) == 4


def test_the_page_needs_no_other_file_and_the_table_holds_every_run(rows, tmp_path):
    failed = _row(
        "large", 0.05, state="failed", reason="model.weights = '<x>': no such file", val_loss=None, flops=None
    )
    write_scaling(tmp_path, "sweep", [*rows, failed], synthetic=False)
    page = (tmp_path / "scaling.html").read_text()
    assert "16 of 17 runs have finished" in page
    assert "model.weights = &#x27;&lt;x&gt;&#x27;: no such file" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "no peak known" not in page  # no run says how fast it was
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found["format"] == "imitate_ds.scaling/1"
    assert [line["line"] for line in found["lines"] if line["axis"] == "flops"] == ["small", "large", FRONTIER] * 2
    assert all(line["law"]["intervals"]["exponent"] for line in found["lines"])
    table = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    assert len(table) == 17
    assert table[-1]["val_loss"] == ""
