"""Make the runs of a figure or table: python benchmark/run.py FIGURE [--scale laptop|paper] [--workers N] [--dry-run]

The figures are the entries of benchmark/figures.toml. Each run is a plain command of one script, with one thread and a
folder of its own, RUNS_DIR/FIGURE/METHOD-sSEED/. Runs that are finished are skipped, runs that were interrupted go on
from their checkpoint, a run that fails does not stop the others and is named at the end.
"""
from __future__ import annotations

import glob
import os
import re
import shlex
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


@dataclass
class Args:
    figure: tyro.conf.Positional[str]
    """entry of benchmark/figures.toml"""
    scale: Literal["laptop", "paper"] = "laptop"
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

    def __post_init__(self):
        if self.figure not in FIGURES:
            raise ValueError(f"no figure {self.figure}; there are {', '.join(FIGURES)}")
        known = FIGURES[self.figure]["methods"]
        if set(self.methods) - set(known):
            raise ValueError(f"--methods of {self.figure} are {', '.join(known)}; got {' '.join(self.methods)}")
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")


@dataclass
class Job:
    """One run: its command, and the folder that holds its run folder, its log and, at the end, `finished`."""

    folder: Path
    script: str
    flags: list[str]
    steps: int

    @property
    def finished(self) -> bool:
        return (self.folder / "finished").exists()

    def command(self) -> list[str]:
        """The plain command line that starts the run, or that goes on with it."""
        checkpoints = sorted(self.folder.glob("*/checkpoint.pt"))
        start = [found for flag in self.flags for found in ("*" in flag and sorted(glob.glob(flag))) or [flag]]
        go_on = ["--resume", str(checkpoints[-1].parent)] if checkpoints else []
        return [sys.executable, str(ROOT / self.script), *(go_on or [*start, "--runs-dir", str(self.folder)])]

    def run(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            status = subprocess.run(self.command(), stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if status == 0:
            (self.folder / "finished").write_text(" ".join(self.flags) + "\n")
        return status

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
                flags = shlex.split(text.format(runs_dir=args.runs_dir, seed=seed))
                flags += ["--seed", str(seed)] + ["--total-timesteps", str(scale.get("steps"))] * ("steps" in scale)
                steps = int(flags[flags.index("--total-timesteps") + 1])
                jobs.append(Job(args.runs_dir / args.figure / f"{method}-s{seed}", figure["script"], flags, steps))
    return jobs


def watch(jobs: list[Job], done: threading.Event) -> None:
    """A progress line per job; tqdm tells the time left from the steps."""
    started = {job.folder: job.step() for job in jobs}
    bars = [tqdm(total=job.steps, initial=started[job.folder], desc=job.folder.name, position=i, unit="step",
                 unit_scale=True, disable=not sys.stderr.isatty()) for i, job in enumerate(jobs)]
    while not done.wait(5):
        for bar, job in zip(bars, jobs):
            bar.update(job.step() - bar.n)
    for bar in bars:
        bar.close()


def main(args: Args) -> None:
    jobs = jobs_of(args)
    if args.dry_run:
        for job in jobs:
            print("finished: " * job.finished + shlex.join(["python", job.script, *job.flags]))
        return
    waiting, done, started = [job for job in jobs if not job.finished], threading.Event(), time.time()
    print(f"{FIGURES[args.figure]['title']}: {len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before")
    watcher = threading.Thread(target=watch, args=(waiting, done))
    watcher.start()
    with ThreadPoolExecutor(args.workers) as pool:
        failed = []
        for job, status in zip(waiting, pool.map(Job.run, waiting)):
            if status:
                failed.append(f"{job.folder.name} (status {status}): see {job.folder / 'log.txt'}")
            elif not sys.stderr.isatty():
                print(f"{job.folder.name} done after {(time.time() - started) / 60:.0f} min", flush=True)
    done.set()
    watcher.join()
    print("\n".join(["these runs failed:", *failed]) if failed else
          f"all done: python benchmark/report.py {args.figure} --runs-dir {args.runs_dir}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
