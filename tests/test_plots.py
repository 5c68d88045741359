"""Pictures of a run, from real metrics.jsonl files; what they look like was judged by eye."""

import json
import math
import struct

import numpy as np
import pytest

from trainer.errors import SamestepError
from trainer.plots import best_step_of, plot_confusion, plot_curves, read_metrics, series_of, short_name, smooth


def png_size(path) -> tuple[int, int]:
    """Width and height from the file's own header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def write_rows(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def metrics_jsonl(tmp_path):
    rows = []
    for step in range(1, 41):
        rows.append({"step": step, "train/loss": 1 / step, "train/accuracy": step / 40, "train/lr": 1e-3 * step})
        if step % 10 == 0:
            rows.append({"step": step, "eval/loss": 2 / step, "eval/accuracy": 0.5 + step / 100 * (step < 40)})
    rows.append({"step": 40, "test/accuracy": 0.8, "eval/accuracy": 0.99, "best_step": 20})
    write_rows(tmp_path / "metrics.jsonl", rows)
    return tmp_path / "metrics.jsonl"


def test_curves_are_a_picture_large_enough_to_read(metrics_jsonl):
    plot_curves(metrics_jsonl, metrics_jsonl.with_name("curves.png"))
    width, height = png_size(metrics_jsonl.with_name("curves.png"))
    assert width >= 1200
    assert height >= 800


@pytest.mark.parametrize("rows", [[], [{"step": 1, "train/loss": None}], [{"step": 1, "eval/accuracy": 0.5}]])
def test_curves_of_a_run_that_hardly_began_are_still_drawn(tmp_path, rows):
    write_rows(tmp_path / "metrics.jsonl", rows)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert png_size(tmp_path / "curves.png")


def test_best_step_is_the_one_the_final_report_names(metrics_jsonl):
    assert best_step_of(read_metrics(metrics_jsonl)) == 20


def test_best_step_of_an_unfinished_run_is_the_first_of_highest_accuracy():
    rows = [{"step": step, "eval/accuracy": value} for step, value in [(5, 0.6), (10, 0.8), (15, None), (20, 0.8)]]
    assert best_step_of(rows) == 10
    assert best_step_of([{"step": 1, "train/loss": 2.0}]) is None


def test_final_report_is_no_point_of_a_curve_and_null_is_a_gap():
    rows = [
        {"step": 1, "eval/loss": None},
        {"step": 2, "eval/loss": 0.5},
        {"step": 2, "eval/loss": 0.4, "best_step": 1},
    ]
    steps, values = series_of(rows, "eval/loss")
    assert steps.tolist() == [1, 2]
    assert math.isnan(values[0])
    assert values[1] == 0.5


def test_half_a_last_line_is_left_out_and_a_broken_middle_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "trai')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(SamestepError, match=r"line 2 .*delete the line"):
        read_metrics(path)


def test_smoothing_keeps_a_constant_and_does_not_spread_nan():
    values = np.array([1.0] * 10 + [math.nan] + [1.0] * 10)
    smoothed = smooth(values, 2.0)
    assert len(smoothed) == 21
    assert np.isnan(smoothed[10])
    assert np.allclose(np.delete(smoothed, 10), 1.0)


@pytest.mark.parametrize("num_classes", [2, 10, 32])
def test_confusion_is_drawn_for_few_and_many_classes_with_long_names(tmp_path, num_classes):
    matrix = np.eye(num_classes, dtype=int) * 50
    matrix[0] = 0  # a label without examples
    plot_confusion(matrix, [f"a rather long label name {number}" for number in range(num_classes)], tmp_path / "c.png")
    assert min(png_size(tmp_path / "c.png")) >= 500


def test_long_label_names_stay_distinct():
    names = [short_name(f"comp.sys.some.long.group.{end}") for end in ("ibm.hardware", "mac.hardware")]
    assert len(set(names)) == 2
    assert all(len(name) <= 22 for name in names)
    assert short_name("positive") == "positive"


def test_a_picture_that_cannot_be_written_is_a_message_and_leaves_nothing(tmp_path, metrics_jsonl):
    (tmp_path / "folder").write_text("")
    with pytest.raises(SamestepError, match="cannot be written"):
        plot_confusion([[1, 0], [0, 1]], ["a", "b"], tmp_path / "folder" / "confusion.png")
    assert not list(tmp_path.glob("**/*.unfinished"))
