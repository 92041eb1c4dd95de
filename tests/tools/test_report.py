"""`zo-peft report`: the numbers of runs as they are in their files, and a page that shows them."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from PIL import Image
from tiny import command_line

from zo_peft.cli import main
from zo_peft.core.direction import Direction
from zo_peft.core.journal import JOURNAL_NAME, Journal, Record, read
from zo_peft.errors import UserError
from zo_peft.tools.charts import SMOOTHED, STYLE, WINDOW, draw, plain, smooth, styles
from zo_peft.tools.demo import EMBEDDED
from zo_peft.tools.history import load, names

CHROMIUM = shutil.which("chromium")


def trained(folder: Path, strategy: str) -> Path:
    few = folder / "few.jsonl"
    few.write_text("".join((EMBEDDED / "test.jsonl").read_text().splitlines(True)[:32]))
    options = command_line(
        folder / strategy,
        lora_target_modules="q_proj",
        eval_file=few,
        strategy=strategy,
        max_forward_passes=240,
        zo_eps=1e-2 if strategy == "gv" else None,
        per_device_eval_batch_size=32,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
    )
    assert main(["train", *options]) == 0
    return folder / strategy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind: forward-only, and with gradients."""
    folder = tmp_path_factory.mktemp("runs")
    return {strategy: trained(folder, strategy) for strategy in ("gv", "adam")}


def log_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def test_the_series_of_a_run_are_those_of_its_journal_and_its_log(runs: dict[str, Path]) -> None:
    run, records, log = load(runs["gv"], "gv"), [], log_of(runs["gv"])
    records = list(read(runs["gv"] / JOURNAL_NAME)[1])
    assert run.steps["forward_passes"].tolist() == [r.forward_passes for r in records]
    for name in ("loss", "spread", "eps"):
        assert run.steps[name].tolist() == [getattr(record, name) for record in records]
    assert run.steps["slope"].tolist() == [abs(record.slope) for record in records]
    for entry in log:
        if "loss" in entry:
            step = entry["step"] - 1
            assert run.steps["forward_passes"][step] == entry["forward_passes"]
            assert run.steps["seconds"][step] == entry["seconds"]
    assert (np.diff(run.steps["seconds"]) >= 0).all()

    evaluated = [entry for entry in log if "eval_loss" in entry]
    assert run.metric_name == "accuracy"
    metrics = json.loads((runs["gv"] / "zo_metrics.json").read_text())
    accuracies = [metrics["metric_before"], *(entry["eval_accuracy"] for entry in evaluated)]
    assert run.evaluations["metric"].tolist() == accuracies
    passes = [0, *(records[entry["step"] - 1].forward_passes for entry in evaluated)]
    assert run.evaluations["forward_passes"].tolist() == passes
    assert run.evaluations["seconds"].tolist() == [0, *(e["seconds"] for e in evaluated)]


def test_a_run_with_gradients_is_its_log(runs: dict[str, Path]) -> None:
    run = load(runs["adam"], "adam")
    log = [entry for entry in log_of(runs["adam"]) if "loss" in entry]
    for name in ("step", "forward_passes", "seconds", "loss", "learning_rate"):
        assert run.steps[name].tolist() == [entry[name] for entry in log]
    assert np.isnan(run.steps["slope"]).all()
    assert len(run.evaluations["metric"]) == 1 + 4 + 1
    assert set(draw([run])) == {"loss", "metric", "steps"}


def test_without_its_journal_a_run_is_its_log(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(runs["gv"] / "trainer_state.json", tmp_path)
    found, whole = load(tmp_path, "x").steps, load(runs["gv"], "gv").steps
    at = found["step"].astype(int) - 1
    for name in ("forward_passes", "seconds", "slope", "spread", "eps"):
        assert found[name].tolist() == whole[name][at].tolist()


def test_a_killed_run_is_its_journal_and_its_last_checkpoint(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    whole = load(runs["gv"], "gv").steps
    shutil.copy(runs["gv"] / JOURNAL_NAME, tmp_path)
    alone = load(tmp_path, "x")
    assert alone.steps["loss"].tolist() == whole["loss"].tolist()
    assert np.isnan(alone.steps["seconds"]).all()
    assert set(draw([alone])) == {"loss", "steps"}

    shutil.copytree(runs["gv"] / "checkpoint-20", tmp_path / "checkpoint-20")
    known = np.isfinite(load(tmp_path, "x").steps["seconds"])
    assert known.tolist() == [True] * 20 + [False] * (len(known) - 20)

    # A run that was begun anew in the folder of one that ended is not that one.
    journal = Journal(tmp_path / JOURNAL_NAME, {})
    journal.append(record(0))
    journal.close()
    for name in ("zo_metrics.json", "trainer_state.json"):
        shutil.copy(runs["gv"] / name, tmp_path)
    begun = load(tmp_path, "x")
    assert (len(begun.steps["loss"]), begun.metrics) == (1, {})


def record(step: int, **changes: Any) -> Record:
    passes = 8 * (step + 1)
    plain = Record(
        step, 1e-3, 1.0, 0.5, 0.6, 0.7, 1 / (step + 1), 1e-2, passes, passes, Direction()
    )
    return replace(plain, **changes)


def journalled(folder: Path, count: int = 50, **changes: dict[str, Any]) -> Path:
    """A run's folder with a journal alone; changes by step."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / JOURNAL_NAME, {})
    for step in range(count):
        journal.append(record(step, **changes.get(f"step_{step}", {})))
    journal.close()
    return folder


def test_skipped_updates_and_dropped_losses_are_counted_and_marked(tmp_path: Path) -> None:
    skipped = {"loss": math.inf, "slope": 0.0, "chosen": {"skipped": "all", "non_finite": 4}}
    folder = journalled(tmp_path, step_7=skipped, step_20={"chosen": {"non_finite": 2}})
    run = load(folder, "x")
    assert (run.total("skipped"), run.total("non_finite")) == (1, 6)
    figures = draw([run])
    assert set(figures) == {"loss", "steps", "faults"}
    crosses = [line for line in figures["loss"].axes[0].lines if line.get_marker() == "x"]
    assert crosses[0].get_xydata().tolist() == [[64, pytest.approx((1 / 7 + 1 / 9) / 2)]]
    totals = [axes.lines[0].get_ydata()[-1] for axes in figures["faults"].axes]
    assert totals == [1, 6]
    assert set(draw([load(journalled(tmp_path / "whole"), "x")])) == {"loss", "steps"}


def test_a_run_without_candidates_has_no_panels_of_them(tmp_path: Path) -> None:
    alone = {f"step_{step}": {"eps": 0.0, "spread": 0.0} for step in range(9)}
    guided = load(journalled(tmp_path / "guided", 9, **alone), "guided")
    both = [guided, load(journalled(tmp_path / "gv", 9), "gv")]
    labels = [[axes.get_ylabel() for axes in draw(some)["steps"].axes] for some in ([guided], both)]
    assert [len(shown) for shown in labels] == [2, 4]
    assert "eps" in labels[1]
    assert "eps" not in labels[0]


def test_of_a_task_only_evaluations_on_validation_examples_are_compared(tmp_path: Path) -> None:
    log = [{"step": 5, "loss": 1.0, "forward_passes": 40}]
    log += [
        {"step": step, "eval_loss": 0.5, "eval_f1": f1} for step, f1 in ((3, 1), (5, 2), (5, 3))
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    metrics = {"metric_name": "f1", "metric_before": 9.0, "metric_after": 2.0, "metric_dev": 3.0}
    (tmp_path / "zo_metrics.json").write_text(json.dumps(metrics))
    run = load(tmp_path, "x")
    assert (run.metric_name, run.evaluations["metric"].tolist()) == ("f1", [1, 3])
    assert run.evaluations["forward_passes"].tolist() == [24, 40]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=200))
def test_the_trailing_mean_leaves_out_what_is_not_known(values: list[float]) -> None:
    window = min(WINDOW, max(1, round(SMOOTHED * len(values))))
    for index, mean in enumerate(smooth(pd.Series(values))):
        seen = [v for v in values[max(0, index - window + 1) : index + 1] if math.isfinite(v)]
        if seen:
            assert mean == pytest.approx(sum(seen) / len(seen), abs=1e-6)
        else:
            assert math.isnan(mean)


def test_names_have_as_many_parents_as_tell_them_apart() -> None:
    assert names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


def test_each_of_many_runs_has_a_style_of_its_own() -> None:
    with rc_context(fname=STYLE):
        assert len({(style["color"], style["linestyle"]) for style in styles(28)}) == 28


def test_the_page_is_one_file_and_shows_strange_names_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = '_<script>alert("$x_1$")<!'
    folder = journalled(tmp_path / name, step_3={"chosen": {"skipped": "x"}})
    metrics = {
        "forward_passes": 400,
        "strategy": "<b>",
        "metric_name": "<i>$",
        "metric_before": None,
        "wall_seconds": None,
        "settings": {"<u>": ["</td>"]},
    }
    (folder / "zo_metrics.json").write_text(json.dumps(metrics))
    log = [{"step": 5, "eval_loss": 1.0, "eval_<i>$": 0.5}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    out = tmp_path / "report"
    assert main(["report", str(folder), "--output_dir", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    text = Path(result["page"]).read_text(encoding="utf-8")
    tags = set(re.findall(r"<(\w+)", text))
    assert tags.isdisjoint({"script", "b", "i", "u", "link", "iframe"})
    assert "&lt;u&gt;" in text
    assert str(tmp_path) not in text
    assert not re.search(r"https?:|url\(|@import", text)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert text.count("src=") == len(pictures) == len(result["charts"]) == 4
    for picture, chart in zip(pictures, result["charts"]):
        assert base64.b64decode(picture) == Path(chart).read_bytes()
    assert plain("_a $b$\n") == r" _a \$b\$"


def test_several_runs_are_rows_of_one_table_and_their_settings_compared(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["report", *map(str, runs.values()), str(runs["gv"]), "--output_dir", str(tmp_path)]
    assert main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["run"] for row in rows] == ["gv", "adam"]
    for row in rows:
        metrics = json.loads((runs[row["run"]] / "zo_metrics.json").read_text())
        ends = f"{metrics['metric_before']:.4f} → {metrics['metric_after']:.4f}"
        assert row["metric"] == f"accuracy {ends}"
        assert row["forward passes"] == str(metrics["forward_passes"])
        assert row["peak MiB"] == f"{metrics['peak_memory_bytes'] / 2**20:,.0f}"
        assert row["ended"] == "yes"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<tr class="differs"><th>strategy</th><td>gv</td><td>adam</td></tr>' in text
    assert "<tr><th>per_device_train_batch_size</th><td>4</td><td>4</td></tr>" in text


BROKEN = {
    "holds no steps of a run": {},
    "is not readable JSON": {"trainer_state.json": b"{"},
    "is no journal": {JOURNAL_NAME: b"something else"},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_folder_without_a_whole_run_is_refused(
    message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in BROKEN[message].items():
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "report"
    assert main(["report", str(tmp_path), "--output_dir", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_damaged_journal_is_refused_and_a_torn_one_read(tmp_path: Path) -> None:
    path = journalled(tmp_path) / JOURNAL_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert len(load(tmp_path, "x").steps["loss"]) == 49
    path.write_bytes(whole[:-200] + b"?" + whole[-199:])
    with pytest.raises(UserError, match="record 49 of zo_journal is damaged"):
        load(tmp_path, "x")


def test_what_a_log_lacks_or_is_not_finite_is_not_known(tmp_path: Path) -> None:
    log = [
        {"step": 1, "loss": 1.0, "forward_passes": 2},
        {"step": 2, "loss": math.nan, "forward_passes": 4, "slope": -3.0, "zo_eps": None},
        {"step": 3, "loss": math.inf, "forward_passes": 6, "slope": 2.0},
        {"step": 3, "train_loss": 1.0},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    steps = load(tmp_path, "x").steps
    assert steps["forward_passes"].tolist() == [2, 4, 6]
    known = {name: np.isfinite(steps[name]).tolist() for name in ("loss", "slope", "eps")}
    assert known == {"loss": [True, False, False], "slope": [False, True, True], "eps": [False] * 3}
    assert steps["slope"][1:].tolist() == [3, 2]


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_place_of_the_reports_folder_is_kept(
    below: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, notes = journalled(tmp_path / "run"), tmp_path / "notes"
    notes.write_text("mine")
    out = notes / "report" if below else notes
    assert main(["report", str(run), "--output_dir", str(out)]) == 2
    assert "give a folder" in capsys.readouterr().err
    assert notes.read_text() == "mine"


def test_what_was_written_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 1.0, "forward_passes": 2}]})
    )
    argv = [str(tmp_path), "--output_dir", str(tmp_path / "report")]
    assert main(["report", *argv]) == 0
    assert capsys.readouterr().out.startswith("1 run, 1 chart: ")
    assert main(["report", str(journalled(tmp_path / "other")), *argv]) == 0
    assert capsys.readouterr().out.startswith("2 runs, 2 charts: ")


def browsed(page: Path, picture: Path) -> str:
    """What Chromium says while it takes a picture of a page, 1280 pixels wide."""
    command = [CHROMIUM or "chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    command += ["--enable-logging=stderr", "--v=0", "--hide-scrollbars"]
    command += ["--force-device-scale-factor=1", "--force-color-profile=srgb"]
    command += [f"--user-data-dir={picture.parent / 'profile'}", "--window-size=1280,4000"]
    command += [f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def pixels(path: Path | str) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="needs chromium (apt-get install chromium)",
)
def test_a_browser_shows_the_charts_and_complains_of_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty = journalled(tmp_path / "faulty", step_9={"chosen": {"skipped": "x", "non_finite": 4}})
    argv = ["report", *map(str, runs.values()), str(faulty), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    said = browsed(Path(result["page"]), tmp_path / "shot.png")
    assert "CONSOLE" not in said
    shot = pixels(tmp_path / "shot.png")
    charts = [pixels(chart) for chart in result["charts"]]
    assert len(charts) == 4
    for chart in charts:
        height, width = chart.shape[:2]
        left = (shot.shape[1] - width) // 2
        row = max(range(height), key=lambda y: len(np.unique(chart[y], axis=0)))
        assert len(np.unique(chart[row], axis=0)) > 20  # not blank
        found = np.flatnonzero((shot[:, left : left + width] == chart[row]).all(axis=(1, 2))) - row
        assert any((shot[y : y + height, left : left + width] == chart).all() for y in found)

    # What the console's silence is worth: a page that asks for more than it holds is heard.
    greedy = Path(result["page"]).read_text(encoding="utf-8")
    more = tmp_path / "more.html"
    more.write_text(greedy.replace("</body>", '<img src="http://localhost:1/x.png"></body>'))
    assert "CONSOLE" in browsed(more, tmp_path / "more.png")
