"""What every script promises, whatever its algorithm: one floor plan, exact resumption, clear errors, no loose ends."""
import ast
import importlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# A run of seconds that passes the first update, several evaluations and several checkpoints
MT_QUICK = ("--tasks reach drawer-close --horizon 30 --total-timesteps 720 --learning-starts 60 --hidden-sizes 16 16 "
            "--batch-size 8 --eval-every 120 --eval-episodes 1 --checkpoint-every 120 --watch-every 3")
QUICK = {
    "qmp_sac.py": "--tasks 0 4 8 --total-timesteps 6000 --train-every 100 --learning-starts 200 --gradient-steps 3 "
                  "--hidden-size 16 --batch-size 16 --eval-every 900 --eval-episodes 1 --checkpoint-every 600",
    "tabular_em.py": "--trials 3 --total-timesteps 200000 --eval-every 30000 --checkpoint-every 20000",
    "em_clustering_td3.py": "--num-policies 2 --total-timesteps 7200 --m-step-size 600 --learning-starts 100 "
                            "--update-every 3 --batch-size 16 --hidden-sizes 16 16 --eval-every 600 --eval-episodes 1 "
                            "--evals-per-m-step 2 --checkpoint-every 400",
    "pcgrad_sac.py": MT_QUICK, "dgrad_arch_sac.py": MT_QUICK,
    "multitask_a2c.py": "--tasks SmallFoot BigLeg --num-envs 2 --total-timesteps 3200 --eval-every 640 "
                        "--eval-episodes 1 --checkpoint-every 300 --hidden-size 8",
    "picor_sac.py": "--total-timesteps 1200 --horizon 20 --block-steps 30 --learning-starts 25 --hidden-sizes 16 16 "
                    "--batch-size 16 --eval-every 200 --eval-episodes 1 --checkpoint-every 130 --correction-states 8 "
                    "--weight-warmup 2",
    "distill_a2c.py": "--tasks SmallFoot BigLeg --num-envs 2 --total-timesteps 3200 --eval-every 640 --eval-episodes 1 "
                      "--checkpoint-every 300 --hidden-size 8 --teacher-timesteps 400 --p-student 0.5",
    "iqn_em_atari.py": "--preset laptop --games DemonAttack Assault --total-timesteps 960 --m-step-size 80 --horizon 40"
                       " --eval-steps 1 --eval-episodes 1 --learning-starts 20 --batch-size 4 --width 0.0625 "
                       "--eval-every 160 --checkpoint-every 120 --num-quantiles 4 4 4 --buffer-size 300",
}
TOTAL = {script: int(re.search(r"--total-timesteps (\d+)", flags)[1]) for script, flags in QUICK.items()}
RESTARTS_EXACTLY = {"qmp_sac.py", "tabular_em.py", "em_clustering_td3.py",
                    "multitask_a2c.py", "distill_a2c.py", "picor_sac.py"}  # their simulators give their whole state
FULL_AT = 0.8                                             # of the last checkpoint: the first fits, a later one does not
DIVERGES = {"qmp_sac.py": "--lr 1 --gradient-steps 200",  # a step this long overflows float32 after a few updates
            "multitask_a2c.py": "--lr 1 --max-grad-norm 0 --value-coef 1e38 --checkpoint-every 10",
            "distill_a2c.py": "--lr 1 --max-grad-norm 0 --value-coef 1e38 --checkpoint-every 10",
            "picor_sac.py": "--lr 1 --hidden-sizes 64 64 64 64 --total-timesteps 4000",
            "pcgrad_sac.py": "--lr 1 --critic-lr 1 --max-grad-norm 0 --hidden-sizes 64 64 64 64",
            "dgrad_arch_sac.py": "--lr 1 --critic-lr 1 --max-grad-norm 0 --hidden-sizes 64 64 64 64"}
every_script = pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
# Scripts whose loop and blocks others share word for word: what takes whole runs is left to `-m slow` for them
SISTERS = {"pcgrad_sac.py", "dgrad_arch_sac.py", "picor_sac.py", "distill_a2c.py", "iqn_em_atari.py"}
most_scripts = pytest.mark.parametrize("script", [pytest.param(path.name, marks=pytest.mark.slow)
                                                  if path.name in SISTERS else path.name for path in SCRIPTS])


def module_of(script):
    return importlib.import_module(script.removesuffix(".py"))


def run_here(script, arguments, monkeypatch):
    """What `python SCRIPT ARGUMENTS` does, in this process: fast, and with the same exit status."""
    module = module_of(script)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments)])
    module.run_script(module.Args, module.train)


def only_run(folder):
    run, = folder.iterdir()
    return run


def metrics(run):
    """metrics.csv without the column `seconds`, the one thing that differs between equal runs."""
    return [row.split(",")[:1] + row.split(",")[2:] for row in (run / "metrics.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    """One uninterrupted quick run per script, made when first asked for."""
    made = {}

    def get(script):
        if script not in made:
            folder = tmp_path_factory.mktemp("straight")
            with pytest.MonkeyPatch.context() as monkeypatch:
                run_here(script, f"{QUICK[script]} --runs-dir {folder}", monkeypatch)
            made[script] = only_run(folder)
        return made[script]
    return get


# --- a script alone ------------------------------------------------------------------------------------------------
@every_script
def test_file_alone_in_an_empty_folder(script, command_line, tmp_path, straight_run):
    result = command_line(script, *QUICK[script].split())
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path / "runs")
    assert re.fullmatch(rf"[\w-]+__{script[:-3]}__[\w-]+__s1__\d+-\d+", run.name)
    names = {path.name for path in run.iterdir()}
    assert names >= {"args.json", "metrics.csv", "checkpoint.pt", "curves.png"} and not any("tmp" in n for n in names)
    about = json.loads((run / "args.json").read_text())
    assert about["args"]["total_timesteps"] == TOTAL[script] and about["versions"]["torch"] and about["commands"]
    assert "steps/s" in result.stdout and run.name in result.stdout.splitlines()[-1]
    assert metrics(run) == metrics(straight_run(script))  # the same seed in another process: the same numbers
    header = metrics(run)[0]
    assert header[:3] == ["global_step", "mean_return", "mean_success"] and header[3].endswith("/return")


@every_script
def test_two_runs_of_the_same_second_have_a_folder_each(script, tmp_path, monkeypatch):
    module = module_of(script)
    monkeypatch.setattr(module.time, "strftime", lambda form: "20260101-000000")
    runs = [module.Run(module.Args(runs_dir=tmp_path), ["a"]) for _ in range(3)]
    for run in reversed(runs):                            # each gives the signals back to the one before it
        run.close()
    assert [run.dir.name.rpartition("__")[2] for run in runs] == [f"20260101-000000{end}" for end in ("", "-2", "-3")]


@every_script
def test_every_logged_key_is_documented(script, straight_run):
    events = EventAccumulator(str(straight_run(script)))
    events.Reload()
    page = (ROOT / "docs" / script.replace(".py", ".md")).read_text()
    documented = [re.escape(key).replace("<task>", r"[\w-]+") for key in re.findall(r"^\| `([^`]+)`", page, re.M)]
    keys = events.Tags()["scalars"]
    undocumented = [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in documented)]
    assert keys and not undocumented
    for key in ("charts/SPS", "eval/mean_return", "eval/mean_success"):
        assert key in keys


@most_scripts
def test_another_seed_gives_other_numbers(script, tmp_path, monkeypatch, straight_run):
    run_here(script, f"{QUICK[script]} --seed 2 --runs-dir {tmp_path}", monkeypatch)
    assert metrics(only_run(tmp_path)) != metrics(straight_run(script))


# --- stop and go on ------------------------------------------------------------------------------------------------
def start_and_wait(script, command_line, folder, rows, extra=()):
    """Start a quick run as a process of its own; return it once its metrics.csv has `rows` lines."""
    process = command_line(script, *QUICK[script].split(), "--runs-dir", folder, *extra, wait=False)
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        found = list(Path(folder).glob("*/metrics.csv"))
        if found and len(found[0].read_text().splitlines()) >= rows:
            return process
        time.sleep(0.005)
    raise AssertionError(process.communicate())


@every_script
def test_killed_and_resumed_equals_straight(script, command_line, tmp_path, monkeypatch, straight_run):
    process = start_and_wait(script, command_line, tmp_path / "runs", rows=4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = only_run(tmp_path / "runs")
    reached = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    assert 0 < reached < TOTAL[script]
    run_here(script, f"--resume {run}", monkeypatch)
    if script in RESTARTS_EXACTLY:
        assert metrics(run) == metrics(straight_run(script))
    assert len(metrics(run)) == len(metrics(straight_run(script)))


@most_scripts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(script, number, command_line, tmp_path, monkeypatch, straight_run):
    process = start_and_wait(script, command_line, tmp_path / "runs", rows=3, extra=["--checkpoint-every", "1000000"])
    process.send_signal(number)
    output, errors = process.communicate()
    run = only_run(tmp_path / "runs")
    assert process.returncode == 128 + number and not errors, errors
    assert f"--resume {run}" in output.splitlines()[-1] and (run / "curves.png").exists()
    assert 0 < torch.load(run / "checkpoint.pt", weights_only=True)["global_step"] < TOTAL[script]
    run_here(script, f"--resume {run}", monkeypatch)
    if script in RESTARTS_EXACTLY:
        assert metrics(run) == metrics(straight_run(script))


@most_scripts
def test_a_longer_run_continues_a_finished_one(script, tmp_path, monkeypatch, straight_run, capsys):
    evaluated = int(metrics(straight_run(script))[4][0])  # stop where the straight run has a row
    run_here(script, f"{QUICK[script]} --total-timesteps {evaluated} --runs-dir {tmp_path}", monkeypatch)
    run = only_run(tmp_path)
    run_here(script, f"--resume {run}", monkeypatch)      # nothing left to do
    assert len(metrics(run)) == 5 and "run folder" in capsys.readouterr().out
    run_here(script, f"--resume {run} --total-timesteps {TOTAL[script]}", monkeypatch)
    if script in RESTARTS_EXACTLY:
        assert metrics(run) == metrics(straight_run(script))
    assert len(json.loads((run / "args.json").read_text())["commands"]) == 3


def same(one, other) -> bool:
    """Whether two checkpoints' entries hold the same numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7)) if isinstance(one, torch.Tensor) else one == other


@every_script
def test_resuming_restores_all_that_was_saved(script, tmp_path, monkeypatch, straight_run):
    run = tmp_path / "run"
    shutil.copytree(straight_run(script), run)
    states = [torch.load(run / "checkpoint.pt", weights_only=True)]
    run_here(script, f"--resume {run}", monkeypatch)      # nothing left to do but to save again
    states.append(torch.load(run / "checkpoint.pt", weights_only=True))
    drawn_anew = set() if script in RESTARTS_EXACTLY else {"world", "numpy", "torch", "replay"}       # fresh episodes
    assert states[0].keys() == states[1].keys()
    for key in states[0].keys() - {"seconds", "args"} - drawn_anew:
        assert same(states[0][key], states[1][key]), key


@most_scripts
def test_a_full_disk_costs_no_checkpoint(script, command_line, tmp_path, monkeypatch, straight_run):
    limit = int((straight_run(script) / "checkpoint.pt").stat().st_size * FULL_AT)
    result = command_line(script, *QUICK[script].split(), "--runs-dir", tmp_path / "runs",
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    run = only_run(tmp_path / "runs")
    assert result.returncode == 1 and "checkpoint.pt" in result.stderr and f"--resume {run}" in result.stderr
    assert "Traceback" not in result.stderr and not list(run.glob("*.tmp"))
    run_here(script, f"--resume {run}", monkeypatch)
    if script in RESTARTS_EXACTLY:
        assert metrics(run) == metrics(straight_run(script))


@pytest.mark.slow
@every_script
def test_twenty_kills_at_random_moments_lose_nothing(script, command_line, tmp_path, straight_run):
    """One run, killed with SIGKILL after random times until it gets through; each new process resumes it."""
    draw, kills = random.Random(0), 0
    arguments = [*QUICK[script].split(), "--runs-dir", tmp_path / "runs"]
    while kills < 20:
        process = command_line(script, *arguments, wait=False)
        while process.poll() is None and not list(tmp_path.glob("runs/*/checkpoint.pt")):
            time.sleep(0.01)                              # the first one is written before the first step
        if list(tmp_path.glob("runs/*/metrics.csv")):
            time.sleep(2.0)                               # imports
        time.sleep(draw.uniform(0, 3.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        run = only_run(tmp_path / "runs")
        step = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
        if step >= TOTAL[script]:                                  # got through: start another
            assert len(metrics(run)) == len(metrics(straight_run(script)))
            assert metrics(run) == metrics(straight_run(script)) or script not in RESTARTS_EXACTLY
            shutil.rmtree(run)
            arguments = [*QUICK[script].split(), "--runs-dir", tmp_path / "runs"]
        else:
            arguments = ["--resume", run]
    if arguments[0] == "--resume":
        assert command_line(script, *arguments).returncode == 0
        assert metrics(run) == metrics(straight_run(script)) or script not in RESTARTS_EXACTLY


# --- evaluate ------------------------------------------------------------------------------------------------------
@every_script
def test_evaluate_writes_nothing_but_the_picture_asked_for(script, straight_run, monkeypatch, capsys, tmp_path):
    run = straight_run(script)
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    run_here(script, f"--evaluate {run} --eval-episodes 2", monkeypatch)
    assert re.search(r"\(\d+ episodes each\)", capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    run_here(script, f"--evaluate {run} --eval-episodes 1 --capture-video", monkeypatch)
    assert {path.name for path in set(run.iterdir()) - set(before)} == {"tasks.gif"}
    with Image.open(run / "tasks.gif") as film:
        first = film.convert("RGB").tobytes()
        film.seek(film.n_frames - 1)
        assert film.n_frames >= 4 and film.convert("RGB").tobytes() != first
    (run / "tasks.gif").unlink()
    filmed, about = tmp_path / "filmed", json.loads((run / "args.json").read_text())
    shutil.copytree(run, filmed)                          # a run that was asked for a picture after training
    (filmed / "args.json").write_text(json.dumps(about | {"args": about["args"] | {"capture_video": True}}))
    run_here(script, f"--evaluate {filmed} --eval-episodes 1", monkeypatch)
    assert not (filmed / "tasks.gif").exists()


@pytest.mark.parametrize("script, every", [("pcgrad_sac.py", 60), ("dgrad_arch_sac.py", 60), ("picor_sac.py", 40)])
def test_evaluating_more_often_changes_no_training_number(script, every, tmp_path, monkeypatch, straight_run):
    run_here(script, f"{QUICK[script]} --eval-every {every} --runs-dir {tmp_path}", monkeypatch)
    often, seldom = (torch.load(run / "checkpoint.pt", weights_only=True)
                     for run in (only_run(tmp_path), straight_run(script)))
    assert len(metrics(only_run(tmp_path))) > len(metrics(straight_run(script))) + 3
    assert same(often["learners"], seldom["learners"]) and same(often["buffer"], seldom["buffer"])


# --- bad input -----------------------------------------------------------------------------------------------------
BAD = [
    ("--env nowhere", "Expected one of"), ("--method nothing", "nothing"),
    ("--seed -1", "--seed must be from 0"), ("--seed 4294967296", "--seed must be from 0"),
    ("--total-timesteps 0", "--total-timesteps must be"), ("--total-timesteps -5", "at least 1"),
    ("--total-timesteps many", "many"), ("--no-such-flag 1", "no-such-flag"),
    ("--lr 0", "--lr must be"), ("--gamma 1.5", "--gamma must be"),
    ("--resume {missing}", "args.json"), ("--evaluate {missing}", "args.json"),
    ("--resume {other_script}", "other_script.py"), ("--evaluate {other_script}", "other_script.py"),
    ("--resume {other_version}", "args.json"), ("--resume {run} --seed 5", "--seed 1, not 5"),
    ("--resume {run} --total-timesteps 300", "larger --total-timesteps"),
    ("--resume {damaged}", "damaged"), ("--evaluate {damaged}", "damaged"), ("--resume {empty}", "no checkpoint.pt"),
    ("--runs-dir {file}", "--runs-dir"), ("--resume {run} --evaluate {run}", "give one of them"),
]


MT_BAD = [("--tasks drawer", "drawer-open"), ("--tasks reach-v3", "close: reach"), ("--tasks reach reach", "different"),
          ("--horizon 501", "from 1 to 500"), ("--num-goals 0", "from 1 to 50"), ("--hidden-sizes 0", "at least 1"),
          ("--batch-size 0", "--batch-size must be"), ("--critic-lr 2", "--critic-lr must be"),
          ("--resume {run} --tasks reach push", "--tasks")]
BAD_FOR = {
    "qmp_sac.py": [("--batch-size 0", "--batch-size must be"), ("--tasks 0 10", "indices from 0 to 9"),
                   ("--tasks 3 3", "different indices"), ("--method shared --batch-size 5", "use at least 10"),
                   ("--resume {run} --method separated", "--method qmp, not separated")],
    "tabular_em.py": [("--num-policies 13", "from 1 to 12"), ("--env chain --num-policies 11", "from 1 to 10"),
                      ("--num-policies 0", "from 1 to 12"), ("--trials 0", "--trials must be"),
                      ("--method sp --num-policies 2", "leave --num-policies out"), ("--chain-reward none", "none"),
                      ("--evals-per-m-step 3", "let --evals-per-m-step divide it"),
                      ("--resume {run} --env chain", "--env grid, not chain")],
    "em_clustering_td3.py": [("--num-policies 8", "from 1 to 7"), ("--num-policies 0", "from 1 to 7"),
                             ("--flat-ground", "--env legs"),
                             ("--method ppt --num-policies 4", "leave --num-policies out"), ("--hidden-sizes 64", "64"),
                             ("--hidden-sizes 0 4", "at least 1"),
                             ("--action-scale 3", "at most 2"), ("--env track --action-scale 2", "at most 1"),
                             ("--evals-per-m-step 7", "let --evals-per-m-step divide it"),
                             ("--evals-per-m-step 0", "--evals-per-m-step must be"),
                             ("--method sp --evals-per-m-step 300000", "cannot be split into 300000"),
                             ("--exploration-noise nan", "--exploration-noise must be"),
                             ("--resume {run} --method random-clusters", "--method em, not random-clusters")],
    "pcgrad_sac.py": [*MT_BAD, ("--tasks reach", "at least two tasks"), ("--combine product", "product"),
                      ("--method sac --heads", "--method multihead"), ("--method sac --tasks", "at least one"),
                      ("--resume {run} --method sac", "--method pcgrad, not sac")],
    "multitask_a2c.py": [("--tasks SmallNose", "BigTorso"), ("--tasks SmallFoot SmallFoot", "different"),
                         ("--method finetune", "--finetune-from RUN_FOLDER"), ("--num-steps 3", "must divide"),
                         ("--source-task SmallFoot", "go with --method finetune"),
                         ("--value-coef nan", "at least 0 and finite"),
                         ("--method finetune --tasks BigLeg --finetune-from {missing}", "no args.json"),
                         ("--method finetune --tasks BigLeg --finetune-from {other_script}", "other_script.py"),
                         ("--method finetune --tasks BigLeg --finetune-from {run} --source-task BigFoot", "SmallFoot"),
                         ("--resume {run} --share first-layer", "--share paper, not first-layer")],
    "distill_a2c.py": [("--tasks SmallNose", "BigTorso"), ("--method single", "--tasks SmallFoot"),
                       ("--p-student 1.5", "from 0 to 1"), ("--teachers {missing}", "no args.json"),
                       ("--teachers {other_script}", "other_script.py"),
                       ("--max-grad-norm inf", "at least 0 and finite"),
                       ("--teacher-timesteps 0", "--teacher-timesteps"),
                       ("--teachers {run}/teachers", "BigFoot, SmallLeg"), ("--loss l1", "l1"),
                       ("--resume {run} --kl student_teacher", "--kl teacher_student")],
    "picor_sac.py": [("--tasks nowhere", "north-east"), ("--tasks north-east north-east", "different"),
                     ("--c 0.1", "--c must be at most 0"),
                     ("--critic-heads --critic-batch active", "--critic-batch all"),
                     ("--alpha-all --no-correction", "phase 2"), ("--alpha-all --method mtsac", "phase 2"),
                     ("--method mtsac --mtsac-batch active --critic-heads", "--mtsac-batch mixed"),
                     ("--env mt4 --horizon 501", "from 1 to 500"), ("--num-goals 0", "from 1 to 50"),
                     ("--batch-size 3", "use at least 4"), ("--penalty -1", "--penalty must be"),
                     ("--weight-tau 0", "--weight-tau must be"),
                     ("--resume {run} --no-correction", "--correction True, not False")],
    "iqn_em_atari.py": [("--games MsPacMen", "close: MsPacman"), ("--games Alien alien", "different"),
                        ("--games", "one or more"),
                        ("--method ppt --num-policies 4", "leave --num-policies out"),
                        ("--num-policies 13", "from 1 to 12"), ("--num-quantiles 8 0 8", "at least 1"),
                        ("--width 0", "--width must be"), ("--buffer-size 7", "--buffer-size must be"),
                        ("--epsilon 2", "--epsilon must be"), ("--horizon 0", "--horizon must be"),
                        ("--buffer-size 1000000000 --total-timesteps 1000000000000", "--preset laptop"),
                        ("--resume {run} --preset gin", "--preset laptop, not gin")],
    "dgrad_arch_sac.py": [*MT_BAD, ("--m-init zeros", "zeros"), ("--task-net-hidden -1", "--task-net-hidden must be"),
                          ("--task-net-hidden 8 --m-init identity", "needs a table"),
                          ("--resume {run} --method sac", "--method dgrad-a, not sac")],
}


@pytest.mark.parametrize("script, arguments, says", [(path.name, *case) for path in SCRIPTS
                                                     for case in BAD + BAD_FOR[path.name]])
def test_bad_input_gets_one_helpful_message(script, arguments, says, tmp_path, monkeypatch, capsys, straight_run):
    run, places = straight_run(script), {name: tmp_path / name for name in
                                         ("missing", "other_script", "other_version", "damaged", "empty", "file")}
    for name in ("other_script", "other_version", "damaged", "empty"):
        places[name].mkdir()
        about = json.loads((run / "args.json").read_text())
        about["script"] = name if name == "other_script" else about["script"]
        about["args"] |= {"setting_of_the_future": 1} if name == "other_version" else {}
        (places[name] / "args.json").write_text(json.dumps(about))
    (places["damaged"] / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:-900])
    places["file"].write_text("not a folder")
    before = (run / "metrics.csv").read_bytes(), (run / "checkpoint.pt").read_bytes()
    if script == "iqn_em_atari.py" and arguments[2:6] == "runs":               # its default run needs 102 GB
        arguments += " --preset laptop --games Assault"
    with pytest.raises(SystemExit) as stop:
        run_here(script, arguments.format(run=run, **places), monkeypatch)
    output = capsys.readouterr()
    message = re.sub(r"[│╭╮╰╯─\s]+", " ", output.out + output.err)             # without tyro's box
    assert stop.value.code == 2 and says in message and "Traceback" not in message
    assert before == ((run / "metrics.csv").read_bytes(), (run / "checkpoint.pt").read_bytes())


@pytest.mark.parametrize("script, flags", [("qmp_sac.py", "--env metaworld"), ("picor_sac.py", "--env mt4"),
                                           ("pcgrad_sac.py", ""), ("dgrad_arch_sac.py", "")])
def test_a_package_that_is_not_there(script, flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(SystemExit) as stop:
        run_here(script, f"{flags} --seed 987 --runs-dir {tmp_path / 'runs'}", monkeypatch)       # a seed not seen yet
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "the package metaworld, which is not installed" in error and "uv run" in error


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name != "tabular_em.py"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(script, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_here(script, f"--device cuda --runs-dir {tmp_path / 'runs'}", monkeypatch)
    assert stop.value.code == 2 and "--device cuda" in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", DIVERGES)
def test_a_value_that_is_not_finite_stops_the_run(script, monkeypatch, capsys, tmp_path, straight_run):
    with pytest.raises(SystemExit) as stop:
        run_here(script, f"{QUICK[script]} {DIVERGES[script]} --runs-dir {tmp_path}", monkeypatch)
    assert stop.value.code == 1 and re.search(r"\S+ is not finite at step [\d,]+", capsys.readouterr().err)
    state = torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["learners"].values())


# --- the house: copies, pins, documentation ------------------------------------------------------------------------
def definitions(script):
    source = (ROOT / script).read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_same_name_means_same_text():
    texts = {}
    for path in SCRIPTS:
        for name, text in definitions(path.name).items():
            if name not in ("Args", "make_env", "make_envs", "train"):
                texts.setdefault(name, {}).setdefault(text, []).append(path.name)
    drifted = {name: list(copies.values()) for name, copies in texts.items() if len(copies) > 1}
    assert not drifted


@every_script
def test_importing_runs_nothing_and_sections_stand_in_order(script):
    source = (ROOT / script).read_text()
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    *body, last = ast.parse(source).body[1:]
    assert all(isinstance(node, allowed) for node in body) and isinstance(last, ast.If)
    assert all(ast.get_docstring(node) for node in body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "Args")
    headings = re.findall(r"^# -{100,}\n# (.+)\n# -{100,}$", source, re.M)
    order = ["Settings", "Environments", "Networks", "Replay buffer", "The method", "Training",
             "Pictures of the method", "Shared blocks: the same text in every script"]
    assert headings == [heading for heading in order if heading in headings] and headings[-1] == order[-1]


@every_script
def test_imports_only_what_its_header_pins(script):
    source = (ROOT / script).read_text()
    header = tomllib.loads(re.search(r"# /// script\n(.*?)# ///", source, re.S)[1].replace("\n# ", "\n")[2:])
    pins = {re.split(r"[=\[]", pin)[0]: pin for pin in header["dependencies"]}
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(pins.values()) <= set(required)
    names = {"PIL": "pillow", "ale_py": "ale-py"}
    imported = {name for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])}
    for name in {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names):
        assert names.get(name, name) in pins


def test_requirements_are_pinned_exactly():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines and all(re.fullmatch(r"[\w\-\[\],]+==[\w.]+", line) for line in lines)


@every_script
def test_the_page_names_every_flag(script):
    page = (ROOT / "docs" / script.replace(".py", ".md")).read_text()
    fields = module_of(script).Args.__dataclass_fields__
    assert not [name for name in fields if f"--{name.replace('_', '-')}" not in page]
    assert not re.search(r"^[A-Z_]{5,}$", page, re.M)      # a placeholder


def documented_commands():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.py"))]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    pattern = re.compile(r"(?:python|uv run) \w+\.py(?: [^`#|]*)?")
    commands = {command.strip() for line in lines for command in pattern.findall(line)}
    return sorted(command for command in commands if (ROOT / re.search(r"\w+\.py", command)[0]).exists())


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command):
    script, *arguments = shlex.split(command.removeprefix("python ").removeprefix("uv run "))
    module = module_of(script)
    try:                                                  # not `read_args`: a run folder in it is only an example
        module.tyro.cli(module.Args, args=arguments)
    except SystemExit as stop:
        assert stop.code == 0 and arguments == ["--help"]


def test_ci_runs_exactly_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^(.*python -m pytest.*)$", readme, re.M)[1]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
