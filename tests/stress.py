"""Kills, flipped bytes and corrupt inputs, many times over: is what a cache holds right, whatever happens?

    ROUNDS=200 SEED=0 python tests/stress.py        (make stress; half an hour on two cores, ROUNDS=20 five minutes)

Every round makes one cache with real processes, on this machine or through a Dask scheduler in a process of its own.
SIGKILL hits one of them, or all, up to three times (`stress_rounds`); then the run is resumed once, and every byte
compared with a run that nobody disturbed. Flipped bytes must be found and mended, corrupt inputs listed (`corrupt`).
The last line on stdout is a JSON object. The exit code is 1 where a target was missed; then its caches are kept.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import corrupt
from cache_bytes import changed_cases, content, differences, stamps
from stress_rounds import (
    LIMIT_S,
    Lane,
    Outcome,
    Reference,
    Round,
    make_reference,
    preprocess_command,
    start_python,
)

from supercl_core import provenance
from supercl_core.cache.reader import open_cache
from supercl_core.checks.verification import verify
from supercl_core.progress import progress

LANES: Final = 3
"""Rounds at a time: a run on small cases mostly waits for processes to start and end."""
FLIPS_PER_ROUND: Final = 10
FLIPS_AT_ONCE: Final = 40
"""In as many shards, of all cases but `UNDAMAGED`, before one verification and one repair."""
UNDAMAGED: Final = 5
MIN_CORRUPT_KINDS: Final = 30
KILLS: Final = (
    *("main killed", "worker killed", "scheduler killed", "all killed"),
    *("commit of a case", "a case being written", "the lock", "the root", "the tables", "the weak labels"),
)
"""Each of them must have been hit where there are at least `MANY` rounds."""
MANY: Final = 100


def main() -> int:
    """Play all rounds, print what came out, and return the exit code."""
    num_rounds, seed = int(os.environ.get("ROUNDS", "200")), int(os.environ.get("SEED", "0"))
    print(f"ROUNDS={num_rounds} SEED={seed}", file=sys.stderr, flush=True)
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="supercl-stress-"))
    num_flips = num_rounds * FLIPS_PER_ROUND
    num_batches = -(-num_flips // FLIPS_AT_ONCE)
    with _lanes(work) as lanes, _threads() as pool:
        reference = make_reference(work, LANES)

        def play(number: int, path: Path) -> Outcome:
            lane = lanes.get()
            try:
                return Round(number, seed, path, reference, lane).play()
            finally:
                lanes.put(lane)

        def flip(number: int, path: Path) -> Outcome:
            count = min(FLIPS_AT_ONCE, num_flips - number * FLIPS_AT_ONCE)
            return flip_bytes(path, reference, count, random.Random(f"{seed} flips {number}"))

        rounds = [*_carried_out(pool, "rounds", play, work / "round", num_rounds)]
        batches = [*_carried_out(pool, "batches of flips", flip, work / "flips", num_batches)]
        [odd] = _carried_out(pool, "data sets", lambda _, path: corrupt_inputs(path), work / "corrupt", 1)
    total = Outcome()
    for outcome in (*rounds, *batches, odd):
        total.add(outcome)
    record = provenance.record()
    result = {
        "rounds": num_rounds,
        "differences": sum(bool(outcome.problems) for outcome in rounds),
        "recomputed_finished_cases": total.recomputed_finished_cases,
        "bytes_flipped": total.bytes_flipped,
        "flips_found": total.flips_found,
        "flips_repaired": total.flips_repaired,
        "corrupt_kinds": len(corrupt.FAILING),
        "corrupt_reported": total.corrupt_reported,
        "problems": len(total.problems),
        "second_runs_refused": total.second_runs_refused,
        "kills": dict(sorted(total.kills.items())),
        "seed": seed,
        "seconds": round(time.monotonic() - start),
        **{key: record[key] for key in ("num_cores", "platform", "python", "commit")},
    }
    flips_are_right = total.bytes_flipped == total.flips_found == total.flips_repaired == num_flips
    kinds_are_right = len(corrupt.FAILING) == total.corrupt_reported >= MIN_CORRUPT_KINDS
    not_hit = [kill for kill in KILLS if num_rounds >= MANY and not any(kill in hit for hit in total.kills)]
    for kill in not_hit:
        print(f"no kill hit: {kill}", file=sys.stderr)
    success = flips_are_right and kinds_are_right and not total.problems and not not_hit
    if success:
        shutil.rmtree(work)
    else:
        print(f"What went wrong is in {work}", file=sys.stderr)
    print(json.dumps(result))
    return 0 if success else 1


def _carried_out(
    pool: ThreadPoolExecutor, unit: str, act: Callable[[int, Path], Outcome], path: Path, count: int
) -> Iterator[Outcome]:
    """What `act` gives for the numbers below `count`, each in a folder of its own that stays where it has problems."""
    num_problems = 0
    with progress("stress", total=count, unit=unit) as advance:
        running = {}
        for number in range(count):
            folder = Path(f"{path}_{number}")
            running[pool.submit(act, number, folder)] = folder
        for ended in as_completed(running):
            outcome, folder = ended.result(), running[ended]
            for problem in outcome.problems:
                print(f"{folder.name}: {problem}", file=sys.stderr, flush=True)
            if not outcome.problems:
                shutil.rmtree(folder, ignore_errors=True)
            num_problems += len(outcome.problems)
            advance(note=f"{num_problems} problems" if num_problems else "")
            yield outcome


def flip_bytes(path: Path, reference: Reference, num_flips: int, generator: random.Random) -> Outcome:
    """Flip a random byte in each of some random shards, verify, repair, and compare."""
    outcome = Outcome(bytes_flipped=num_flips)
    cache = path / "cache.zarr"
    shutil.copytree(reference.cache, cache)
    cases = sorted(
        {name.split("/")[1] for name in reference.files if re.fullmatch("cases/[^/]*/zarr.json", name)}
    )
    damaged_cases = generator.sample(cases, len(cases) - UNDAMAGED)
    shards = [name for name in reference.files if "/c/" in name and name.split("/")[1] in damaged_cases]
    flipped = generator.sample(shards, num_flips)
    for name in flipped:
        values = bytearray(reference.files[name])
        values[generator.randrange(len(values))] ^= generator.randint(1, 255)
        (cache / name).write_bytes(values)
    undamaged = stamps(
        cache / "cases" / case for case in set(cases) - {name.split("/")[1] for name in flipped}
    )

    found = verify(cache, num_workers=1, on_case=lambda: None)
    named = {(damage.case_id, damage.where) for damage in found.damages}
    expected = {(name.split("/")[1], name) for name in flipped}
    outcome.flips_found = len(named & expected)
    if named != expected:
        outcome.problems.append(f"verify missed {expected - named} and named {named - expected} beside")
    run = start_python(["-m", "supercl_core.cli", "repair", cache, "--workers", "2"], path / "log")
    if code := run.wait(LIMIT_S):
        outcome.problems.append(f"supercl repair: exit code {code}; see {path / 'log'}")
    repaired = content(cache)
    outcome.flips_repaired = sum(repaired.get(name) == reference.files[name] for name in flipped)
    outcome.problems += differences(reference.files, repaired)
    outcome.problems += [f"{case} had no damage, and was computed again" for case in changed_cases(undamaged)]
    return outcome


def corrupt_inputs(path: Path) -> Outcome:
    """Preprocess corrupt and odd cases: is every kind listed with its reason, and everything else done?"""
    outcome = Outcome()
    expected = corrupt.write_data_set(path / "data")
    code = start_python(preprocess_command(path / "data", path / "cache.zarr"), path / "log").wait(LIMIT_S)
    if code != 3:
        outcome.problems.append(f"exit code {code}; see {path / 'log'}")
        return outcome
    rows = {row.id: row for row in open_cache(path / "cache.zarr").rows}
    for case_id, (kind, reason) in expected.items():
        row = rows.get(case_id)
        if row is None or (row.state == "failed") != bool(reason) or reason not in row.reason:
            outcome.problems.append(f"{kind}: {row}")
        else:
            outcome.corrupt_reported += kind in corrupt.FAILING
    return outcome


@contextmanager
def _lanes(work: Path) -> Iterator[queue.SimpleQueue[Lane]]:
    lanes = [Lane(work / f"lane_{number}") for number in range(LANES)]
    free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    for lane in lanes:
        free.put(lane)
    try:
        yield free
    finally:
        for lane in lanes:
            lane.close()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(LANES)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C too


if __name__ == "__main__":
    sys.exit(main())
