"""The training commands: the road from a cache to scores, settings in the help, messages and exit codes."""

import dataclasses
import json
import re
import shlex

import numpy as np
import pytest
from made_caches import write_noise

from supercl_core.cache import writer as cache_writer
from supercl_core.cache.reader import open_cache
from supercl_core.locks import hold
from train.methods import PretrainConfig
from train.recipes import FinetuneConfig
from train.runs import read_run

TINY = ["steps=2", "batch_size=4", "patch_size=[32, 32]", "filters=4", "device=cpu"]
SETTINGS = [part for assignment in TINY for part in ("--set", assignment)]


@pytest.fixture
def split(tmp_path):
    """A split file with lists for 1 and 2 labelled cases."""
    path = tmp_path / "split.json"
    lists = {"labelled": {"1": ["case_a"], "2": ["case_a", "case_b"]}, "test": ["case_c"]}
    path.write_text(json.dumps(lists))
    return path


@pytest.fixture
def finetune(supercl, cache_path, tmp_path, split):
    """`supercl finetune` with what it requires; further arguments come behind."""

    def call(*more, cache=cache_path, split=split, init="scratch", labelled=2):
        required = ("--init", init, "--split", split, "--labelled", labelled)
        return supercl("finetune", cache, tmp_path / "run", *required, *SETTINGS, *more)

    return call


def refused(outcome, code, *texts):
    """The command ended with `code` and one message that holds all texts; nothing went to stdout."""
    assert (outcome.code, outcome.out) == (code, ""), outcome
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    for text in (*texts, "next:"):
        assert text in outcome.err, outcome.err
    return True


# ---------------------------------------------------------------- the road


def test_from_cache_to_scores(supercl, cache_path, tmp_path, split):
    pre, run = tmp_path / "pre", tmp_path / "run"
    pretrained = supercl(
        "pretrain", cache_path, pre, "--split", split, *SETTINGS, "--set", "augment.p_blur=0.1"
    )
    assert (pretrained.code, pretrained.out) == (0, f"{pre}/weights.safetensors: encoder after 2 steps\n")
    assert "train: 2/2 steps" in pretrained.err
    described = read_run(pre)
    assert described["cases"]["train"] == ["case_a", "case_b", "case_d"]
    assert described["config"]["augment"]["p_blur"] == 0.1

    arguments = ("finetune", cache_path, run, "--init", pre, "--split", split, "--labelled", 2, *SETTINGS)
    tuned = supercl(*arguments)
    assert (tuned.code, tuned.out) == (
        0,
        f"{run}/weights.safetensors: network after 2 steps on 2 labelled cases\n",
    )
    assert supercl(*arguments).out == tuned.out  # finished: says so again
    assert read_run(run)["unlabelled_test_cases_seen"] == 0

    scored = supercl("evaluate", run, cache_path, "--device", "cpu")
    assert scored.code == 0
    assert "DSC" in scored.out
    assert {row["case"] for row in json.loads((run / "evaluation.json").read_text())["rows"]} == {"case_c"}


def test_from_encoder_to_weak_labels(supercl, cache_copy, tmp_path):
    run = tmp_path / "my run"
    assert supercl("pretrain", cache_copy, run, *SETTINGS).code == 0
    described = supercl("describe", cache_copy, "--encoder", run, "--batch-size", 8)
    command = f"supercl weak-labels {cache_copy} --descriptors 'my run'"
    assert (described.code, described.out) == (0, f"{cache_copy}: descriptors 'my run' of 23 slices\n")
    assert "describe: 23/23 slices" in described.err
    assert described.err.endswith(f"\nnext: {command}\n")
    assert supercl(*shlex.split(command)[1:]).code == 0
    assert supercl("describe", cache_copy, "--encoder", run, "--name", "other").code == 0
    cache = open_cache(cache_copy)
    assert cache.set_names("descriptors") == ["my run", "other"]
    np.testing.assert_array_equal(cache.descriptors("my run"), cache.descriptors("other"))
    assert cache.weak_labels("my run").descriptors == "my run"


def test_test_cases_under_other_names_are_mentioned(supercl, tmp_path):
    cache = write_noise(tmp_path / "twins.zarr", {"a": 1, "b": 2, "c": 3, "d": 4, "twin_of_b": 2})
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"labelled": {"1": ["a"]}, "test": ["b", "c"]}))
    pre, run = tmp_path / "pre", tmp_path / "run"
    pretrained = supercl("pretrain", cache, pre, "--split", split, *SETTINGS)
    assert pretrained.code == 0, pretrained.err
    assert (
        "note: also left out, as cases of a test patient or of identical content: twin_of_b\n"
        in pretrained.err
    )
    assert read_run(pre)["cases"]["train"] == ["a", "d"]

    assert "note" not in supercl("pretrain", cache, tmp_path / "all", *SETTINGS).err
    tune = ("--split", split, "--labelled", 1, *SETTINGS)
    unseen = supercl("finetune", cache, run, "--init", pre, *tune)
    assert (unseen.code, "test cases were" in unseen.err) == (0, False), unseen.err
    assert f"note: weights: {pre}\n  tensors loaded: " in unseen.err
    seen = supercl("finetune", cache, tmp_path / "other", "--init", tmp_path / "all", *tune)
    assert "note: 2 of 2 test cases were among the pre-training images (without labels)\n" in seen.err

    (tmp_path / "leak.json").write_text(json.dumps({"labelled": {"1": ["b"]}, "test": ["twin_of_b"]}))
    leak = ("--split", tmp_path / "leak.json", "--labelled", 1, *SETTINGS)
    outcome = supercl("finetune", cache, tmp_path / "none", "--init", "scratch", *leak)
    assert refused(outcome, 2, "identical content", "b = twin_of_b", "supercl split")


def test_settings_apply_in_the_order_preset_file_assignment(supercl, cache_path, tmp_path):
    (tmp_path / "mine.toml").write_text("lr = 0.03\nseed = 4\n[augment]\np_blur = 0.2\n")
    outcome = supercl(
        *("pretrain", cache_path, tmp_path / "run", "--set", "seed=5", "--config", tmp_path / "mine.toml"),
        *("--preset", "published", *SETTINGS, "--set", "epochs=none"),
    )
    assert outcome.code == 0, outcome.err
    config = read_run(tmp_path / "run")["config"]
    assert (config["optimiser"], config["lr"], config["seed"]) == ("sgd", 0.03, 5)
    assert config["augment"]["p_blur"] == 0.2


def test_labelled_counts_below_the_lists_take_their_first_keys(finetune, tmp_path):
    assert finetune(labelled=1).out.endswith("on 1 labelled cases\n")
    assert read_run(tmp_path / "run")["cases"]["train"] == ["case_a"]


def test_a_run_of_other_settings_is_named_with_exit_code_2(finetune):
    assert finetune().code == 0
    outcome = finetune("--set", "lr=0.5")
    assert refused(outcome, 2, "other settings", "config.lr: 0.001 there, 0.5 here", "Name another folder")


def test_missing_cases_are_mentioned(supercl, cache_copy, tmp_path):
    rows = open_cache(cache_copy).rows
    failed = dataclasses.replace(rows[3], state="failed", reason="NaN", shape=(0, 0, 0, 0), statistics=())
    cache_writer.write_tables(cache_copy, [*rows[:3], failed], num_channels=1)
    outcome = supercl("pretrain", cache_copy, tmp_path / "run", *SETTINGS, "--set", "igcp=online")
    assert outcome.code == 0, outcome.err
    assert "note: 1 cases failed in preprocessing" in outcome.err
    assert read_run(tmp_path / "run")["cases"]["train"] == ["case_a", "case_b", "case_c"]


# ---------------------------------------------------------------- help


def field_names(kind, prefix=""):
    for field in dataclasses.fields(kind):
        default = getattr(kind(), field.name)
        if dataclasses.is_dataclass(default):
            yield from field_names(type(default), f"{field.name}.")
        else:
            yield prefix + field.name


def settings_in_help(text):
    """By name in order: what the help says, its first sentence being the default."""
    listed = text.partition("meanings:\n")[2]
    rows = re.split(r"^  (?=\S)", listed, flags=re.MULTILINE)[1:]
    return {row.split()[0]: " ".join(row.split()[1:]) for row in rows}


@pytest.mark.parametrize(("command", "kind"), [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_help_lists_every_setting_with_default_and_meaning(supercl, command, kind):
    outcome = supercl(command, "--help")
    assert outcome.code == 0
    rows = settings_in_help(outcome.out)
    assert list(rows) == list(field_names(kind))
    assert rows["batch_size"].startswith(f"{kind().batch_size}. Slices a step")
    assert rows["augment.crop"].startswith(f"{list(kind().augment.crop)}. Sides of the random crop")
    assert rows["patch_size"].startswith("none. ")
    assert [name for name, row in rows.items() if len(row.partition(". ")[2]) < 10] == []


def test_the_defaults_in_the_help_can_be_set(supercl, cache_path, tmp_path):
    rows = settings_in_help(supercl("pretrain", "--help").out)
    defaults = [part for name, row in rows.items() for part in ("--set", f"{name}={row.partition('. ')[0]}")]
    outcome = supercl("pretrain", cache_path, tmp_path / "run", *defaults, *SETTINGS)
    assert outcome.code == 0, outcome.err


# ---------------------------------------------------------------- messages and exit codes


def test_unknown_preset(finetune, tmp_path):
    assert refused(finetune("--preset", "fast"), 2, "no preset 'fast'", "demo, published")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("assignment", "texts"),
    [
        ("batchsize=4", ("no setting 'batchsize'", "Did you mean 'batch_size'?")),
        ("augment.p_blurr=0.1", ("no setting 'augment.p_blurr'", "Did you mean 'augment.p_blur'?")),
        ("steps=many", ("'steps'", "wrong type", "int", "'many'")),
        ("steps=1.5", ("'steps'", "wrong type", "1.5")),
        ("optimiser=rmsprop", ("'optimiser'", "'sgd' or 'adam' or 'adamw'", "'rmsprop'")),
        ("patch_size=[32]", ("'patch_size'", "wrong type")),
        ("patch_size=[30, 32]", ("patch size", "multiples of 16", "30 x 32")),
        ("steps", ("key=value",)),
        ("steps=0", ("'steps'", "at least 1")),
        ("augment.p_blur=2", ("augmentation", "between 0 and 1")),
        ("device=tpu-v9", ("'tpu-v9'", "cannot be used", "supercl doctor")),
    ],
)
def test_wrong_settings(finetune, tmp_path, assignment, texts):
    assert refused(finetune("--set", assignment), 2, *texts)
    assert not (tmp_path / "run").exists()


def test_settings_file_that_is_missing_or_no_toml(finetune, tmp_path):
    assert refused(finetune("--config", tmp_path / "none.toml"), 2, "none.toml", "cannot be read")
    (tmp_path / "bad.toml").write_text("steps = = 4")
    assert refused(finetune("--config", tmp_path / "bad.toml"), 2, "bad.toml", "not valid TOML")


def test_missing_cache(supercl, finetune, tmp_path):
    assert refused(finetune(cache=tmp_path / "no.zarr"), 4, "There is no cache here.", "no.zarr", "nothing")
    outcome = supercl("pretrain", tmp_path, tmp_path / "run")
    assert refused(outcome, 4, "There is no cache here.", "another folder")


def test_incomplete_cache(supercl, finetune, cache_copy, tmp_path):
    cache_writer.set_root_attributes(cache_copy, {"complete": False})
    assert refused(finetune(cache=cache_copy), 4, "not complete", "supercl preprocess")
    assert refused(supercl("pretrain", cache_copy, tmp_path / "run"), 4, "not complete")
    assert not (tmp_path / "run").exists()


def test_split_without_the_section_or_the_count(finetune, split):
    named = {"Heart": json.loads(split.read_text()), "Spleen": json.loads(split.read_text())}
    split.write_text(json.dumps(named))
    assert refused(finetune(split=f"{split}:Liver"), 2, "no section for 'Liver'", "Heart, Spleen")
    assert refused(finetune(split=split), 2, "no section for 'Task99_Tiny'", "--split")
    assert refused(finetune(split=f"{split}:Heart", labelled=3), 2, "no 3 labelled cases", "1 to 2")
    assert finetune(split=f"{split}:Spleen").code == 0


@pytest.mark.parametrize(
    ("lists", "code", "texts"),
    [
        ({"labelled": {"2": ["case_a", "case_b"]}, "test": ["case_b"]}, 2, ("both", "case_b")),
        ({"labelled": {"2": ["case_a", "case_x"]}, "test": ["case_c"]}, 2, ("case_x", "does not have")),
        ({"labelled": {"2": ["case_a", "case_d"]}, "test": ["case_c"]}, 2, ("ground truth", "case_d")),
        ({"labelled": {"2": []}, "test": ["case_c"]}, 2, ("no slices",)),
        ({"labelled": ["case_a"], "test": ["case_c"]}, 2, ("lists of keys",)),
    ],
)
def test_splits_that_leak_or_do_not_fit_the_cache(finetune, split, tmp_path, lists, code, texts):
    split.write_text(json.dumps(lists))
    assert refused(finetune(), code, *texts)
    assert not (tmp_path / "run").exists()


def test_pretraining_leaves_no_folder_when_the_split_is_missing(supercl, cache_path, tmp_path):
    outcome = supercl("pretrain", cache_path, tmp_path / "run", "--split", tmp_path / "no.json", *SETTINGS)
    assert refused(outcome, 2, "split cannot be read", "no.json")
    assert not (tmp_path / "run").exists()


def test_missing_encoder(finetune, tmp_path):
    assert refused(finetune(init=tmp_path / "typo"), 1, "no weights here", "typo")
    assert not (tmp_path / "run").exists()


def test_descriptors_that_cannot_be(supercl, cache_copy, tmp_path):
    def describe(*arguments, cache=cache_copy):
        return supercl("describe", cache, *arguments)

    run = tmp_path / "run"
    assert refused(describe("--encoder", run), 1, "no weights here", str(run))
    assert supercl("pretrain", cache_copy, run, *SETTINGS).code == 0
    assert refused(describe("--encoder", run, cache=tmp_path / "no.zarr"), 4, "There is no cache here.")
    assert refused(describe("--encoder", run, "--name", "a/b"), 2, "'a/b' holds a slash", "--name")
    assert refused(describe("--encoder", run, "--name", "intensity"), 2, "'intensity' is that of", "--name")
    assert refused(describe("--encoder", run, "--device", "gpu7"), 2, "'gpu7'", "cannot be used")
    with hold(cache_copy):
        assert refused(describe("--encoder", run), 4, "It is in use")
    assert describe("--encoder", run, "--batch-size", 0).code == 2
    assert open_cache(cache_copy).set_names("descriptors") == []


def test_evaluation_of_no_run_or_on_no_device(supercl, finetune, cache_path, tmp_path):
    assert refused(supercl("evaluate", tmp_path / "none", cache_path), 1, "no run here")
    assert finetune().code == 0
    outcome = supercl("evaluate", tmp_path / "run", cache_path, "--device", "gpu7")
    assert refused(outcome, 2, "'gpu7'", "cannot be used")
    assert not (tmp_path / "run" / "predictions").exists()


def test_required_options_are_named(supercl, cache_path, tmp_path):
    outcome = supercl("finetune", cache_path, tmp_path / "run")
    assert outcome.code == 2
    assert "Missing option '--init'" in outcome.err
