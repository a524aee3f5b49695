"""Make the runs of a figure: python benchmark/run.py FIGURE [--scale laptop|paper] [--workers N] [--dry-run]

Figures are the entries of benchmark/figures.toml. A run, with one thread, is made in RUNS_DIR/FIGURE/LABEL-sSEED/, and
what it measured comes into benchmark/results/FIGURE/: LABEL-sSEED.csv, pictures of seed 1, and in runs.json command,
steps, hours, commit, versions, machine. Runs that have their file there are skipped, those that were begun go on from
their checkpoint. Ctrl-C and SIGTERM stop all runs after a checkpoint. With --launcher slurm each is a job of a cluster.
"""
from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from filelock import FileLock, Timeout

ROOT = Path(__file__).parent.parent
FIGURES = tomllib.loads((ROOT / "benchmark" / "figures.toml").read_text(encoding="utf-8"))
RESULTS = ROOT / "benchmark" / "results"
PACKAGES = {"ale-py", "box2d", "gymnasium", "metaworld", "mujoco", "numpy", "torch"}


@dataclass
class Args:
    figure: tyro.conf.Positional[str]         # entry of benchmark/figures.toml
    scale: Literal["laptop", "paper"] = "laptop"  # steps and seeds: what two cores can do, or the paper's own
    workers: int = 2                          # runs at a time, one thread each
    methods: tuple[str, ...] = ()             # only these of the figure's methods
    seeds: tuple[int, ...] = ()               # these seeds in place of the scale's
    runs_dir: Path = Path("runs")             # where the runs go, in a folder for the figure
    dry_run: bool = False                     # print the commands and do nothing
    launcher: Literal["local", "slurm"] = "local"  # run here, or hand each run to SLURM and return
    slurm_hours: int = 24                     # time limit of a SLURM job


class Job:
    """One run: its command, the folder that its run folder is in, the file that it is to leave, the run it needs."""

    def __init__(self, args: Args, figure: str, method: str, seed: int):
        entry, self.method, self.seed, self.asked = FIGURES[figure], method, seed, False
        scale, name = entry[args.scale], f"{method}-s{seed}"
        self.folder = args.runs_dir.resolve() / figure / name
        self.csv = RESULTS / (figure + "-paper" * (args.scale == "paper")) / f"{name}.csv"
        flags = [entry.get("flags", ""), entry["methods"][method], scale.get("flags", ""),
                 scale.get("own", {}).get(method, ""), f"--seed {seed}",
                 f"--total-timesteps {scale['steps']}" if "steps" in scale else ""]
        self.command = ["python", entry["script"], *shlex.split(" ".join(flags))]
        self.needs = Job(args, *entry["needs"].split("/"), seed) if "{needs}" in self.command else None
        self.typed = shlex.join(self.command).replace("'{needs}'", f"runs/{entry.get('needs')}-s{seed}/*/")

    def run_folder(self) -> Path | None:
        """The newest run folder that has a checkpoint."""
        return max((path.parent for path in self.folder.glob("*/checkpoint.pt")), default=None)

    def about(self) -> tuple[dict, int, float]:
        """Of a run that was begun: args.json, and how far metrics.csv goes, in steps and seconds."""
        about = json.loads((self.run_folder() / "args.json").read_text(encoding="utf-8"))
        table = self.run_folder() / "metrics.csv"                      # comes with the first evaluation
        rows = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
        step, seconds = rows[-1].split(",")[:2] if len(rows) > 1 else (0, 0)
        return about, int(step), float(seconds)

    def has_ended(self) -> bool:
        """Whether the run has its last row, so that others can start from it."""
        return self.run_folder() is not None and self.about()[1] >= self.about()[0]["args"]["total_timesteps"]

    def start(self) -> None:
        """Begin the run or go on with it, in a process group of its own: Ctrl-C reaches us, who stop each run once."""
        command = [*self.command[2:], "--runs-dir", str(self.folder)]
        if self.needs:
            command[command.index("{needs}")] = str(self.needs.run_folder())
        if self.run_folder():
            command = ["--resume", str(self.run_folder())]
        with open(self.folder / "log.txt", "a") as log:
            self.process = subprocess.Popen([sys.executable, ROOT / self.command[1], *command], stdout=log, stderr=log,
                                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def keep(self) -> None:
        """Copy what the run has measured, and the pictures of seed 1, to the results, and say there what made it."""
        (about, step, seconds), path = self.about(), self.csv.parent / "runs.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        for picture in self.run_folder().glob("*.png") if self.seed == 1 else ():
            shutil.copy(picture, path.parent / f"{self.csv.stem}-{picture.name}")
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=ROOT).returncode == 1
        with FileLock(self.folder.parent / "lock"):                    # other processes keep theirs at the same time
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            known[self.csv.stem] = {
                "command": self.typed, "tasks": about["args"].get("tasks") or about["args"].get("games"),
                "steps": step, "hours": round(seconds / 3600, 2), "commit": commit.stdout.strip() + "-dirty" * changed,
                "versions": {name: number for name, number in about["versions"].items() if name.lower() in PACKAGES},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread"}
            path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copy(self.run_folder() / "metrics.csv", self.csv)


def work(waiting: list[Job], workers: int) -> list[str]:
    """Keep so many runs going until all have ended or a signal comes; returns what did not go well."""
    running, problems, signals = {}, [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    while running or waiting and not signals:
        busy = [job.folder for job in running]
        ready = [job for job in waiting if not job.needs or job.needs.folder not in busy and job.needs.has_ended()]
        if not ready and not running:
            return problems + [f"{job.folder} needs {job.needs.folder}, which has not ended" for job in waiting]
        for job in ready[:workers - len(running)] if not signals else ():
            waiting.remove(job)
            job.folder.mkdir(parents=True, exist_ok=True)
            try:
                running[job] = FileLock(job.folder / "lock", timeout=0)
                running[job].acquire()
                job.start()
            except Timeout:
                running.pop(job)
                problems.append(f"{job.folder} is made by another process")
        for job in [job for job in running if job.process.poll() is not None]:
            running.pop(job).release()
            if job.process.returncode:
                problems.append(f"{job.folder} ended with status {job.process.returncode}: see log.txt there")
            elif not job.csv.exists():
                job.keep()
            print(f"{job.folder} ended, {len(running)} are running, {len(waiting)} wait", flush=True)
        for job in [job for job in running if signals and not job.asked]:
            job.process.terminate()                                    # once: at a second signal it would not save
            job.asked = True
        time.sleep(0.2)
    return ["stopped; the same command goes on"] if signals else problems


def hand_over(args: Args, jobs: list[Job]) -> list:
    """A job of the cluster for each run, at most --workers at a time, which calls this program for it."""
    import submitit
    executor = submitit.AutoExecutor(args.runs_dir / args.figure / "jobs")
    executor.update_parameters(timeout_min=60 * args.slurm_hours, cpus_per_task=1, slurm_array_parallelism=args.workers)
    with executor.batch():
        return [executor.submit(submitit.helpers.CommandFunction([
            sys.executable, str(Path(__file__).resolve()), args.figure, "--scale", args.scale, "--methods", job.method,
            "--seeds", str(job.seed), "--runs-dir", str(args.runs_dir.resolve())])) for job in jobs]


def main(args: Args) -> None:
    """Print, make or hand over the runs that are missing, seed by seed, so that every method is compared early."""
    entry = FIGURES.get(args.figure, {})
    if "methods" not in entry or not set(args.methods) <= set(entry["methods"]):
        sys.exit(f"{args.figure} {' '.join(args.methods)}: no entry of figures.toml with such methods")
    jobs = [Job(args, args.figure, method, seed) for seed in args.seeds or entry[args.scale]["seeds"]
            for method in args.methods or entry["methods"]]
    if args.dry_run:
        print("\n".join("done: " * job.csv.exists() + job.typed for job in jobs))
        return
    for job in jobs:
        if not job.csv.exists() and job.has_ended():                   # this program was killed before it kept it
            job.keep()
    missing = {job.folder: job for job in jobs if not job.csv.exists()}
    needed = {job.needs.folder: job.needs for job in missing.values() if job.needs and not job.needs.has_ended()}
    print(f"{len(jobs)} runs, {len(missing)} of them missing; {len(needed)} come first, as others start from them")
    if args.launcher == "local":
        sys.exit("\n".join(work(list((needed | missing).values()), args.workers)) or None)
    if needed:
        sys.exit("first: " + " ".join(f"{job.folder.parent.name} --methods {job.method}" for job in needed.values()))
    print("\n".join(f"SLURM job {handed.job_id}" for handed in hand_over(args, list(missing.values()))))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
