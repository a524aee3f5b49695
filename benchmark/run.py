"""Make the runs of a figure or table: python benchmark/run.py FIGURE [--scale laptop|paper] [--workers N] [--dry-run]

The figures are the entries of benchmark/figures.toml. Each run is a plain command of one script, with one thread and a
folder of its own, RUNS_DIR/FIGURE/METHOD-sSEED/. Runs that are finished are skipped, runs that were interrupted go on
from their checkpoint, a run that fails does not stop the others and is named at the end; one that another process is
making is left to it. With --launcher slurm each run becomes a job of a cluster, through submitit: start the same
command again to go on with those that were cut off.
"""
from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
FIGURES = tomllib.loads((ROOT / "benchmark" / "figures.toml").read_text())
Scale = Literal["laptop", "paper"]


def figure_named(name: str) -> dict:
    """The entry of figures.toml."""
    if name not in FIGURES:
        raise ValueError(f"no figure {name}; there are {', '.join(FIGURES)}")
    return FIGURES[name]


@dataclass
class Args:
    figure: tyro.conf.Positional[str]
    """entry of benchmark/figures.toml"""
    scale: Scale = "laptop"
    """steps and seeds: what two cores can do, or the paper's own"""
    workers: int = 2
    """runs at a time, one thread each"""
    runs_dir: Path = Path("runs")
    """where the runs go, in a folder for the figure"""
    methods: tuple[str, ...] = ()
    """only these of the figure's methods"""
    seeds: tuple[int, ...] = ()
    """these seeds in place of the scale's"""
    dry_run: bool = False
    """print the commands and do nothing"""
    launcher: Literal["local", "slurm"] = "local"
    """run here, or hand each run to SLURM (submitit) and return"""
    slurm_hours: int = 24
    """time limit of a SLURM job"""
    slurm_partition: str | None = None
    """where SLURM puts the jobs; None: its default"""

    def __post_init__(self):
        figure = figure_named(self.figure)
        if "same_runs_as" in figure:
            raise ValueError(f"{self.figure} is drawn from the runs of {figure['same_runs_as']}: run and report that")
        known = figure.get("methods", {})
        if set(self.methods) - set(known):
            raise ValueError(f"--methods of {self.figure} are {', '.join(known)}; got {' '.join(self.methods)}")
        if self.workers < 1 or self.slurm_hours < 1:
            raise ValueError(f"--workers and --slurm-hours must be at least 1, got {self.workers}, {self.slurm_hours}")


@dataclass
class Job:
    """One run: its command, and the folder with its run folder, its flags, its log and, at the end, `finished`."""

    folder: Path
    script: str
    flags: list[str]
    steps: int
    began: float | None = None                            # these two once it runs
    process: subprocess.Popen | None = None

    @property
    def finished(self) -> bool:
        return (self.folder / "finished").exists()

    def differs(self) -> str:
        """A message if the folder holds a run with other flags, of another scale perhaps; else nothing."""
        path, mine = self.folder / "flags", self.flags_as_typed()
        if not path.exists() or path.read_text().strip() == mine:
            return ""
        return (f"{self.folder} holds a run with other flags; give another --runs-dir, or delete it\n"
                f"  it has     {path.read_text().strip()}\n  asked for  {mine}")

    def flags_as_typed(self) -> str:
        """The flags, wherever the folder of all runs lies and however its name is given."""
        return shlex.join(self.flags).replace(f"{self.folder.parents[1]}/", "{runs_dir}/")

    def missing(self) -> str:
        """A message if a flag stands for the folder of another figure's run and that is not finished; else nothing."""
        for source in (Path(flag).parent for flag in self.flags if "*" in flag):
            if not (source / "finished").exists():
                return (f"{self.folder.name} starts from {source}, which holds no finished run; first: "
                        f"python benchmark/run.py {source.parent.name} --runs-dir {source.parents[1]}")
        return ""

    def command(self) -> list[str]:
        """The plain command line that starts the run, or that goes on with it."""
        checkpoints = sorted(self.folder.glob("*/checkpoint.pt"))
        start = [str(sorted(Path(flag).parent.glob(f"{Path(flag).name}/checkpoint.pt"))[-1].parent) if "*" in flag
                 else flag for flag in self.flags]
        go_on = ["--resume", str(checkpoints[-1].parent)] if checkpoints else []
        return [sys.executable, str(ROOT / self.script), *(go_on or [*start, "--runs-dir", str(self.folder)])]

    def run(self) -> str:
        """Make the run; nothing if it is finished then, else why not."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "w") as lock, open(self.folder / "log.txt", "a") as log:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)       # the run keeps it if we are killed
                (self.folder / "flags").write_text(self.flags_as_typed() + "\n")
                self.began = time.time()
                self.process = subprocess.Popen(self.command(), stdout=log, stderr=subprocess.STDOUT,
                                                env={**os.environ, "OMP_NUM_THREADS": "1"}, pass_fds=[lock.fileno()])
                status = self.process.wait()
        except BlockingIOError:
            return "another process is making it"
        except OSError as error:
            return str(error)
        if status:
            return f"status {status}: see {self.folder / 'log.txt'}"
        (self.folder / "finished").touch()
        return ""

    def step(self) -> int:
        """How far the run is, by the last line of its log that says so."""
        log = self.folder / "log.txt"
        found = re.findall(r"^step ([\d,]+)/", log.read_text(), re.M) if log.exists() else []
        return self.steps if self.finished else int(found[-1].replace(",", "")) if found else 0


def jobs_of(args: Args) -> list[Job]:
    """The runs of a figure, seed by seed, so that every method is compared early."""
    figure = FIGURES[args.figure]
    scale = figure[args.scale]
    jobs = []
    for seed in args.seeds or scale["seeds"]:
        for method, own in figure["methods"].items():
            if not args.methods or method in args.methods:
                text = " ".join([figure["flags"], own, scale.get("flags", ""), scale.get("own", {}).get(method, "")])
                flags = [flag.format(runs_dir=args.runs_dir, seed=seed) for flag in shlex.split(text)]
                flags += ["--seed", str(seed)] + ["--total-timesteps", str(scale.get("steps"))] * ("steps" in scale)
                steps = int(flags[flags.index("--total-timesteps") + 1])
                jobs.append(Job(args.runs_dir / args.figure / f"{method}-s{seed}", figure["script"], flags, steps))
    return jobs


def watch(jobs: list[Job], done: threading.Event) -> None:
    """A progress line per job; tqdm tells the time left from the steps since the job began."""
    bars = [tqdm(total=job.steps, initial=job.step(), desc=job.folder.name, position=i, unit="step", unit_scale=True,
                 smoothing=0, disable=not sys.stderr.isatty()) for i, job in enumerate(jobs)]
    while not done.wait(5):
        for bar, job in zip(bars, jobs):
            bar.start_t = job.began or time.time()
            bar.update(job.step() - bar.n)
    for bar in bars:
        bar.close()


def run_here(args: Args, waiting: list[Job]) -> list[str]:
    """Run the jobs, --workers at a time; what to say of those that failed."""
    done, started, failed = threading.Event(), time.time(), []
    watcher = threading.Thread(target=watch, args=(waiting, done))
    pool = ThreadPoolExecutor(args.workers)

    def stop(*_) -> None:
        """What SIGTERM does: Ctrl-C reaches the runs by itself, this does not."""
        pool.shutdown(wait=False, cancel_futures=True)
        for job in waiting:
            if job.process and job.process.poll() is None:
                job.process.terminate()
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, stop)
    watcher.start()
    try:
        for job, problem in zip(waiting, pool.map(Job.run, waiting)):
            if problem:
                failed.append(f"{job.folder.name} ({problem})")
            elif not sys.stderr.isatty():
                print(f"{job.folder.name} done after {(time.time() - started) / 60:.0f} min", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)                             # after Ctrl-C, which the runs got as well
        done.set()
        watcher.join()
        signal.signal(signal.SIGTERM, before)
    return failed


def hand_over(args: Args, waiting: list[Job], cluster: str = "slurm") -> list:
    """A job of the cluster for each run, which calls this very program for it, so that it resumes as it does here.

    Args:
        cluster: submitit's name of it; "local" runs the jobs as processes of this machine.
    Returns:
        submitit's jobs, at most --workers of which run at a time.
    """
    import submitit
    executor = submitit.AutoExecutor(args.runs_dir / args.figure / "jobs", cluster=cluster)
    executor.update_parameters(timeout_min=60 * args.slurm_hours, cpus_per_task=1)
    if cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=args.workers)
        if args.slurm_partition:
            executor.update_parameters(slurm_partition=args.slurm_partition)
    commands = []
    for job in waiting:
        method, _, seed = job.folder.name.rpartition("-s")
        commands.append(submitit.helpers.CommandFunction([
            sys.executable, str(Path(__file__).resolve()), args.figure, "--scale", args.scale, "--methods", method,
            "--seeds", seed, "--workers", "1", "--runs-dir", str(args.runs_dir.resolve())]))
    with executor.batch():
        return [executor.submit(command) for command in commands]


def main(args: Args) -> None:
    figure = FIGURES[args.figure]
    if "command" in figure:
        print(figure["command"])
        if not args.dry_run:
            sys.exit(subprocess.run(shlex.split(figure["command"].replace("python", sys.executable, 1)),
                                    cwd=ROOT).returncode)
        return
    jobs = jobs_of(args)
    if differing := [job.differs() for job in jobs if job.differs()]:
        sys.exit("\n".join(differing))
    if args.dry_run:
        for job in jobs:
            flags = [*job.flags, "--runs-dir", str(job.folder)]
            quoted = [flag if "*" in flag else shlex.quote(flag) for flag in flags]    # the shell is to expand *
            print("finished: " * job.finished + " ".join(["python", job.script, *quoted]))
        return
    waiting = [job for job in jobs if not job.finished]
    if lacking := [job.missing() for job in waiting if job.missing()]:
        sys.exit("\n".join(lacking))
    print(f"{figure['title']}: {len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before")
    report = f"python benchmark/report.py {args.figure} --scale {args.scale} --runs-dir {args.runs_dir}"
    if args.launcher == "slurm":
        for job, handed in zip(waiting, hand_over(args, waiting)):
            print(f"{job.folder.name}: SLURM job {handed.job_id}")
        print(f"when they are done: {report}")
        return
    try:
        failed = run_here(args, waiting)
    except KeyboardInterrupt:
        print("stopped, and the runs with it; the same command goes on with them")
        sys.exit(130)
    print("\n".join(["these runs failed:", *failed]) if failed else f"all done: {report}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
