"""results.json and report.html of a run: one result per task, and one page that shows them all and needs no other file.

Figures only: the page knows neither report text nor ids.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from imitate_ds.data.shard_index import write_atomic
from imitate_ds.evaluation.figure_names import RETRIEVAL_METRIC, place_of
from imitate_ds.evaluation.report_pictures import auroc_picture, retrieval_picture, task_picture, training_picture

RESULTS, REPORT, RECORDS = "results.json", "report.html", "metrics.jsonl"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }}
h1 {{ font-size: 1.6rem }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #d0d7de }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #e4e8ec; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
small {{ color: #59636e }} .note {{ white-space: normal }}
img {{ max-width: 100% }} pre {{ white-space: pre-wrap; font-size: 12px }}
.flag {{ background: #fff3cd; border-left: 4px solid #b58100; padding: .6rem 1rem }}
</style></head><body>
<h1>{title}</h1>
<p class="flag">{flag}</p>
{body}
</body></html>
"""


def open_out(out: Path) -> None:
    """Make the folder for results, before the work. Raises ValueError where what is there is not ours."""
    if out.is_file():
        raise ValueError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    load_results(out)


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Put one task's result into out/results.json, in the place of an older one, and draw report.html anew.

    Raises ValueError where results.json is there but is not ours.
    """
    open_out(out)
    others = [old for old in load_results(out) if old["task"] != result["task"]]
    results = sorted([*others, result], key=lambda one: one["task"])
    text = json.dumps({"results": results}, indent=1, allow_nan=False) + "\n"
    write_atomic(out / RESULTS, text.encode())
    write_report(out)


def load_results(out: Path) -> list[dict[str, Any]]:
    """The results in a folder, one per task; none where there is no results.json."""
    path = out / RESULTS
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())["results"]
        if all({"task", "protocol", "model", "data", "metrics"} <= result.keys() for result in results):
            return results
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path}: not a results file of imitate-ds; move it away, or choose another --out")


def write_report(out: Path, run_dir: Path | None = None) -> Path:
    """Draw out/report.html from results.json, and from the training records of run_dir (default: out) if it has any."""
    results = load_results(out)
    records = training_records((run_dir or out) / RECORDS)
    parts = [_task_section(result) for result in results]
    if records:
        parts.append(f"<h2>Training</h2>{training_picture(records)}")
    synthetic = [result for result in results if result["data"]["synthetic"] or result["model"].get("synthetic")]
    flag = "Research only, not for clinical use."
    if synthetic:
        flag = (
            f"<b>Synthetic data.</b> {flag} The figures show that the program works; they say nothing about medicine."
        )
    title = f"imitate_ds: {escape(out.resolve().name)}"
    path = out / REPORT
    write_atomic(path, PAGE.format(title=title, flag=flag, body="\n".join(parts)).encode())
    return path


def _task_section(result: dict[str, Any]) -> str:
    model, data = result["model"], result["data"]
    kind = " (synthetic)" if data["synthetic"] else ""
    about = (
        f"{model.get('image_encoder', 'model')}, preset {model.get('preset', 'unknown')}, on {data['source']}{kind}, "
        f"split {data['split']}: {data['samples']} radiographs of {data['patients']} patients. "
        f"Protocol {result['protocol']}; in brackets 95 % intervals by patient."
    )
    retrieval = result["task"] == "retrieval"
    table = _retrieval_table(result["metrics"]) if retrieval else _label_table(result["metrics"])
    picture = retrieval_picture(result) if retrieval else auroc_picture(result) + task_picture(result)
    tables = _confusion_table(result.get("curves", {})) + _worst_table(result.get("worst", {}))
    details = json.dumps({key: result.get(key) for key in ("model", "data", "settings")}, indent=1)
    return (
        f"<h2>{escape(result['task'].capitalize())}</h2><p>{escape(about)}</p>{table}{picture}{tables}"
        f"<details><summary>Settings</summary><pre>{escape(details)}</pre></details>"
    )


def _retrieval_table(metrics: dict[str, dict]) -> str:
    """Rows are levels and directions, columns R@k and P@k; beneath a figure what chance and a blind answer give."""
    rows: dict[str, dict[str, dict[str, dict]]] = {}
    for name, value in metrics.items():
        if match := RETRIEVAL_METRIC.fullmatch(name):
            cell = rows.setdefault(match["row"], {}).setdefault(match["measure"], {})
            cell[(match["level"] or "").rstrip("_")] = value
    columns = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    body = [
        [escape(name.replace("_", " ")), *(_retrieval_cell(row.get(column, {})) for column in columns)]
        for name, row in rows.items()
    ]
    note = (
        "<p><small>R@k: the right report or radiograph is among the first k. P@k: share of the first k that have a class "
        "of the query, mean over classes; duplicate texts stay separate candidates there. Chance: a random order. Blind: "
        "the best answer that is the same for every query.</small></p>"
    )
    return html_table(["level / direction", *columns], body) + note


def _retrieval_cell(cell: dict[str, dict]) -> str:
    levels = [f"{name} {_number(cell[name]['value'])}" for name in ("chance", "blind") if name in cell]
    return (with_interval(cell[""]) if "" in cell else "") + f"<br><small>{', '.join(levels)}</small>"


def _label_table(metrics: dict[str, dict]) -> str:
    """Rows are labels, what is over all of them first; columns are measures, of a probe the shares of the training labels."""
    rows: dict[str, dict[str, dict]] = {}
    for name, value in metrics.items():
        if place := place_of(name):
            rows.setdefault(place.label, {})[place.column] = value
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = []
    for label, row in rows.items():
        first = next(iter(row.values()))
        size = first["n"] if "positives" not in first else f"{first['positives']} of {first['n']}"
        body.append(
            [escape(label), str(size), *(with_interval(row[column]) if column in row else "" for column in columns)]
        )
    undefined = max((len(value.get("not_defined", [])) for value in metrics.values()), default=0)
    note = f"<p><small>{undefined} labels have one value only in this split: not defined, left out of the mean.</small></p>"
    return html_table(["label", "positive", *columns], body) + (note if undefined else "")


def _confusion_table(curves: dict[str, dict]) -> str:
    """Of exclusive classes, classes against classes; of labels a row each, with the calibration error."""
    if "confusion" in curves:
        classes, counts = (curves["confusion"][what] for what in ("classes", "counts"))
        rows = [[escape(name), *map(str, row)] for name, row in zip(classes, counts, strict=True)]
        return html_table(["true class (columns: the likeliest one)", *classes], rows) + _calibration_note(curves)
    rows = []
    for name, curve in curves.items():
        kind, _, label = name.partition("/")
        if kind == "confusion":
            (right_negative, false), (missed, right_positive) = curve["counts"]
            error = _number(curves.get(f"calibration/{label}", {}).get("ece"))
            rows.append([escape(label), *map(str, (right_positive, missed, false, right_negative)), error])
    header = ["at 0.5", "true positive", "false negative", "false positive", "true negative", "ECE"]
    return html_table(header, rows) + _calibration_note(curves) if rows else ""


def _calibration_note(curves: dict[str, dict]) -> str:
    if not any(name.startswith("calibration/") for name in curves):
        return ""
    return (
        "<p><small>0.5 and the likeliest class are not chosen on what is scored. ECE, expected calibration error: over ten bins "
        "of equal width, weighed by their numbers, the mean distance of probability and share that is positive.</small></p>"
    )


def _worst_table(worst: dict[str, Any]) -> str:
    """Keys alone: who may see the radiograph can look it up."""
    if not worst:
        return ""
    values = [str(value) if isinstance(value, int) else _number(value) for value in worst["values"]]
    rows = [[f"<code>{escape(key)}</code>", value] for key, value in zip(worst["keys"], values, strict=True)]
    return html_table(["worst samples, by key", worst["measure"]], rows)


def with_interval(value: dict) -> str:
    if value["value"] is None:
        return "<small>not defined</small>"
    interval = "" if value["low"] is None else f" <small>[{_number(value['low'])}, {_number(value['high'])}]</small>"
    spread = f" <small>± {_number(value['std'])}</small>" if "std" in value else ""
    return f"<b>{_number(value['value'])}</b>{spread}{interval}"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def training_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    whole = [line for line in lines if line.startswith("{") and line.endswith("}")]
    return [json.loads(line) for line in whole]
