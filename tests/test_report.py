"""Rows written and read again; the table says what the rows say."""

from pathlib import Path

import pandas as pd
import pytest

from semkit.analysis.report import as_objects, read_rows, table, write_report, write_rows
from semkit.analysis.statistics import interval

ROWS = [
    {
        "method": m, "training_radius": r, "seed": s, "last": v, "curve": [[10, 0.5], [20, v]], "noise_seconds": t,
        "cosine": None,
    }
    for m, t in (("clean", 0.0), ("none/random", 12.3))
    for r, values in ((0, (0.9, 0.8, 0.85)), (4, (0.5, 0.7, 0.6)))
    for s, v in enumerate(values)
]  # fmt: skip


RESULTS = Path(__file__).parents[1] / "results"
WRITTEN = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.csv") if path.parent != RESULTS)
BY_HAND = {"cuda/theory.csv", "latent/rows.csv", "streaming/rows.csv"}  # whole numbers among others, as 1 and not 1.0


def test_rows_survive_the_file(tmp_path):
    write_rows(ROWS, tmp_path / "rows.csv")
    assert as_objects(read_rows(tmp_path / "rows.csv")) == ROWS


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in BY_HAND])
def test_committed_rows_read_and_written_again_are_the_same_file(tmp_path, name):
    write_rows(read_rows(RESULTS / name), tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_bytes() == (RESULTS / name).read_bytes()


def test_texts_that_pandas_takes_for_missing_are_kept(tmp_path):
    rows = pd.DataFrame({"method": ["NA", "None", "none"], "last": [0.1, 0.2, None], "seed": [0, 1, 2]})
    write_rows(rows, tmp_path / "rows.csv")
    pd.testing.assert_frame_equal(read_rows(tmp_path / "rows.csv"), rows)


def test_missing_rows_are_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^no rows at .*gone.csv; they are in the folder results"):
        read_rows(tmp_path / "gone.csv")


def test_the_table_has_mean_and_half_interval_of_every_cell():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(ROWS).splitlines()]
    assert lines[0] == ["trained on", "ERM", "AT 4/255", "noise made in"]
    mean, _, high = interval([0.5, 0.7, 0.6])
    assert lines[2] == ["clean images", "85.0 ± 12.4", f"{100 * mean:.1f} ± {100 * (high - mean):.1f}", "-"]
    assert lines[3][0] == "none/random" and lines[3][3] == "12 s"


def test_the_table_has_no_seconds_where_the_rows_have_none():
    untimed = [{name: value for name, value in row.items() if name != "noise_seconds"} for row in ROWS]
    cut = [line.rsplit("|", 2)[0] + "|" for line in table(ROWS).splitlines()]
    assert table(untimed).splitlines() == cut


def test_named_learners_have_a_column_each_and_what_a_row_lacks_is_empty(tmp_path):
    rows = [
        {"method": m, "training_radius": 0, "learner": way, "last": 0.5}
        for m, way in (("cuda", "blur"), ("em", "jpeg"))
    ]
    rows += [{"method": "cuda", "training_radius": 4, "learner": None, "last": 0.25, "on_own": 1.0}]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()]
    assert lines[0] == ["trained on", "blur", "jpeg", "AT 4/255"]
    assert lines[2:] == [["CUDA", "50.0", "-", "25.0"], ["EM", "-", "50.0", "-"]]
    write_rows(rows, tmp_path / "rows.csv")
    assert [row["on_own"] for row in as_objects(read_rows(tmp_path / "rows.csv"))] == [None, None, 1.0]


def test_a_figure_of_fewer_methods_does_not_stay_beside_new_rows(tmp_path):
    (tmp_path / "figure.png").write_bytes(b"of the sweep before")
    write_report(tmp_path, "table", None)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
