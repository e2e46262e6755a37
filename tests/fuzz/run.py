"""Fuzz the parsers for long, guided by coverage (atheris): `python tests/fuzz/run.py [PARSER...] --seconds 600`.

Every parser runs in a process of its own, with the limits of `parsers` and a limit on hangs. What breaks one is kept
in `--output`, once for each place where it broke, and the search goes on; the next search starts there. The last line
is a JSON object; the exit code is 1 where something was found. Move what is mended into `findings/`, where
`tests/test_fuzz.py` runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
HANG_S = 20
"""After which an input ends its process."""
GRACE_S = 200
"""To start and to end, beyond the time for fuzzing."""
MOST_DEATHS = 20
"""Of processes that fuzz one parser, after which it is given up."""
SMALLEST_LIMIT = 8192
"""Bytes of an input; more where seeds are long."""
ROOTS = ("supercl_core", "preprocess", "train")


def main() -> int:
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    arguments = _arguments()
    if arguments.world:
        _fuzz(arguments)
        return 0
    from fuzz.parsers import PARSERS

    names = arguments.parsers or list(PARSERS)
    unknown = [name for name in names if name not in PARSERS]
    if unknown:
        sys.exit(f"no parser {', '.join(unknown)}; there are {', '.join(PARSERS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="supercl-fuzz-") as folder:
        _build_world(Path(folder))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            campaigns = [pool.submit(_campaign, name, Path(folder), arguments) for name in names]
        results = {name: campaign.result() for name, campaign in zip(names, campaigns, strict=True)}
    totals = {key: sum(result[key] for result in results.values()) for key in ("executions", "findings")}
    print(json.dumps({"parsers": results, "seconds_per_parser": arguments.seconds, **totals}))
    return 1 if totals["findings"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help="default: all")
    parser.add_argument("--seconds", type=int, default=600, help="for each parser")
    parser.add_argument("--jobs", type=int, default=1, help="parsers at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=Path("fuzz-findings"), help="folder for what breaks a parser"
    )
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _build_world(folder: Path) -> None:
    """The valid files that all parsers start from."""
    from conftest import tiny_cases, write_msd_folder
    from made_caches import add_descriptors

    from preprocess import run

    cases = tiny_cases()
    write_msd_folder(folder / "Task99_Tiny", {name: cases[name] for name in ("case_a", "case_d")})
    run(folder / "Task99_Tiny", folder / "tiny.zarr", num_workers=1)
    add_descriptors(folder / "tiny.zarr")


def _campaign(name: str, world: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fuzz one parser until its time is up, in as many processes as it breaks."""
    end = time.monotonic() + arguments.seconds
    output = arguments.output / name
    output.mkdir(exist_ok=True)
    log = output / "log.txt"
    for report in output.glob("*.report"):
        report.unlink()
    executions = edges = 0
    deaths: list[str] = []
    while (left := round(end - time.monotonic())) > 0 and len(deaths) < MOST_DEATHS:
        command = [sys.executable, __file__, name, "--world", str(world), "--output", str(output)]
        command += ["--seconds", str(left), "--seed", str(arguments.seed + len(deaths))]
        with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            try:
                ended = f"ended with {process.wait(left + GRACE_S)}"
            except subprocess.TimeoutExpired:
                process.kill()
                ended = "did not end"
        said = log.read_text(errors="replace")
        executions += max(map(int, re.findall(r"^#(\d+)", said, re.MULTILINE)), default=0)
        edges = max(map(int, re.findall(r" cov: (\d+)", said)), default=edges)
        if ended != "ended with 0":
            deaths.append(f"a process {ended}: {log.rename(output / f'log-{time.time_ns()}.txt')}")
    reports = sorted(output.glob("*.report"))
    found = [f"{file.read_text().partition(chr(10))[0]}: {file.with_suffix('')}" for file in reports] + deaths
    line = f"{name:16} {executions:>9,} executions  {edges:>6,} edges  {len(found)} findings"
    print("\n  ".join([line, *found]), flush=True)
    return {"executions": executions, "edges": edges, "findings": len(found), "found": found}


def _fuzz(arguments: argparse.Namespace) -> None:
    """Fuzz one parser in this process."""
    import atheris

    (name,) = arguments.parsers
    with atheris.instrument_imports(include=[*ROOTS, "tomllib"]):
        from fuzz.parsers import PARSERS, World, check, findings, memory_limit

        scratch = Path(tempfile.mkdtemp(prefix=name, dir=arguments.world))
        world = World(
            msd=arguments.world / "Task99_Tiny", cache=arguments.world / "tiny.zarr", scratch=scratch
        )
        prepared = PARSERS[name](world)

    corpus = arguments.world / f"{name}-corpus"
    corpus.mkdir(exist_ok=True)
    known = [*findings(name), *(file for file in arguments.output.iterdir() if not file.suffix)]
    seeds = [*prepared.seeds, *(file.read_bytes() for file in known)]
    for index, seed in enumerate(seeds):
        (corpus / f"seed-{index:03d}").write_bytes(seed)
    places = {file.read_text().partition("\n")[0] for file in arguments.output.glob("*.report")}

    def one_input(data: bytes) -> None:
        if not data:
            return
        try:
            check(prepared.target, data)
        except Exception as error:
            place = _place(error)
            if place not in places:
                places.add(place)
                file = arguments.output / hashlib.sha256(data).hexdigest()[:16]
                file.write_bytes(data)
                file.with_suffix(".report").write_text(
                    f"{place}\n\n{''.join(traceback.format_exception(error))}"
                )

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.1:
            return atheris.Mutate(data, max_size)
        if random.random() < 0.5:  # most of what is new in coverage is refused early; stay near what is taken
            data = random.choice(seeds)
        return prepared.mutated(random, data)[:max_size]

    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={arguments.seconds}",
            f"-timeout={HANG_S}",
            "-rss_limit_mb=0",
            f"-max_len={max(SMALLEST_LIMIT, 2 * max(map(len, seeds)))}",
            "-len_control=0",
            "-mutate_depth=2",
            f"-seed={arguments.seed}",
            f"-artifact_prefix={arguments.output}/died-",
            str(corpus),
        ],
        one_input,
        custom_mutator=mutate,
    )
    with memory_limit():
        atheris.Fuzz()


def _place(error: Exception) -> str:
    """Where and how a parser broke: the kind of error, and the last line of ours that it passed."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(TESTS.parent)
        and Path(frame.filename).relative_to(TESTS.parent).parts[0] in ROOTS
    ]
    if ours:
        return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__}: {re.sub('[0-9]+', 'N', str(error))[:60]!r}"


if __name__ == "__main__":
    sys.exit(main())
