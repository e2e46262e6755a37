"""docs/export.md: every command runs, prints the lines that stand below it, and these give the run's own answers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"```sh\n(supercl export runs[^\n]*)\n```\n\n```(?:python|sh)\n(.*?)```", TEXT, re.DOTALL
)
FORMATS = ["safetensors", "onnx", "monai", "smp", "nnunet"]

PLANS = {
    "dataset_name": "Dataset901_Tiny",
    "plans_name": "nnUNetPlans",
    "configurations": {"2d": {"patch_size": [64, 64], "normalization_schemes": ["ZScoreNormalization"]}},
}


def test_every_format_has_an_example():
    assert [shlex.split(command)[5] for command, _ in EXAMPLES] == FORMATS


@pytest.mark.slow
@pytest.mark.usefixtures("smp")
@pytest.mark.parametrize(("command", "lines"), EXAMPLES, ids=FORMATS)
def test_the_lines_load_what_the_command_wrote(
    command, lines, supercl, make_run, tmp_path, images, answer_of, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    _, network = make_run(filters=32, name="runs/pretrained")
    arguments = shlex.split(command)
    target = arguments[5]
    if target == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    outcome = supercl(*arguments[1:])
    assert outcome.code == 0, outcome.err
    folder = tmp_path / arguments[3]
    assert json.loads((folder / "card.json").read_text())["load"] == lines.splitlines()
    if target == "nnunet":  # its lines are run by test_to_nnunet, where nnU-Net is installed
        return
    found = answer_of(folder, lines.splitlines(), target, fresh=True)
    with torch.no_grad():
        image = torch.from_numpy(images)
        expected = network.encoder(image)[-1] if target == "smp" else network(image)
    tolerance = 1e-4 if target == "onnx" else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
