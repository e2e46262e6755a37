"""Every parser takes its valid inputs, and meets crafted ones, past findings among them, with an error of ours.

For a moment only, and with the same inputs each time: `python tests/fuzz/run.py` searches for new ones, and for long.
"""

from __future__ import annotations

import ast
import re
import time
import warnings
from pathlib import Path

import pytest
from fuzz import parsers
from fuzz.parsers import PARSERS, BrokenContractError, Prepared, World, check, findings, memory_limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supercl_core.errors import SuperCLError

NUM_INPUTS = 300
"""For each parser."""
NUM_CACHES = 60
"""For those that verify and read a whole cache each time."""

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prepared(
    request: pytest.FixtureRequest,
    msd_path: Path,
    full_cache_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Prepared:
    return PARSERS[request.param](
        World(msd=msd_path, cache=full_cache_path, scratch=tmp_path_factory.mktemp(request.param))
    )


@pytest.mark.parametrize("prepared", PARSERS, indirect=True)
def test_no_crafted_input_breaks_a_parser(prepared: Prepared, request: pytest.FixtureRequest) -> None:
    assert any(check(prepared.target, seed) for seed in prepared.seeds)
    slow = request.node.callspec.params["prepared"].startswith("cache")

    @settings(
        max_examples=NUM_CACHES if slow else NUM_INPUTS,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        seed=st.sampled_from(prepared.seeds),
        random=st.randoms(use_true_random=False),
        num_mutations=st.integers(1, 3),
    )
    def try_one(seed, random, num_mutations):
        for _ in range(num_mutations):
            seed = prepared.mutated(random, seed)
        check(prepared.target, seed)

    with memory_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try_one()


@pytest.mark.parametrize("prepared", PARSERS, indirect=True)
def test_past_findings_stay_mended(prepared: Prepared, request: pytest.FixtureRequest) -> None:
    for file in findings(request.node.callspec.params["prepared"]):
        check(prepared.target, file.read_bytes())


def test_findings_belong_to_parsers() -> None:
    assert {folder.name for folder in parsers.FINDINGS.iterdir()} <= PARSERS.keys()


# ---------------------------------------------------------------- the harness itself


def test_the_harness_lets_only_readable_errors_of_ours_pass() -> None:
    def raises(error: Exception) -> parsers.Target:
        def target(data: bytes) -> None:
            raise error

        return target

    refused = SuperCLError("Bad.", next_step="Mend it.")
    assert check(raises(refused), b"x") is False
    assert check(lambda data: None, b"x") is True
    with pytest.raises(KeyError):
        check(raises(KeyError("x")), b"x")
    with pytest.raises(BrokenContractError, match="nobody can read"):
        check(raises(SuperCLError("Bad." * 5000, next_step="Mend it.")), b"x")


def test_the_harness_sees_what_takes_too_long_or_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers, "MOST_SECONDS", 0.05)
    with pytest.raises(BrokenContractError, match="0.1 s for 1 bytes"):
        check(lambda data: _compute_for(0.1), b"x")
    with pytest.raises(MemoryError), memory_limit():
        check(lambda data: bytes(2 * parsers.MOST_MEMORY_BYTES).clear(), b"x")


def _compute_for(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


# ---------------------------------------------------------------- what no input may reach


def _calls(file: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _is_forbidden(name: str, call: ast.Call) -> bool:
    given_ = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    module, _, function = name.rpartition(".")
    return (
        name in ("eval", "exec", "compile", "__import__", "os.system")
        or module in ("pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle")
        or (module == "yaml" and function != "safe_load")
        or (function == "load" and module.startswith("torch") and given_.get("weights_only") != "True")
        or (module in ("np", "numpy") and function in ("load", "loadtxt", "genfromtxt", "fromfile"))
        or given_.get("allow_pickle", "False") != "False"
        or given_.get("shell", "False") != "False"
        or function in ("extractall", "unpack_archive")
        or function in ("Markup", "mark_safe")
    )


def test_nothing_is_unpickled_or_run() -> None:
    files = [
        file for package in ("supercl_core", "preprocess", "train") for file in (ROOT / package).rglob("*.py")
    ]
    assert len(files) > 50
    calls = [(file, name, call) for file in files for name, call in _calls(file)]
    assert any(name == "torch.load" for _, name, _ in calls)
    assert [f"{file}:{call.lineno} {name}" for file, name, call in calls if _is_forbidden(name, call)] == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "pickle.loads(data)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_forbidden_calls_are_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "x.py").write_text(code)
    assert [name for name, call in _calls(tmp_path / "x.py") if _is_forbidden(name, call)]


def test_no_page_leaves_names_as_they_are() -> None:
    templates = [file for package in ("supercl_core", "train") for file in (ROOT / package).rglob("*.jinja")]
    assert templates
    for file in templates:
        text = file.read_text(encoding="utf-8").replace(
            "{{ script | safe }}", ""
        )  # our own, in a file of its own
        assert not re.search(r"\|\s*safe\b|autoescape\s+false", text), file
