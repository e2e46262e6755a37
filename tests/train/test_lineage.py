"""What weights have learned from: known of runs and of what is exported from them, wherever the file goes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from supercl_core.cache.reader import open_cache
from supercl_core.errors import SuperCLError, UsageError
from supercl_core.splits import Split
from train.finetuning import finetune
from train.lineage import KEY, read_lineage
from train.models.weights import save_tensors
from train.recipes import FinetuneConfig
from train.runs import read_run


def test_a_run_and_its_weights_file_say_what_the_run_learned_from(tuned_path):
    run = read_run(tuned_path)
    assert [*run["content_digests"]] == ["case_b"]
    own = {"kind": "finetune", "data_set": run["cache"]["name"], "content_digests": run["content_digests"]}
    assert read_lineage(tuned_path) == read_lineage(tuned_path / "weights.safetensors") == [own]


def test_weights_that_say_nothing_are_of_no_known_origin(tmp_path):
    torch.save({"net": {"a": torch.ones(1)}}, tmp_path / "model.pth")
    save_tensors({"a": torch.ones(1)}, tmp_path / "plain.safetensors", {})
    assert read_lineage(tmp_path / "model.pth") == read_lineage(str(tmp_path / "plain.safetensors")) == []


@pytest.mark.parametrize("text", ["", "{", "{}", "[{}]", '[{"kind": "x", "data_set": "y"}]', "[1e999]"])
def test_an_origin_that_cannot_be_read_is_not_taken_for_none(tmp_path, text):
    save_tensors({"a": torch.ones(1)}, tmp_path / "x.safetensors", {KEY: text})
    with pytest.raises(SuperCLError, match="learned from cannot be read") as caught:
        read_lineage(tmp_path / "x.safetensors")
    assert caught.value.where == tmp_path / "x.safetensors"


@pytest.mark.parametrize("target", ["safetensors", "smp"])
def test_an_export_that_knows_labels_of_test_cases_is_no_start(
    target, supercl, tuned_path, cache_path, tmp_path
):
    """Also the export of an export, and its file without the card."""
    flags = ["--encoder"] if target == "safetensors" else []
    first = supercl("export", tuned_path, tmp_path / "one", "--to", target, *flags)
    assert first.code == 0, first.err
    weights_path = tmp_path / "moved.safetensors"
    shutil.copy(tmp_path / "one" / "weights.safetensors", weights_path)
    sources = [tmp_path / "one", weights_path]
    if target == "safetensors":
        again = supercl("export", weights_path, tmp_path / "two", "--to", target)
        assert again.code == 0, again.err
        sources.append(tmp_path / "two")
        card = json.loads((tmp_path / "two" / "card.json").read_text())
        assert (card["learned_from"], card["training"]) == (read_lineage(tuned_path), None)

    split = Split(file="s", labelled=("case_a",), test=("case_b",), num_labelled_keys=1)
    config = FinetuneConfig(steps=1, batch_size=2, patch_size=(32, 32), filters=4, device="cpu")
    for source in sources:
        with pytest.raises(UsageError, match="fine-tuned on test or validation cases") as refused:
            finetune(open_cache(cache_path), tmp_path / "run", split=split, init=str(source), config=config)
        assert refused.value.found == "case_b"
        assert not (tmp_path / "run").exists()
