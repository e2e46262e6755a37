"""What a run says: metrics.jsonl and TensorBoard, alike and without a step twice; notes; the live line."""

import json
import math
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.run_log import live_line, run_log
from train.runs import read_metrics


def scalars(run_path):
    """Tag -> [(step, value)], as TensorBoard shows them."""
    events = EventAccumulator(str(run_path / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def entry(step, **more):
    return {"step": step, "loss": 1 / step, "lr": 0.5, "seconds": 1.5, **more}


def test_both_logs_hold_the_same_numbers(tmp_path):
    with run_log(tmp_path, first_step=0) as log:
        log(entry(1, loss_ins=0.25))
        log({"step": 2, "num_components": 7, "seconds": 2.0})
        assert len(read_metrics(tmp_path)) == 2  # at once
    assert read_metrics(tmp_path) == [
        entry(1, loss_ins=0.25),
        {"step": 2, "num_components": 7, "seconds": 2.0},
    ]
    assert scalars(tmp_path) == {
        "loss": [(1, 1.0)],
        "loss_ins": [(1, 0.25)],
        "lr": [(1, 0.5)],
        "num_components": [(2, 7.0)],
    }


def test_steps_that_are_done_again_are_there_once(tmp_path):
    for first_step, last_step in ((0, 6), (4, 5), (4, 9)):  # killed after step 6, and again after step 5
        with run_log(tmp_path, first_step=first_step) as log:
            for step in range(first_step + 1, last_step + 1):
                log(entry(step))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))
    assert [step for step, _ in scalars(tmp_path)["loss"]] == list(range(1, 10))


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    with run_log(tmp_path, first_step=0) as log:
        log(entry(1, grad_norm=math.inf))
    assert read_metrics(tmp_path) == [entry(1)]
    assert "grad_norm" not in scalars(tmp_path)


def test_another_rank_writes_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry(9)) + "\n")
    with run_log(tmp_path, first_step=0, writes=False) as log:
        log(entry(1))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path) == [entry(9)]


def test_without_tensorboard_there_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with run_log(tmp_path, first_step=0) as log:
        log(entry(1))
        log(entry(2))
    assert read_metrics(tmp_path) == [entry(1), entry(2)]
    assert capsys.readouterr().err == "note: no TensorBoard log: pip install tensorboard\n"
    assert not (tmp_path / "tensorboard").exists()


def test_both_are_closed_when_training_fails(tmp_path):
    with pytest.raises(KeyError), run_log(tmp_path, first_step=0) as log:
        log(entry(1))
        raise KeyError
    assert scalars(tmp_path)["loss"] == [(1, 1.0)]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.9, 0.01, 0.02], []),  # the first steps of a process wait for the first batches
        ([0.0, None, 0.05], []),
        ([None, 0.5, 0.05], []),
        ([0.0, 0.2, 0.6], ["20%"]),
        ([0.9, None, 0.6], ["60%"]),
    ],
)
def test_much_waiting_for_data_is_said_once(tmp_path, capsys, shares, said):
    with run_log(tmp_path, first_step=0) as log:
        for step, share in enumerate(shares, 1):
            log(entry(step) if share is None else entry(step, data_wait_share=share))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == said
    assert all(line.startswith("note: ") and "Keep the cache on" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "last_entry", "line"),
    [
        ({"loss": 3.456, "grad_norm": 9.0}, {}, "loss 3.46"),
        ({"loss": 3.0, "loss_ce": 1.234, "loss_dice": 0.5, "grad_norm": 9.0}, {}, "ce 1.23 dice 0.50"),
        (
            {"loss": 3.0, "loss_ins": 1.0, "loss_intra": 12.0, "loss_inter": 0.125},
            {"samples_per_s": 312.3, "data_wait_share": 0.013, "memory_bytes": 12.1e9},
            "ins 1.00 intra 12.00 inter 0.12 312/s wait 1% 12.1GB",
        ),
    ],
)
def test_the_live_line_is_short(values, last_entry, line):
    assert live_line(values, last_entry) == line
    assert len(line) <= 55  # what 100 columns leave


def test_embeddings_that_stay_collapsed_are_said_once(tmp_path, capsys):
    with run_log(tmp_path, first_step=0) as log:
        for step, similarity in enumerate([*[1.0] * 9, 0.99, *[1.0] * 15], 1):
            log(entry(step, similarity=similarity))
    assert capsys.readouterr().err.count("the embeddings have collapsed by step 20") == 1
