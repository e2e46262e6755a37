"""The declaration of a study: what it resolves to, equal budgets, and what is refused."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from supercl_core.errors import UsageError
from train.study.declaration import BUDGET, CellKey, Study, read_study

STUDY = """
cache = "data/heart.zarr"
split = "splits.json:Heart"
labelled = [3, "all"]
seeds = [0, 4]
[pretrain]
steps = 40
filters = 16
lr = 3e-3
[recipes.strong]
steps = 20
labelled.3 = {steps = 10}
[recipes.published]
preset = "published"
[arms.scratch]
init = "scratch"
[arms.simclr]
preset = "simclr"
[arms.published]
preset = "published"
temperature = 0.2
[arms.foreign]
init = "weights.pth"
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "weights.pth").touch()
    path = tmp_path / "heart.toml"
    path.write_text(STUDY)
    return path


def refused(file, *assignments):
    with pytest.raises(UsageError) as caught:
        read_study(file, assignments=assignments)
    assert str(file) in str(caught.value.where)
    return caught.value


def test_paths_are_relative_to_the_file(file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    study = read_study(file)
    assert study.name == "heart"
    assert study.cache == tmp_path / "data/heart.zarr"
    assert study.split == str(tmp_path / "splits.json:Heart")
    assert study.arms["foreign"].init == str(tmp_path / "weights.pth")
    assert read_study(file, assignments=["cache=mine.zarr"]).cache == elsewhere / "mine.zarr"


def test_a_study_comes_back_from_its_plain_values(file):
    for settings in [], ["scored_on=validation", "recipes.strong.augment.p_blur=0.5"]:
        study = read_study(file, assignments=settings)
        assert Study.from_dict(json.loads(json.dumps(study.as_dict()))) == study


def test_cells_are_all_combinations_seed_by_seed(file, tmp_path):
    cells = read_study(file).cells()
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * 4
    assert [cell.seed for cell in cells] == [0] * 16 + [4] * 16
    first = CellKey(recipe="strong", arm="scratch", labelled=3, seed=0)
    assert cells[0] == first
    assert first.title() == "strong, scratch, 3 labelled, seed 0"
    assert first.path(tmp_path) == tmp_path / "finetune/strong/scratch/labelled_3/seed_0"
    assert len({cell.path(tmp_path) for cell in cells}) == len(cells)


def test_every_arm_has_the_budget_of_pretrain(file):
    study = read_study(file)
    pretrained = [arm.pretrain for arm in study.arms.values() if arm.pretrain]
    assert len(pretrained) == 2
    for config, name in itertools.product(pretrained, BUDGET):
        assert getattr(config, name) == getattr(study.pretrain, name)
    simclr, published = pretrained
    assert (simclr.steps, simclr.filters, simclr.epochs) == (40, 16, None)
    assert (simclr.instance_rule, simclr.lr, simclr.temperature) == ("view", 3e-3, 0.1)
    # What a method sets itself counts more than what is shared.
    assert (published.optimiser, published.lr, published.temperature) == ("sgd", 0.1, 0.2)


def test_recipes_take_the_network_of_pretrain_and_settings_of_a_count(file):
    study = read_study(file)
    strong, published = study.recipes["strong"], study.recipes["published"]
    assert {count: config.steps for count, config in strong.items()} == {3: 10, "all": 20}
    assert {config.filters for config in (*strong.values(), *published.values())} == {16}
    assert published[3].epochs == 100
    fixed = read_study(file, assignments=["recipes.published.steps=7"]).recipes["published"][3]
    assert (fixed.epochs, fixed.steps, fixed.loss) == (None, 7, "ce")
    own = read_study(file, assignments=["recipes.published.augment.p_blur=0.5"]).recipes["published"][3]
    assert (own.augment.p_blur, own.augment.p_contrast) == (0.5, published[3].augment.p_contrast)


def test_scores_on_validation_hold_out_a_fold_of_each_seed(file):
    study = read_study(file, assignments=["scored_on=validation"])
    cells = {cell.seed: cell for cell in study.cells()}
    configs = {seed: study.finetune_config(cell, device="cpu") for seed, cell in cells.items()}
    assert study.folds == 3
    assert {
        seed: (config.seed, config.validation_folds, config.validation_fold)
        for seed, config in configs.items()
    } == {
        0: (0, 3, 0),
        4: (4, 3, 1),
    }
    plain = read_study(file)
    config = plain.finetune_config(plain.cells()[-1], device="cpu")
    assert (plain.folds, config.validation_folds, config.seed, config.device) == (None, 0, 4, "cpu")


@pytest.mark.parametrize("name", BUDGET)
def test_an_arm_may_not_touch_the_budget(file, name):
    error = refused(file, f"arms.simclr.{name}=1")
    assert "[arms.simclr]" in str(error.where)
    assert error.found == name


@pytest.mark.parametrize(
    ("assignment", "table", "words"),
    [
        ("recipe.strong.lr=1", "", "Did you mean 'recipes'"),
        ("recipes.strong.lrr=1", "[recipes.strong]", "Did you mean 'lr'"),
        ("arms.simclr.temprature=1", "[arms.simclr]", "Did you mean 'temperature'"),
        ("arms.simclr.temperature=-1", "[arms.simclr]", "above 0"),
        ("arms.simclr.preset=simclear", "[arms.simclr]", "no preset 'simclear'"),
        ("arms.simclr.preset=3", "[arms.simclr]", "no preset 3"),
        ("recipes.strong.preset=strnog", "[recipes.strong]", "published, strong"),
        ("arms.simclr.init=scratch", "[arms.simclr]", "either starts from what is there or is pre-trained"),
        ("arms.foreign.init=nowhere.pth", "[arms.foreign]", "no such weights"),
        ("arms.foreign.init=3", "[arms.foreign]", "either starts"),
        ("arms.foreign=3", "[arms.foreign]", "none of its tables"),
        ("arms.a b.preset=pcl", "[arms.a b]", "a folder can have"),
        ("pretrain.seed=1", "[pretrain]", "the seeds of the study"),
        ("pretrain.epochs=1", "[pretrain]", "the same for all arms"),
        ("recipes.strong.device=cpu", "[recipes.strong]", "--device"),
        ("recipes.strong.labelled.5.steps=1", "[recipes.strong]", "3, all"),
        ("recipes.strong.labelled=5", "[recipes.strong]", "3, all"),
        ("labelled=[]", "", "without labelled"),
        ("labelled=[0]", "", "counts"),
        ("labelled=[3, 3]", "", "counts"),
        ("labelled=[true]", "", "counts"),
        ("labelled=3", "", "wrong type"),
        ('labelled=["some"]', "", "counts"),
        ("seeds=[1, 1]", "", "seeds"),
        ("seeds=[-1]", "", "seeds"),
        ("baseline=scrtch", "", "scratch, simclr, published, foreign"),
        ("scored_on=train", "", "'test' or 'validation'"),
        ("folds=4", "", "scored_on = 'validation'"),
        ("arms=none", "", "wrong type"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(file, assignment, table, words):
    error = refused(file, assignment)
    assert table in str(error.where)
    assert words in error.message()


def test_folds_are_the_study_s_where_it_scores_on_validation(file):
    assert (
        read_study(file, assignments=["recipes.strong.validation_folds=5"])
        .recipes["strong"][3]
        .validation_folds
        == 5
    )
    error = refused(file, "recipes.strong.validation_folds=5", "scored_on=validation")
    assert error.found == "validation_folds"


@pytest.mark.parametrize("key", ["cache", "split", "seeds"])
def test_a_missing_key_is_named(file, key):
    file.write_text(re.sub(f"^{key} = .*$", "", file.read_text(), flags=re.M))
    assert refused(file).found == f"without {key}"


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path):
    assert "no such study" in refused(tmp_path / "none.toml").message()
    (tmp_path / "bad.toml").write_text("cache = ")
    assert "not valid TOML" in refused(tmp_path / "bad.toml").message()
