"""The benchmark programs: verdicts that keep their promise, equal steps, runs that are neither lost nor repeated."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import compare
import numpy as np
import pytest
import run
from conftest import ROOT

RUNNER = [sys.executable, "benchmark/run.py"]
METHODS = {name: entry["methods"] for name, entry in run.FIGURES.items() if "methods" in entry}


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_speaks_of_what_exists_and_its_commands_parse(name):
    entry = run.FIGURES[name]
    beside = [other.split("/") for other in entry.get("beside", [])]
    assert all(label in METHODS[figure] for figure, label in beside) and entry["yardstick"]
    known = {*METHODS[name], *(label for _, label in beside)}
    assert all(set(claim.split(" > ")) <= known for claim in entry["claims"])
    module = __import__(entry["script"].removesuffix(".py"))
    for scale, method in ((scale, method) for scale in ("laptop", "paper") for method in METHODS[name]):
        command = run.Job(run.Args(name, scale=scale), name, method, 1).command
        module.tyro.cli(module.Args, args=[word.replace("{needs}", str(ROOT)) for word in command[2:]])


# --- compare.py ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("better, worse, said", [
    ([5, 6, 7], [1, 2, 3], "agrees (interval 1.73 to 6.27)"), ([1, 2, 3], [5, 6, 7], "contradicts (interval -6.27 to"),
    ([1, 2, 3], [1, 2, 3.5], "open (interval"), ([4], [1, 2, 3], "one seed (difference 2)"),
    ([0, 0, 0], [0, 0, 0], "open"), ([2, 2, 2], [1, 1, 1], "agrees"), ([np.nan, 1, 2], [1, 2, 3], "open")])
def test_verdicts(better, worse, said):
    assert compare.verdict(np.array(better, float), np.array(worse, float)).startswith(said)


def test_runs_of_other_length_and_number_of_tasks_meet_at_equal_steps_per_trained_task(tmp_path):
    for name, tasks, end, rise in (("two-1", ["a", "b"], 161, 1.1), ("two-2", ["a", "b"], 161, 1.2),
                                   ("one-1", ["a"], 41, 2.1), ("one-2", ["a"], 41, 2.2)):     # 80 and 40 steps per task
        (tmp_path / name).mkdir()
        rows = [[step, *[rise * step / len(tasks)] * 3] for step in range(10 * len(tasks), end, 10)]
        header = "global_step,mean_return,a/return,b/return"
        np.savetxt(tmp_path / name / "metrics.csv", rows, delimiter=",", comments="", header=header)
        (tmp_path / name / "args.json").write_text(json.dumps({"args": {"tasks": tasks}}))
    out = tmp_path / "out"
    compare.main(compare.Args((f"two={tmp_path}/two-*", f"one={tmp_path}/one-1,{tmp_path}/one-2"), out=out))
    said = (out / "summary.md").read_text(encoding="utf-8")
    assert "Up to 40 steps per trained task; the longest run has 80." in said and "success" not in said
    assert "| two | 2 | last quarter | 46.00 ± 2.83 | 46.00" in said                # 1.15 x 40, of 10, 20, 30 and 40
    assert "| two | 2 | whole run | 28.75 ± 1.77 |" in said and (out / "return.png").exists()
    assert "| one | 2 | whole run | 53.75 ± 1.77 [17.39, 32.61] |" in said        # 25 and 4.3027 x 1.7678


# --- run.py ----------------------------------------------------------------------------------------------------------
SCRIPT = """import json, signal, sys, time
from pathlib import Path
flags, stop = dict(zip(sys.argv[1::2], sys.argv[2::2])), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
run = Path(flags.get("--resume") or flags["--runs-dir"] + "/run")
if "--resume" not in flags:
    run.mkdir(parents=True)
    args = {"total_timesteps": int(flags["--total-timesteps"]), "tasks": ["a"], "source": flags.get("--source")}
    (run / "args.json").write_text(json.dumps({"args": args, "versions": {"torch": "1", "other": "2"}}))
    (run / "checkpoint.pt").write_text("0")
total, step = json.loads((run / "args.json").read_text())["args"]["total_timesteps"], 0
while step < total and not stop:
    time.sleep(0.01)
    step += 1
if step == total:
    (run / "metrics.csv").write_text(f"global_step,seconds\\n{total},3600")
sys.exit(143 if stop else total == 13)
"""
TOML = """
[first]
script = "toy.py"
methods = { slow = "--total-timesteps 200", bad = "--total-timesteps 13" }
laptop.seeds = [1, 2]
[second]
script = "toy.py"
methods.own = "--source {needs}"
needs = "first/slow"
laptop = { seeds = [1], steps = 5 }
"""


@pytest.fixture
def runner(tmp_path):
    """run.py as a process, in a folder with a toy script and two figures."""
    (tmp_path / "benchmark").mkdir()
    for name, text in (("toy.py", SCRIPT), ("benchmark/figures.toml", TOML),
                       ("benchmark/run.py", (ROOT / "benchmark" / "run.py").read_text(encoding="utf-8"))):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return partial(subprocess.Popen, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that a run could answer")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_runner_stops_its_runs_and_goes_on_with_them(runner, tmp_path, number):
    results, run_folder = tmp_path / "benchmark" / "results" / "first", tmp_path / "runs" / "first" / "slow-s1" / "run"
    first = runner([*RUNNER, "first", "--methods", "slow", "--seeds", "1"])
    while not (run_folder / "checkpoint.pt").exists():
        time.sleep(0.02)
    first.send_signal(number)
    assert "stopped; the same command goes on" in first.communicate(timeout=60)[0] and first.returncode == 1
    assert not (run_folder / "metrics.csv").exists() and not results.exists()      # stopped before any evaluation
    output = runner([*RUNNER, "first"]).communicate(timeout=60)[0]             # goes on with one, makes three; two fail
    assert "4 runs, 4 of them missing" in output and output.count("ended with status 1: see log.txt there") == 2
    assert {file.name for file in results.iterdir()} == {"slow-s1.csv", "slow-s2.csv", "runs.json"}
    about = json.loads((results / "runs.json").read_text())["slow-s1"]
    assert about["command"] == "python toy.py --total-timesteps 200 --seed 1" and about["hours"] == 1.0
    assert runner([*RUNNER, "first", "--dry-run"]).communicate()[0].count("done: ") == 2


def test_a_run_that_others_start_from_is_made_first(runner, tmp_path):
    assert "1 runs, 1 of them missing; 1 come first" in runner([*RUNNER, "second"]).communicate(timeout=60)[0]
    about = json.loads((tmp_path / "runs" / "second" / "own-s1" / "run" / "args.json").read_text())
    assert about["args"]["source"] == str(tmp_path.resolve() / "runs" / "first" / "slow-s1" / "run")
    assert (tmp_path / "benchmark" / "results" / "first" / "slow-s1.csv").exists()
