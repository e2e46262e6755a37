"""Where preprocessing computes: processes on this machine, a running Dask scheduler, or the jobs of a Slurm cluster.

Opens and closes the connection, and knows what workers must have in common with this process. Which task runs
when is left to `preprocess.runner`, which calls this; `supercl preprocess --dry-run` prints the job script.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

from supercl_core import config as settings
from supercl_core import provenance
from supercl_core.errors import SuperCLError, UsageError, storage_error
from supercl_core.messages import is_verbose, note

THREADS_PER_WORKER: Final = 2
"""Cases that a worker process has in hand: one is read or committed while the other is computed."""
CONNECT_S: Final = 8
"""How long a scheduler may take to answer."""
ASK_S: Final = 5
"""How often the scheduler is asked for its workers."""
NO_WORKER_S: Final = 300
"""How long workers that were there may be gone."""
SUBMISSIONS: Final = 3
"""How often a job is submitted before Slurm's refusal is believed: a busy Slurm may refuse one by mistake."""
SUBMIT_AGAIN_S: Final = 2
SMALLEST_MEMORY_BYTES: Final = 1 << 20
"""Of a job; dask-jobqueue fails below a kilobyte."""
FILES: Final = 24
"""Open files of a process that runs workers, and how many more each of these takes (measured: 18 and 11)."""
FILES_PER_WORKER: Final = 12
DECISIVE: Final = ("supercl", "SimpleITK", "numba", "numpy", "scikit-image", "zarr")
"""Packages whose version can change the bytes of a case."""
_ALLOWED_FAILURES: Final = 1
"""A case whose worker dies is run again once; Dask then gives it back as one that may have killed both."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """The file given with `--slurm`: how many jobs there may be, and options of dask-jobqueue's SLURMCluster."""

    maximum_jobs: int = 0
    """Jobs at most; must be given. Jobs come and go with the work that is left."""
    minimum_jobs: int = 0
    """Jobs to hold on to however little work is left."""
    cores: int = 0
    """Cores of a job; must be given."""
    memory: str = ""
    """Memory of a job, such as "16GB"; must be given."""
    processes: int | None = None
    """Worker processes of a job; default one for every two cores, so that each has two cases in hand."""
    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    job_name: str | None = None
    job_cpu: int | None = None
    job_mem: str | None = None
    job_extra_directives: tuple[str, ...] = ()
    job_directives_skip: tuple[str, ...] = ()
    job_script_prologue: tuple[str, ...] = ()
    """Commands before the worker starts, such as the activation of an environment."""
    worker_extra_args: tuple[str, ...] = ()
    death_timeout: int | None = None
    interface: str | None = None
    """Network interface of scheduler and workers, such as "ib0"."""
    local_directory: str | None = None
    log_directory: str | None = None
    python: str | None = None
    """Interpreter of the workers; default that of this process."""
    shebang: str | None = None
    scheduler_options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("maximum_jobs", "cores", "memory"):
            if not getattr(self, name):
                raise UsageError(
                    f"The Slurm settings lack {name!r}.",
                    expected='at least maximum_jobs, cores and memory, such as 10, 8 and "16GB"',
                    found="no such key",
                    next_step="Add it to the file given with --slurm.",
                )
        settings.check_setting(
            "minimum_jobs",
            self.minimum_jobs,
            0 <= self.minimum_jobs <= self.maximum_jobs,
            f"0 to maximum_jobs ({self.maximum_jobs})",
        )
        settings.check_setting("cores", self.cores, self.cores > 0, "at least 1")
        settings.check_setting("memory", self.memory, _is_enough(self.memory), 'a size such as "16GB"')
        settings.check_setting(
            "processes",
            self.processes,
            1 <= self.num_processes <= self.cores,
            f"1 to cores ({self.cores})",
        )

    @property
    def num_processes(self) -> int:
        """Worker processes of a job."""
        return max(1, self.cores // THREADS_PER_WORKER) if self.processes is None else self.processes

    def options(self) -> dict[str, Any]:
        """The arguments of SLURMCluster and of its jobs; what is not set is left to dask-jobqueue."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        chosen = {name: value for name, value in values.items() if value not in (None, (), {})}
        del chosen["maximum_jobs"], chosen["minimum_jobs"]
        lists = {name: list(value) for name, value in chosen.items() if isinstance(value, tuple)}
        return {**chosen, **lists, "processes": self.num_processes}


class Cluster:
    """An open connection to a Dask scheduler, and what is known of its workers."""

    def __init__(
        self,
        client: Any,
        address: str,
        *,
        planned_threads: int = 0,
        queues: bool = False,
        refusals: Sequence[str] = (),
    ) -> None:
        """`client`: a distributed.Client of the scheduler at `address`, whose workers may grow to `planned_threads`
        (0: nobody knows). `queues`: workers come out of a batch system, where they may wait for hours; `refusals`:
        what it said to jobs that it did not take.
        """
        self.client = client
        self.address = address
        self._planned_threads = planned_threads
        self._queues = queues
        self._refusals = refusals
        self._num_threads = 0
        self._asked_at = -math.inf
        self._seen_at: float | None = None
        self._told = False

    def num_threads(self) -> int:
        """Threads that work now or may do so soon; the scheduler is asked every few seconds."""
        if time.monotonic() - self._asked_at > ASK_S:
            self._ask()
        return max(self._num_threads, self._planned_threads)

    def check(self) -> None:
        """Say on stderr that workers are missing; called while no case ends.

        Raises SuperCLError when the scheduler is gone, when Slurm takes no job, or when the workers have been
        gone for `NO_WORKER_S` and nothing promises new ones.
        """
        if self.client.status != "running":
            raise self.lost()
        self._ask()
        if self._num_threads:
            return
        if len(self._refusals) >= SUBMISSIONS:
            raise SuperCLError(
                "Slurm does not take the jobs.",
                found=self._refusals[-1].strip(),
                next_step="Mend the settings given with --slurm; --dry-run shows the job script.",
            )
        if self._seen_at is not None and not self._queues and self._asked_at - self._seen_at > NO_WORKER_S:
            raise SuperCLError(
                "All Dask workers are gone.",
                where=self.address,
                expected=f"new ones within {NO_WORKER_S} s",
                found="none",
                next_step="Start workers, and run the same command again; finished cases are kept.",
            )
        if not self._told:
            note(f"No Dask worker at {self.address}; waiting for one.")
            self._told = True

    def case_ended(self) -> None:
        """Take note that there is a worker."""
        self._seen_at = time.monotonic()

    def lost(self) -> SuperCLError:
        """The error for a scheduler that is gone."""
        return SuperCLError(
            "The Dask scheduler is gone.",
            where=self.address,
            next_step="Start it and its workers, and run the same command again; finished cases are kept.",
        )

    def _ask(self) -> None:
        with suppress(OSError):  # a scheduler that is gone shows in the client's status
            self._num_threads = sum(self.client.nthreads().values())
        self._asked_at = time.monotonic()
        if self._num_threads:
            self._seen_at, self._told = self._asked_at, False


@contextmanager
def connect(
    *, num_workers: int = 1, scheduler: str | None = None, slurm: SlurmConfig | None = None
) -> Iterator[Cluster]:
    """Open a cluster: of `num_workers` processes here, of a running `scheduler`, or of jobs of `slurm`.

    Prints the address of its dashboard to stderr. Dask's own log stays silent meanwhile: what matters in it is said by
    the runner. Raises SuperCLError where the scheduler does not answer or its workers have other versions of what
    decides the bytes of a case, UsageError for an address of no known form, and SuperCLError where Slurm or
    dask-jobqueue is missing.
    """
    with _silence():
        if slurm is not None:
            opened = _slurm_cluster(slurm)
        elif scheduler is not None:
            opened = _running_scheduler(scheduler)
        else:
            opened = _local_cluster(num_workers)
        with opened as cluster:
            note(f"Dask dashboard: {cluster.client.dashboard_link}")
            yield cluster


def read_slurm(path: Path) -> SlurmConfig:
    """The settings in the TOML file `path`. Raises UsageError for an unknown key, with a suggestion."""
    return settings.resolve(SlurmConfig, config_path=path)


def _is_enough(memory: str) -> bool:
    """Whether Dask takes the text for a size, and for one that a process fits in: a forgotten unit means bytes."""
    from dask.utils import parse_bytes

    try:
        return parse_bytes(memory) >= SMALLEST_MEMORY_BYTES
    except (ValueError, OverflowError):
        return False


def job_script(config: SlurmConfig) -> str:
    """The script that would be submitted for every job; needs dask-jobqueue, but no Slurm."""
    options = config.options()
    options.pop("scheduler_options", None)
    job = _slurm_job()("tcp://SCHEDULER:PORT", name="supercl", **options)
    script: str = job.job_script()
    return script


@cache
def software() -> dict[str, str]:
    """Versions of the packages that decide the bytes of a case, as installed for this process."""
    found = provenance.versions()
    return {name: found.get(name, "missing") for name in DECISIVE}


def check_software(expected: Mapping[str, str], *, host: str) -> None:
    """Raise SuperCLError where this process has not the `expected` versions (what `software` gave elsewhere)."""
    if software() != expected:
        raise _other_software(expected, {host: software()})


@contextmanager
def _local_cluster(num_workers: int) -> Iterator[Cluster]:
    import dask
    from distributed import Client, LocalCluster, WorkerPlugin

    class Deaf(WorkerPlugin):
        """A terminal sends Ctrl-C to every process of the run; the workers are ended by this one."""

        def setup(self, worker: Any) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    _check_open_files(num_workers)
    # Dask's profile samples all threads 100 times a second.
    with dask.config.set({"distributed.worker.profile.enabled": False}):
        try:
            opened = LocalCluster(
                n_workers=num_workers,
                threads_per_worker=THREADS_PER_WORKER,
                memory_limit=0,  # results are small: nothing to spill, and no reason to pause
                dashboard_address="127.0.0.1:0",
                silence_logs=_log_level(),
                scheduler_kwargs={"allowed_failures": _ALLOWED_FAILURES},
            )
        except RuntimeError as error:
            raise SuperCLError(
                "A worker process did not start.",
                found=error.__cause__ or error,
                next_step="Run the same command again; where it is killed every time, look at memory and limits.",
            ) from None
        with opened as cluster, Client(cluster) as client:
            client.register_plugin(Deaf())
            yield Cluster(client, cluster.scheduler_address, planned_threads=num_workers * THREADS_PER_WORKER)


def _check_open_files(num_workers: int) -> None:
    """Raise StorageError where this process may not open what it needs: Dask would hang, or die in many words."""
    if sys.platform == "win32":
        return  # no such limit
    import resource

    needed = FILES + FILES_PER_WORKER * num_workers
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < needed:
        found = f"at most {limit} may be; {num_workers} worker processes take {needed}"
        raise storage_error(OSError(errno.EMFILE, found))


@contextmanager
def _running_scheduler(address: str) -> Iterator[Cluster]:
    from distributed import Client
    from distributed.comm import get_address_host

    try:
        get_address_host(address)  # a client that fails over it is left open, and can hang the next one
        client = Client(address, timeout=CONNECT_S)
    except ValueError as error:
        raise UsageError(
            "The address of the Dask scheduler has no known form.",
            expected="--scheduler tcp://host:port",
            found=f"--scheduler {address}",
            next_step="Copy the address that the scheduler prints when it starts.",
        ) from error
    except OSError as error:
        raise SuperCLError(
            "The Dask scheduler does not answer.",
            where=address,
            expected=f"an answer within {CONNECT_S} s",
            found=error,
            next_step="Check the address, or leave --scheduler out to run on this machine.",
        ) from error
    with client:
        _check_workers(client)
        yield Cluster(client, address)


@contextmanager
def _slurm_cluster(config: SlurmConfig) -> Iterator[Cluster]:
    job_class = _slurm_job()
    from dask_jobqueue import SLURMCluster
    from distributed import Client, Status

    if shutil.which("sbatch") is None:
        raise SuperCLError(
            "There is no Slurm on this machine.",
            expected="the command sbatch on PATH",
            found="none",
            next_step="Run on a login node, or use --workers or --scheduler.",
        )
    refusals: list[str] = []

    class Job(job_class):  # type: ignore[misc, valid-type]
        async def start(self) -> None:
            for attempt in range(SUBMISSIONS):
                if attempt:
                    await asyncio.sleep(SUBMIT_AGAIN_S)
                try:
                    await super().start()
                    return
                except RuntimeError as error:
                    refusals.append(str(error).partition("stderr:")[2].strip() or str(error))
            # An exception here would leave Dask with a cluster that cannot be closed.
            self.status = Status.running

    options = config.options()
    given = options.pop("scheduler_options", {})
    scheduler_options = {"allowed_failures": _ALLOWED_FAILURES, "dashboard_address": ":0", **given}
    with (
        SLURMCluster(
            job_cls=Job, scheduler_options=scheduler_options, silence_logs=_log_level(), **options
        ) as cluster,
        Client(cluster) as client,
    ):
        # The scheduler sees a wave of cases at a time, never all that is left: judged by Dask's five seconds a
        # thread, a wave of short cases would seem too little for the jobs allowed.
        cluster.adapt(
            minimum_jobs=config.minimum_jobs,
            maximum_jobs=config.maximum_jobs,
            target_duration="1s",
            wait_count=30,
        )
        yield Cluster(
            client,
            cluster.scheduler_address,
            planned_threads=config.maximum_jobs * config.cores,
            queues=True,
            refusals=refusals,
        )


def _slurm_job() -> Any:
    try:
        from dask_jobqueue.slurm import SLURMJob
    except ModuleNotFoundError as error:
        raise SuperCLError(
            "Jobs on Slurm need the extra 'slurm'.",
            found=f"no module {error.name!r}",
            next_step="pip install 'supercl[slurm]'",
        ) from error
    return SLURMJob


def _check_workers(client: Any) -> None:
    """Raise SuperCLError where workers that are there now have other software than this process."""
    found = client.run(software, on_error="return")
    differing = {worker: versions for worker, versions in found.items() if versions != software()}
    if differing:
        raise _other_software(software(), differing)


def _other_software(
    expected: Mapping[str, str], found: Mapping[str, Mapping[str, str] | BaseException]
) -> SuperCLError:
    """The error that names, for some workers, the packages that differ from the `expected` ones."""
    lines = []
    for worker, versions in found.items():
        if isinstance(versions, BaseException):
            lines.append(f"{worker}: {versions}")
            continue
        names = [name for name in expected if versions.get(name) != expected[name]]
        lines.append(f"{worker}: " + ", ".join(f"{name} {versions.get(name)}" for name in names))
    shown = lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else [])
    return SuperCLError(
        "Dask workers have other versions than this machine; their cases would differ.",
        expected=", ".join(f"{name} {version}" for name, version in expected.items()),
        found="\n            ".join(shown),
        next_step="Install the same versions for the workers (pip install -c constraints.txt), start them again, "
        "and run the same command.",
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Dask's log, which tells of every closed connection, off the screen, unless it is asked for."""
    import distributed  # sets the levels below when it is first imported

    known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == distributed.__name__]
    levels = {name: logging.getLogger(name).level for name in known}
    for name in known:
        logging.getLogger(name).setLevel(_log_level())
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _log_level() -> int:
    return logging.INFO if is_verbose() else logging.CRITICAL
