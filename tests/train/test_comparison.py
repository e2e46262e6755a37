"""The comparison of fabricated runs: numbers by hand, notes, errors, and the table at 80 columns."""

from __future__ import annotations

import io

import pytest
from made_runs import write_run
from rich.console import Console

from supercl_core.errors import SuperCLError
from train.bootstrap import Difference
from train.comparison import compare, difference_text, number, read_runs, render_table


def difference(mean, interval):
    return Difference(mean=mean, interval=interval, num_cases=3, num_seeds=1)


def printed(comparison, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(render_table(comparison))
    return console.file.getvalue()


@pytest.fixture
def scratch(tmp_path):
    return write_run(tmp_path / "scratch", {"a": (0.5, 0.7), "b": (0.6, 0.8), "c": (0.7, 0.0)})


@pytest.fixture
def pretrained(tmp_path):
    return write_run(tmp_path / "simclr", {"a": (0.6, 0.8), "b": (0.8, 0.8), "c": (0.8, 0.6)})


def test_rows_hold_percentages_and_differences(scratch, pretrained):
    comparison = compare([scratch, pretrained])
    assert [(row.run, row.class_name) for row in comparison.rows] == [
        (run, name) for run in ("scratch", "simclr") for name in ("anterior", "posterior", "mean")
    ]
    anterior, posterior, mean = comparison.rows[:3]
    assert anterior.dsc == pytest.approx(60)
    assert posterior.dsc == pytest.approx(50)
    assert mean.dsc == pytest.approx(55)
    assert (posterior.num_missing, posterior.num_cases, posterior.hd95) == (1, 3, 3.5)
    assert anterior.difference is None
    differences = [row.difference for row in comparison.rows[3:]]
    assert [d.mean for d in differences] == pytest.approx([40 / 3, 70 / 3, 55 / 3])
    assert [d.num_cases for d in differences] == [3, 3, 3]
    assert comparison.unit == "mm"
    assert comparison.notes == ()


def test_the_same_runs_give_the_same_interval(scratch, pretrained):
    assert compare([scratch, pretrained]) == compare([scratch, pretrained])


def test_a_structure_absent_in_both_is_not_paired(tmp_path):
    first = write_run(tmp_path / "first", {"a": (0.5, None), "b": (0.5, 0.5)})
    second = write_run(tmp_path / "second", {"a": (0.6, None), "b": (0.6, 0.7)})
    anterior, posterior, mean = (row.difference for row in compare([first, second]).rows[3:])
    assert (anterior.num_cases, posterior.num_cases, mean.num_cases) == (2, 1, 2)
    assert mean.mean == pytest.approx((10 + 20) / 2)


def test_the_difference_of_means_is_the_mean_difference(tmp_path):
    first = write_run(tmp_path / "first", {"a": (0.5, None), "b": (0.7, 0.5), "c": (0.1, 0.3)})
    second = write_run(tmp_path / "second", {"a": (0.6, None), "b": (0.6, 0.7), "c": (0.5, 0.2)})
    *_, before, _, _, after = compare([first, second]).rows
    assert after.difference.mean == pytest.approx(after.dsc - before.dsc)


def test_nothing_is_printed_as_minus_zero():
    assert difference_text(difference(-0.04, (-0.01, 0.02))) == "+0.0 [+0.0, +0.0]"
    assert difference_text(difference(-0.06, None)) == "-0.1"
    assert difference_text(None) == ""
    assert number(-0.001) == "0.00"


def test_notes_say_what_is_not_comparable(tmp_path, scratch):
    other = write_run(tmp_path / "other", {"a": (0.6, 0.8), "d": (0.8, 0.8)}, labelled=4, steps=500)
    notes = " ".join(compare([scratch, other]).notes)
    assert "different test cases (scratch 3 cases, other 2 cases; 1 in all)" in notes
    assert "different labelled counts: scratch 2, other 4" in notes
    assert "different budgets: scratch 300 steps, other 500 steps" in notes


def test_the_table_fits_80_columns(scratch, pretrained):
    text = printed(compare([scratch, pretrained]))
    assert max(map(len, text.splitlines())) <= 80
    for content in ("simclr", "anterior", "73.33", "+13.3 [+6.0, +28.0]", "1/3", "in mm", "n = 3 cases"):
        assert content in text
    assert "…" not in text


def test_long_and_nasty_names_leave_the_numbers_readable(tmp_path):
    classes = ["background", "a_structure_with_a_very_long_name"]
    dsc = {"a": (0.5,), "b": (0.75,)}
    paths = [
        # Another labelled count, so that there is a note, which names the runs.
        write_run(tmp_path / f"[red]pretrained_with_all_options_{n}", dsc, classes=classes, labelled=n)
        for n in (1, 2)
    ]
    text = printed(compare(paths))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("[red]") == 4
    for content in ("62.50", "3.50", "0/2", "+0.0"):
        assert content in text


def test_one_run_makes_a_table_without_differences(scratch):
    text = printed(compare([scratch]))
    assert "60.00" in text
    assert "difference" not in text


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path):
    paths = [write_run(tmp_path / seed / "scratch", {"a": (0.5, 0.5)}) for seed in ("seed_0", "seed_1")]
    assert [run.name for run in read_runs(paths)] == ["seed_0/scratch", "seed_1/scratch"]


def test_what_is_no_evaluated_run_is_refused(tmp_path, scratch):
    with pytest.raises(SuperCLError, match="no run here"):
        compare([tmp_path / "nowhere"])
    pretraining = write_run(tmp_path / "pretraining", {"a": (0.5, 0.5)}, kind="pretrain")
    with pytest.raises(SuperCLError, match="Only fine-tuned runs have scores"):
        compare([scratch, pretraining])
    voxels = write_run(tmp_path / "voxels", {"a": (0.5, 0.5)}, unit="voxel")
    with pytest.raises(SuperCLError, match=r"not evaluated in the same way(.|\n)*unit"):
        compare([scratch, voxels])
    (scratch / "evaluation.json").unlink()
    with pytest.raises(SuperCLError, match=r"not evaluated yet(.|\n)*supercl evaluate .*scratch CACHE"):
        compare([scratch])


def test_damaged_files_are_named_and_a_line_being_written_is_not_read(scratch):
    with (scratch / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "lo')
    assert [run.num_steps for run in read_runs([scratch])] == [300]
    (scratch / "evaluation.json").write_text("{")
    with pytest.raises(SuperCLError, match=r"damaged(.|\n)*evaluation\.json"):
        read_runs([scratch])
