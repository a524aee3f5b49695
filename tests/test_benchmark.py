"""The benchmark programs: plain commands, nothing lost and nothing repeated, tables and verdicts by hand."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import numpy.lib.recfunctions  # noqa: F401
import pytest
from conftest import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402
import run  # noqa: E402
import speed  # noqa: E402

TINY = {"title": "Tiny", "script": "tabular_em.py", "flags": "--env grid --trials 1 --checkpoint-every 2000",
        "methods": {"em": "--method em", "sp": "--method sp", "bad": "--num-policies 99"}, "measure": "mean_return",
        "expected": ["em > sp"], "laptop": {"steps": 8_000, "seeds": [1, 2]},
        "paper": {"steps": 16_000, "seeds": [1], "flags": "--eval-every 8000", "own": {"em": "--num-policies 3"}}}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(run.FIGURES, "tiny", TINY)


def test_every_figure_expands_to_commands_that_parse():
    seen = set()
    for name, figure in run.FIGURES.items():
        assert figure["title"]
        if "same_runs_as" in figure:
            assert "methods" in run.FIGURES[figure["same_runs_as"]]
        elif "command" in figure:
            assert (ROOT / figure["command"].split()[1]).exists()
        else:
            shown = set(figure["methods"])
            if "compared_with" in figure:
                others = run.FIGURES[figure["compared_with"]]["methods"]
                assert set(figure.get("compared_methods", ())) <= set(others), name
                shown |= set(figure.get("compared_methods", others))
            for claim in figure["expected"]:
                assert set(claim.split(" > ")) <= shown, (name, claim)
            for scale in ("laptop", "paper"):
                assert figure[scale]["hours"]
                for job in run.jobs_of(run.Args(name, scale=scale)):
                    module = __import__(job.script.removesuffix(".py"))
                    args = module.tyro.cli(module.Args, args=[str(ROOT) if "*" in f else f for f in job.flags])
                    assert 0.8 * job.steps <= args.total_timesteps <= 1.2 * job.steps      # rounded to whole M-steps
                    seen.add(job.script)
    assert seen == {path.name for path in SCRIPTS} - {"tabular_em.py"}


@pytest.mark.parametrize("figure, method, expected", [                 # the papers' appendices, by way of the presets
    ("em-4", "em", dict(num_policies=4, m_step_size=50_000, hidden_sizes=(64, 64), batch_size=128, lr=3e-3)),
    ("em-5-left", "em", dict(hidden_sizes=(400, 300), batch_size=1_000, update_every=3, m_step_size=200_000)),
    ("em-5-right", "surgery", dict(hidden_sizes=(800, 600), update_every=5)),
    ("picor-table1", "mtsac", dict(hidden_sizes=(512, 512), block_steps=1_000, total_timesteps=2_400_000)),
    ("picor-table2-mt10", "ada-only", dict(hidden_sizes=(512, 512), correction=False, adaptive_weights=True)),
    ("a2c-table2", "vanilla", dict(total_timesteps=6_000_000)),
])
def test_the_papers_scale_has_the_papers_settings(figure, method, expected):
    job = run.jobs_of(run.Args(figure, scale="paper", methods=(method,)))[0]
    module = __import__(job.script.removesuffix(".py"))
    args = module.tyro.cli(module.Args, args=job.flags)
    assert {name: getattr(args, name) for name in expected} == expected


def test_jobs_come_seed_by_seed_with_the_flags_of_entry_method_and_scale(tiny):
    jobs = run.jobs_of(run.Args("tiny"))
    assert [job.folder.name for job in jobs] == ["em-s1", "sp-s1", "bad-s1", "em-s2", "sp-s2", "bad-s2"]
    job, = run.jobs_of(run.Args("tiny", scale="paper", methods=("em",)))
    assert " ".join(job.flags) == ("--env grid --trials 1 --checkpoint-every 2000 --method em --eval-every 8000 "
                                   "--num-policies 3 --seed 1 --total-timesteps 16000")
    for arguments, says in ((("nothing",), "there are em-2"), (("qmp-6",), "runs of qmp-4-reacher"),
                            (("tiny", "laptop", 0), "at least 1")):
        with pytest.raises(ValueError, match=says):
            run.Args(*arguments)
    with pytest.raises(ValueError, match="em, sp, bad; got em ppt"):
        run.Args("tiny", methods=("em", "ppt"))


def runner(tmp_path, *arguments, steps=8_000):
    """benchmark/run.py as a process, with the tiny figure among the others."""
    figure = TINY | {"laptop": {"steps": steps, "seeds": [1, 2]}}
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'benchmark')!r}); import run, tyro; "
            f"run.FIGURES['tiny'] = {figure!r}; run.main(tyro.cli(run.Args))")
    return subprocess.Popen([sys.executable, "-c", code, "tiny", "--runs-dir", str(tmp_path), *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_runner_loses_nothing_and_repeats_nothing_and_failures_stop_nobody(tmp_path):
    first = runner(tmp_path, "--workers", "1", "--seeds", "1")
    folder = tmp_path / "tiny"
    while not (folder / "em-s1" / "finished").exists() or not list(folder.glob("sp-s1/*/checkpoint.pt")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)                                       # in the middle of the second run
    first.communicate()
    done = (folder / "em-s1" / "log.txt").stat().st_mtime_ns
    second = runner(tmp_path, "--workers", "2", "--seeds", "1")
    output, _ = second.communicate()
    assert second.returncode == 1 and "3 runs, 1 of them finished before" in output
    assert re.search(r"these runs failed:\nbad-s1 \(status 2: see \S+log.txt\)$", output.strip())
    assert (folder / "em-s1" / "log.txt").stat().st_mtime_ns == done           # not touched again
    assert len(list(folder.glob("sp-s1/grid*"))) == 1                          # one run folder: it was resumed
    about = json.loads(next(folder.glob("sp-s1/*/args.json")).read_text())
    assert len(about["commands"]) == 2 and "--resume" in about["commands"][1]
    rows = (next(folder.glob("sp-s1/*/metrics.csv"))).read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == sorted({int(row.split(",")[0]) for row in rows})
    third = runner(tmp_path, "--seeds", "1", "--dry-run")
    assert third.communicate()[0].count("finished: ") == 2


def test_ctrl_c_stops_the_runner_and_its_runs_and_other_flags_are_refused(tmp_path):
    folder = tmp_path / "tiny"
    first = runner(tmp_path, "--workers", "1", "--seeds", "2", steps=4_000_000)        # too many to be done in time
    while not list(folder.glob("em-s2/*/checkpoint.pt")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)                                # as a terminal sends it: to all processes
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "stopped" in output and "Traceback" not in output
    assert not (folder / "sp-s2").exists()                             # none of the others was started
    other = runner(tmp_path, "--scale", "paper", "--seeds", "2")
    output, _ = other.communicate()
    assert other.returncode == 1 and "em-s2 holds a run with other flags; give another --runs-dir" in output
    assert "--num-policies 3" in output and not list(folder.glob("bad-s2"))


def test_a_run_is_made_by_one_process_and_ends_with_its_runner(tmp_path):
    folder, arguments = tmp_path / "tiny", ("--seeds", "2", "--methods", "em")
    first = runner(tmp_path, *arguments, steps=4_000_000)
    while not list(folder.glob("em-s2/*/checkpoint.pt")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    output, _ = runner(tmp_path, *arguments, steps=4_000_000).communicate(timeout=60)
    assert "these runs failed:\nem-s2 (another process is making it)" in output
    assert len(list(folder.glob("em-s2/grid*"))) == 1 and first.poll() is None
    first.terminate()                                                  # the runner alone, as a cluster or `kill` does
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "stopped, and the runs with it" in output
    with open(folder / "em-s2" / "lock") as lock:
        run.fcntl.flock(lock, run.fcntl.LOCK_EX | run.fcntl.LOCK_NB)           # its run is gone
    assert not (folder / "em-s2" / "finished").exists()
    first = runner(tmp_path, *arguments, steps=4_000_000)
    log = folder / "em-s2" / "log.txt"
    while log.read_text().count("writing to") + log.read_text().count("going on") < 2:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.kill()                                                       # so that it cannot stop its run
    first.wait()
    output, _ = runner(tmp_path, *arguments, steps=4_000_000).communicate(timeout=60)
    assert "another process is making it" in output
    os.killpg(first.pid, signal.SIGKILL)


def test_a_run_starts_from_anothers_only_when_that_is_finished(tmp_path):
    job = run.jobs_of(run.Args("a2c-table2-distillation", runs_dir=tmp_path / "my runs", seeds=(2,)))[0]
    source = tmp_path / "my runs" / "a2c-table2" / "scratch-s2"
    for name in ("cheetah__1", "cheetah__2"):                          # the first was killed before a checkpoint
        (source / name).mkdir(parents=True)
    (source / "cheetah__2" / "checkpoint.pt").touch()
    assert "holds no finished run; first: python benchmark/run.py a2c-table2 --runs-dir" in job.missing()
    (source / "finished").touch()
    assert job.missing() == ""
    command = job.command()
    assert command[command.index("--teachers") + 1] == str(source / "cheetah__2")
    job.folder.parent.mkdir(parents=True)
    job.folder.touch()                                                 # a file in its place: no reason to stop others
    assert "File exists" in job.run()


def test_a_run_is_the_same_wherever_its_folder_is_and_is_reported_only_with_its_own_flags(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [tmp_path / "runs", run.Path("runs")]                              # of a job of a cluster, of a reader
    job, again = (run.jobs_of(run.Args("a2c-table1", runs_dir=name, seeds=(1,)))[0] for name in names)
    assert job.flags != again.flags and "{runs_dir}/a2c-table1-source" in job.flags_as_typed()
    job.folder.mkdir(parents=True)
    (job.folder / "flags").write_text(job.flags_as_typed() + "\n")
    assert again.differs() == ""
    again.flags.append("--lr")
    assert "holds a run with other flags" in again.differs()
    folder = tmp_path / "runs" / "tiny" / "em-s1"
    folder.mkdir(parents=True)
    (folder / "finished").touch(), (folder / "flags").write_text("--env chain\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    with pytest.raises(SystemExit, match="em-s1 holds a run with other flags"):
        report.main(report.Args("tiny", runs_dir=tmp_path / "runs"))


def test_jobs_are_handed_to_a_cluster(tmp_path, monkeypatch):
    """SLURM's place is taken by submitit's local executor; the figure is a real one, cut short."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = tmp_path / "benchmark" / "figures.toml"
    figures.parent.mkdir()
    figures.write_text("""[quick]
title = "quick"
script = "tabular_em.py"
flags = "--env grid --trials 1"
methods = { em = "--method em" }
measure = "mean_return"
expected = []
laptop = { steps = 4000, seeds = [1, 2] }
""")
    for name in ("benchmark/run.py", "tabular_em.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(run, "__file__", str(tmp_path / "benchmark" / "run.py"))
    monkeypatch.setitem(run.FIGURES, "quick", run.tomllib.loads(figures.read_text())["quick"])
    args = run.Args("quick", runs_dir=tmp_path / "runs", launcher="slurm")
    jobs = run.jobs_of(args)
    handed = run.hand_over(args, jobs, cluster="local")
    assert [job.result() is not None for job in handed] == [True, True]
    assert all(job.finished for job in jobs)
    assert len(list((tmp_path / "runs" / "quick").glob("em-s*/grid*/metrics.csv"))) == 2


# --- report ----------------------------------------------------------------------------------------------------------
def table(values, tasks=("a", "b")):
    """A metrics.csv with evaluations at 100, 200, ...; task a scores 2 less, task b 2 more than the mean."""
    names = ["global_step", "seconds", "mean_return", "mean_success"] + [
        f"{task}/{kind}" for task in tasks for kind in ("return", "success")]
    rows = [(100.0 * (k + 1), 1.0 * k, value, 0.5, value - 2, 0, value + 2, 1) for k, value in enumerate(values)]
    return np.array(rows, dtype=[(name, float) for name in names])


def test_summary_by_hand(tmp_path):
    runs = {"em": {1: table([0, 1, 2, 3, 4, 5, 6, 8]), 2: table([0, 1, 2, 3, 4, 5, 8, 10]),
                   3: table([0, 1, 2, 3, 4, 5, 7, 9])},
            "sp": {1: table([0, 0, 0, 0, 0, 0, 1, 1])}}
    figure = {"measure": "mean_return", "expected": ["em > sp"]}
    lines = report.summary(tmp_path, runs, figure).splitlines()
    assert lines[2].startswith("| em | 3 | 1 ± 0 | 3 ± 0 | 5 ± 0 | 9 ± 1 | 8 ± 1 | 8 [")
    assert lines[2].endswith("] | 4 ± 0 |")
    assert lines[3] == "| sp | 1 | 0 | 0 | 0 | 1 | 1 | 1 | 0 |"
    assert lines[5:8] == ["| return per task, last quarter | a | b |", "|---|---|---|", "| em | 6 ± 1 | 10 ± 1 |"]
    assert lines[-1] == "* em > sp: not enough runs (three seeds of both are needed)"
    assert report.interval(np.array([[1.0, 2, 3, 50]]), 1) == "2.5"            # a quarter is cut at both ends
    point, low, high = map(float, re.findall(r"[\d.]+", report.interval(np.array([[6.0, 10], [8, 12], [7, 11]]), 2)))
    assert low < point == 9.0 < high


def test_a_verdict_by_progress():
    runs = {name: {seed: np.lib.recfunctions.append_fields(
        table([0] * 4), ["a/stages", "b/stages"], [[level + seed / 10] * 4, [level] * 4], usemask=False)
        for seed in (1, 2, 3)} for name, level in (("em", 2.0), ("sp", 1.0))}
    said = report.verdict("em > sp", runs, "mean_return", "stages")
    assert said.startswith("* em > sp, in stages: last quarter agrees (difference 1, spread 0.0707), ahead on 2 of 2")
    assert "within" in report.verdict("em > sp", runs, "mean_return")


def test_tables_at_shares_and_of_statistics_by_hand(tmp_path):
    one, other = table([0, 1, 2, 3, 40]), table([0, 1, 2, 3, 60])
    with_std = np.lib.recfunctions.append_fields(one, ["a/std", "cosine"], [[1.0] * 5, [0, 0.25, np.nan, 0.5, 0.25]],
                                                 usemask=False)
    figure = {"measure": "mean_return", "expected": [], "at": [0.2, 1.0], "statistics": ["cosine"]}
    lines = report.summary(tmp_path, {"em": {1: one, 2: other}, "sp": {1: with_std}}, figure).splitlines()
    start = lines.index("| return per task, at 20% of the run | a | b |")
    assert lines[start + 2:start + 4] == ["| em | -2 ± 0 | 2 ± 0 |", "| sp | -2, 1 | 2 |"]
    start = lines.index("| return per task, at the end | a | b |")
    assert lines[start + 2:start + 4] == ["| em | 48 ± 14 | 52 ± 14 |", "| sp | 38, 1 | 42 |"]
    assert lines[-4:-1] == ["|---|---|", "| em | – |", "| sp | 0.25 |"]
    assert report.at_share({1: one}, "c", "return", 1.0, 0) == "–"             # not a task of that run


def test_curves_of_seeds_and_tasks_are_averaged_where_they_are_known():
    steps, mean, std = report.together([(np.array([0.0, 10, 20]), np.array([0.0, 10, 20])),
                                        (np.array([0.0, 5, 15]), np.array([2.0, 2, 12]))])
    assert steps.tolist() == [0, 10] and mean.tolist() == [1, 8.5]             # (0 + 2) / 2, (10 + 7) / 2
    assert std == pytest.approx([2**0.5, 4.5**0.5])                            # of two values: their gap / sqrt 2
    assert report.deviation([5.0]) == 0
    nan = np.nan                                                       # a task that is not at work keeps its last value
    assert report.mean_known([[nan, 4, nan, 6], [2, nan, 8, nan]]) == pytest.approx([2, 3, 6, 7])


def test_runs_of_another_figure_stand_beside_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(run.FIGURES, "other", {"methods": {"plain": "", "missing": ""}})
    rows = "global_step,mean_return,a/return,a/success\n10,1,1,0\n"
    for name in ("mine/new-s1.csv", "mine/plain-s9.csv", "other/plain-s2.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(rows)
    figure = {"methods": {"new": ""}, "compared_with": "other"}
    runs = report.runs_of(tmp_path / "mine", figure)
    assert {method: list(seeds) for method, seeds in runs.items()} == {"new": [1], "plain": [2]}
    assert report.place_of(tmp_path / "mine", "plain", figure) == tmp_path / "other"


@pytest.mark.parametrize("low, word", [((1, 2, 3), "agrees"), ((8, 9, 10), "within"), ((21, 22, 23), "does not agree")])
def test_verdicts_by_hand(low, word):
    runs = {"em": dict(enumerate(table([0, 0, 0, v]) for v in (9, 10, 11))),
            "sp": dict(enumerate(table([0, 0, 0, v]) for v in low))}
    said = report.verdict("em > sp", runs, "mean_return")
    assert f"em > sp: last quarter {word}" in said and f"difference {10 - np.mean(low):.3g}, spread 1.41" in said
    assert f", ahead on {2 * (np.mean(low) < 10)} of 2 tasks; whole run {word}" in said
    assert f"difference {(10 - np.mean(low)) / 4:.3g}, spread 0.354)" in said


def test_a_missing_value_is_no_verdict():
    assert "cannot be compared" in report.compared([1.0, np.nan, 2.0], [0.0, 0.0, 0.0])


def test_a_report_is_drawn_from_real_runs_and_again_from_its_results(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(run.FIGURES, "tiny", TINY | {"methods": {"em": "--method em", "sp": "--method sp"}})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tabular_em.md").write_text("before\n<!-- tiny -->\nold\n<!-- /tiny -->\nafter\n")
    args = run.Args("tiny", runs_dir=tmp_path / "runs")
    assert run.run_here(args, run.jobs_of(args)) == []
    monkeypatch.setattr(run, "ROOT", tmp_path)
    report.main(report.Args("tiny", runs_dir=tmp_path / "runs"))
    folder, page = tmp_path / "results" / "tiny", (tmp_path / "docs" / "tabular_em.md").read_text()
    names = {path.name for path in folder.iterdir()}
    assert names >= {"em-s1.csv", "sp-s2.csv", "em-s1-assignment.png", "tidy.csv", "curves.png", "tasks.png",
                     "summary.md"}
    assert "em-s2-assignment.png" not in names and "old" not in page and "em > sp: not enough runs" in page
    assert page.startswith("before") and page.endswith("after\n") and "4 runs of" in page
    about = json.loads((folder / "runs.json").read_text())["em-s1"]
    assert about["command"] == ("python tabular_em.py --env grid --trials 1 --checkpoint-every 2000 --method em "
                                "--seed 1 --total-timesteps 8000")
    assert about["versions"]["torch"] and about["steps"] == 8_000 and str(tmp_path) not in json.dumps(about)
    tidy = (folder / "tidy.csv").read_text().splitlines()
    rows = (folder / "em-s1.csv").read_text().splitlines()[1:]
    assert tidy[0] == "method,seed,global_step,task,return,success" and tidy[1].startswith("em,1,")
    assert sum(line.startswith("em,1,") for line in tidy) == 12 * len(rows)
    (folder / "curves.png").unlink()
    report.main(report.Args("tiny", runs_dir=tmp_path / "nowhere"))            # the runs are gone, the results stay
    assert (folder / "curves.png").exists() and "4 runs of 8,000 steps, at most" in capsys.readouterr().out
    monkeypatch.setitem(run.FIGURES["tiny"], "laptop", {"steps": 12_000, "seeds": [1, 2]})
    with pytest.raises(SystemExit, match="em-s1.csv is of a run with other flags"):
        report.main(report.Args("tiny", runs_dir=tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="no finished runs"):                  # another scale has results of its own
        report.main(report.Args("tiny", scale="paper", runs_dir=tmp_path / "nowhere"))
    other = report.place_of(tmp_path / "mine-paper", "x", {"methods": {}, "compared_with": "other"})
    assert other == tmp_path / "other-paper"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["qmp_sac", "em_clustering_td3", "pcgrad_sac", "dgrad_arch_sac", "multitask_a2c",
                                    "picor_sac", "iqn_em_atari"])
def test_what_speed_measures_still_runs(script, monkeypatch, capsys):
    def once(functions, repetitions=15):
        for function in functions.values():
            function()
        return {name: 2.0 for name in functions}                       # milliseconds
    monkeypatch.setattr(speed, "milliseconds", once)
    monkeypatch.setattr(speed, "whole_run", lambda *a, **k: None)          # a run as a user makes it: tested elsewhere
    getattr(speed, script)()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) >= 4 and all(re.fullmatch(r"\| .+ \| .*\d.* \|", row) for row in rows), rows
