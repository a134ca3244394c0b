"""The loop of comal.sh: settings, locks, ends of every kind, forks, pins, what it keeps and what it prints. A script
stands in for the stages (tests/helpers/loop.py).

python -m pytest tests/test_comal.py
"""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
from helpers.loop import ROOT, Loop, environment, processes, wait_until

from analysis.experiment import beginning

sys.path.insert(0, str(ROOT / "launch"))
import settings as launch_settings  # noqa: E402


@pytest.fixture
def loop(tmp_path):
    (tmp_path / "a folder").mkdir()  # paths with a space
    loop = Loop(tmp_path / "a folder", f"test-{uuid.uuid4().hex[:8]}")
    yield loop
    for pid in processes(loop.name):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(loop.exps, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- ends of every kind


def test_one_run_a_folder_and_none_is_left_by_sigkill(loop):
    one = {"ROUNDS": "1", "SPLITS": "1"}
    first = loop.sleeping(**one)
    output, code = loop.run(**one)
    assert code == 1 and f"in use by another comal.sh (pid {first.pid})" in output
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    output, code = loop.run(**one)  # at once: it waits until what the first one started has ended
    assert code == 0 and "    scoring " in output and "    sampling " not in output, output
    wait_until(lambda: not processes(loop.name), 5)


def find(loop, words, without="stage.py"):
    return next(pid for pid, line in processes(loop.name).items() if words in line and without not in line)


def test_a_killed_stage_stops_the_loop(loop):
    process = loop.sleeping()
    os.kill(find(loop, "scoring.py"), signal.SIGKILL)
    output = process.communicate(timeout=15)[0]
    assert process.returncode == 1 and "stage scoring failed with exit code 137" in output, output
    wait_until(lambda: not processes(loop.name), 5)


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGKILL, 137)])
def test_a_killed_stage_runner_stops_the_loop(loop, sent, code):
    process = loop.sleeping()
    stage = find(loop, "scoring.py")
    os.kill(find(loop, "stage.py", without="comal.sh "), sent)
    output = process.communicate(timeout=15)[0]
    assert process.returncode == 1 and f"was ended with exit code {code}" in output, output
    wait_until(lambda: stage not in processes(loop.name), 5)
    assert sent == signal.SIGKILL or not processes(loop.name)


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_everything(loop, sent, code):
    process = loop.sleeping()
    process.send_signal(sent)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == code and "goes on from there" in output and not processes(loop.name), output


def test_ctrl_c_on_a_terminal(loop):
    """The terminal sends SIGINT to comal.sh and stage.py at the same time."""
    settings = loop.settings(SLEEP="scoring.py")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may be ignored here, as after nohup
        os.execvpe("bash", ["bash", "comal.sh"], environment(**settings))
    wait_until(lambda: any("sleep 300" in line for line in processes(loop.name).values()), 20)
    os.write(terminal, b"\x03")
    shown = b""
    with contextlib.suppress(OSError):  # its other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130 and not processes(loop.name)
    assert b"    sampling           0:00" in shown and b"SIGINT received, stopped" in shown, shown
    os.close(terminal)


def test_a_failure_says_what_where_and_why(loop):
    """Also when it fails twice: the log has both, one after the other."""
    for _ in range(2):
        output, code = loop.run(FAIL="scoring.py")
    log = f"exps/{loop.name}/run/iter0/logs/scoring.log"
    message = f"iteration 0 of 4, stage scoring failed with exit code 3. Its log, {log}, ends:\n    | no luck with "
    assert code == 1 and message in output and "the same command goes on here" in output, output
    text = (ROOT / log).read_text()
    assert text.count("no luck") == len(re.findall(r"^=== \d{4}-\S+Z .*scoring.py --judge", text, re.MULTILINE)) == 2
    journal = (loop.exps / "run/logs/comal.log").read_text()
    assert journal.count("stage scoring failed with exit code 3") == 2 and "COMAL, 4 iterations" in journal


# ---------------------------------------------------------------------------------------------- what it prints


def test_a_file_gets_no_carriage_returns_and_no_progress(loop):
    output, code = loop.run(REPORT_TO="none", ROUNDS="1")
    assert code == 0 and "\r" not in output and "\x1b" not in output and "%|" not in output and "Triton" not in output
    assert re.search(
        r"^=== iteration 0 of 2\n    sampling +0:0\d\n    scoring +0:0\d\n    pairs +0:0\d\n", output, re.M
    )
    assert output.startswith("comal.sh: the demo (two tiny models, minutes on a CPU), because RECIPE=demo says so;")
    assert "settings other than the recipe's: NAME=" in output and "REPORT_TO=none (tensorboard)" in output
    assert re.search(r"iteration 0 took \d s; 1 left, about \d+ s, until ", output), output
    assert "Triton" in (loop.exps / "run/iter0/logs/sampling.log").read_text()
    assert output.splitlines()[-1].startswith("done after ")


def test_a_terminal_gets_one_live_line(tmp_path):
    bar = "for n in 1 2 3; do printf '\\rpairs: %s0%%|###  | %s/9 [00:01<00:02]' $n $n >&2; sleep 0.5; done"
    command = [sys.executable, "launch/stage.py", "--parent", str(os.getpid()), "--name", "pairs", "--where", "here"]
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*command, "--log", tmp_path / "log", "--", "bash", "-c", bar],
        cwd=ROOT,
        stdout=theirs,
        timeout=30,
        env=os.environ | {"COLUMNS": "80"},
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0 and shown.count("\n") == 1 and "pairs: 20%|###" in shown
    assert re.search(r"\r    pairs +0:0\d\x1b\[K\r\n$", shown), shown


def test_an_iteration_ends_with_three_lines(tmp_path):
    rows = [
        {"iteration": 0, "win_rate_start": 0.625, "win_rate_previous": 0.625},
        {"iteration": 1, "sample_tokens": 14.94, "kl_reference": 0.0104},
    ]
    (tmp_path / "report").mkdir()
    (tmp_path / "report/summary.json").write_text(json.dumps({"experiments": [{"iterations": rows}]}))
    for i in range(2):
        (tmp_path / f"iter{i}/logs").mkdir(parents=True)
        (tmp_path / f"iter{i}/next.json").write_text("{}")
        (tmp_path / f"iter{i}/logs/times.jsonl").write_text('{"stage": "scoring", "seconds": 90}\n')
    state = {"exp": tmp_path, "iter": tmp_path / "iter1", "i": 1, "ITERATIONS": 4, "EVAL_EVERY": 1}
    done = subprocess.run(
        [sys.executable, "launch/summary.py", "iteration"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment(**{name: str(value) for name, value in state.items()}),
    )
    first, second, third = done.stdout.splitlines()
    assert first.startswith("    iteration 1 took 1 min 30 s; 2 left, about 3 min 0 s, until ")
    assert second == "    the policy of iteration 0 wins 62.5 % against the initial policy"
    assert third == "    its samples: 14.9 tokens on average, KL from the reference 0.010 nats"


def test_help_explains_every_setting():
    done = subprocess.run(["bash", "comal.sh", "--help"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "bash comal.sh --plan" in done.stdout
    for setting in launch_settings.settings().values():
        assert setting.text and re.search(rf"^  {setting.name}=", done.stdout, re.M), setting
    for method in launch_settings.methods(re.search(r'METHODS="(.*?)"', (ROOT / "comal.sh").read_text(), re.S)[1]):
        assert f"\n  {method} " in done.stdout


def test_plan_says_what_it_costs(loop):
    plan = loop.run("--plan")[0]
    assert "checkpoints 4 x 0.0 MiB = 0.0 MiB (KEEP_CKPTS=all)" in plan and "# time: not known" in plan, plan
    with open(loop.folder / "models/policy/model/model.safetensors", "wb") as file:
        file.truncate(3 * 2**20)
    plan = loop.run("--plan", KEEP_CKPTS="rounds")[0]
    assert "checkpoints 3 x 3.0 MiB = 9.0 MiB (KEEP_CKPTS=rounds)" in plan and "training 21.0 MiB more" in plan, plan
    assert not loop.exps.exists()
    iteration = loop.exps / "run/iter0"
    (iteration / "logs").mkdir(parents=True)
    (iteration / "next.json").write_text("{}")
    (iteration / "logs/times.jsonl").write_text('{"stage": "a", "seconds": 100}\n{"stage": "b", "seconds": 20}\n')
    assert "# time: 3 x 2.0 min = 0.1 h" in loop.run("--plan")[0]


def test_the_recipe_says_why(loop):
    output = loop.run("--plan", RECIPE="", GPUS="none")[0]
    assert output.startswith(
        "comal.sh: the demo (two tiny models, minutes on a CPU), because GPUS=none says to use no GPU;"
    )


# ---------------------------------------------------------------------------------------------- what it keeps


@pytest.mark.slow
@pytest.mark.parametrize("keep, models", [("rounds", [1, 3]), ("last", [3])])
def test_what_is_kept(loop, keep, models):
    output, code = loop.run(KEEP_CKPTS=keep, UPDATE_INTERVAL="0")
    assert code == 0, output
    assert loop.models() == loop.models(kind="last") == models and loop.models(kind="DONE") == [0, 1, 2, 3]


@pytest.mark.slow
def test_last_keeps_the_reference(loop):
    assert loop.run(KEEP_CKPTS="last", UPDATE_INTERVAL="2", ROUNDS="3", SPLITS="1")[1] == 0
    assert loop.models() == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "every, scorings, at_the_end", [("1", [[0], [1]], [2]), ("2", [[0, 1]], [2]), ("3", [], [0, 1, 2])]
)
def test_comparisons_share_the_judge_of_a_scoring(loop, every, scorings, at_the_end):
    output, code = loop.run(EVAL_EVERY=every, ROUNDS="3", SPLITS="1")
    assert code == 0 and len(list(loop.exps.glob("run/iter*/eval/vs_*.json"))) == 6, output
    compared = lambda flag, stage: [
        sorted({int(i) for i in re.findall(r"/iter(\d+)/eval/vs_", log.read_text())})
        for log in sorted(loop.exps.glob(f"run/iter*/logs/{stage}.log"))
        if flag in log.read_text()
    ]
    assert compared("--compared", "scoring") == scorings
    assert compared("--output", "evaluation") == [at_the_end]


@pytest.mark.slow
def test_pins_and_forks(loop):
    assert loop.run(KEEP_CKPTS="rounds")[1] == 0
    run, fork = f"exps/{loop.name}/run", {"NAME": f"{loop.name}/fork", "ETA": "0.5", "KEEP_CKPTS": "rounds"}
    assert json.loads((ROOT / run / "iter2/next.json").read_text()) == {
        "policy": f"{run}/iter2/ckpt",
        "reference": f"{run}/iter1/ckpt",
    }
    output, code = loop.run(FROM=f"{run}/iter1/", **fork)
    assert code == 0 and "=== iteration 2 of 4" in output and "=== iteration 1 of" not in output, output
    assert loop.models("fork") == [3] and (loop.exps / "fork/start/responses.jsonl").exists()
    assert loop.run(FROM=f"{run}/iter1", **fork)[1] == 0
    plan = loop.run("--plan", FROM=f"{run}/iter1", NAME=f"{loop.name}/planned")[0]
    assert f"--model {run}/iter1/ckpt --reference {run}/iter1/ckpt" in plan
    for changed, message in (
        ({"FROM": f"{run}/iter9"}, "no such folder"),
        ({"FROM": run}, "should be an iteration's"),
        ({"FROM": f"{run}/iter3"}, "raise ROUNDS"),
        ({"FROM": f"{run}/iter0"}, "no weights any more"),
        ({"FROM": f"{run}/iter1", "NAME": f"{loop.name}/run"}, "another NAME"),
    ):
        output, code = loop.run(**({"NAME": f"{loop.name}/other"} | changed))
        assert code == 1 and message in output, output
    settings = json.loads((loop.exps / "run/run.json").read_text())
    (loop.exps / "run/run.json").write_text((loop.exps / "run/run.json").read_text().replace(settings["code"], "old"))
    output, code = loop.run(KEEP_CKPTS="rounds")
    assert code == 0 and "WARNING" in output and "code: old then" in output
    (loop.folder / "models/prompts/train_1.jsonl").write_text("changed")
    output, code = loop.run()
    assert code == 1 and "prompts/train_1.jsonl" in output and "train_0" not in output and "or fork: bash" in output


@pytest.mark.slow
def test_a_run_begins_at_any_iteration_with_any_policy_and_reference(loop):
    """The reference moves when it would have moved, the rounds keep their numbers, and KL and win rates are measured
    from MODEL."""
    judge = str(loop.folder / "models/judge")  # stands in for another checkpoint
    start = {"ROUNDS": "3", "FIRST_ITERATION": "3", "REFERENCE": judge, "KL_FROM_START": "true"}
    run, policy = f"exps/{loop.name}/run", str(loop.folder / "models/policy")
    plan, code = loop.run("--plan", **start)
    assert code == 0 and "iteration 2 of 6" not in plan and "left, 3" in plan, plan
    sampled = [words["--model"] for words in commands(plan, "sampling.py")]
    assert len(sampled) == 3 and sampled[1:] == [f"{run}/iter3/ckpt", f"{run}/iter4/ckpt"]
    output, code = loop.run(**start)
    assert code == 0 and "=== iteration 3 of 6" in output and "=== iteration 2 of" not in output, output
    assert loop.models() == [3, 4, 5] and not (loop.exps / "run/iter2").exists()  # all are kept
    assert not loop.models(kind="resume-1") and not list(loop.exps.rglob("*.partial"))
    assert (loop.exps / "run/start/responses.jsonl").exists()
    assert sorted(path.name for path in loop.exps.glob("run/round*")) == ["round2", "round3"]
    log = lambda i, stage: (loop.exps / f"run/iter{i}/logs/{stage}.log").read_text()
    assert f"--reference '{judge}'" in log(3, "logprobs") and "train_1.jsonl" in log(3, "sampling")
    assert f"--reference {run}/iter3/ckpt" in log(4, "logprobs") and "train_0.jsonl" in log(4, "sampling")
    assert (
        f"--model '{policy}'" in log(3, "start_logprobs") and (loop.exps / "run/iter5/eval/start_logps.jsonl").exists()
    )
    answers = [f"{run}/iter{i}/eval/responses.jsonl" for i in (3, 4)]
    baselines = [f"{run}/start/responses.jsonl"] * 3 + [answers[0], f"{run}/start/responses.jsonl", answers[1]]
    assert f"--baseline {','.join(baselines)} " in log(5, "evaluation")
    assert "--names start,iter3,iter5 " in log(5, "matrix")
    found = json.loads((loop.exps / "run/run.json").read_text())
    assert (found["FIRST_ITERATION"], found["REFERENCE"]) == ("3", judge)
    assert beginning(loop.exps / "run", found) == (3, judge)  # as the report reads it
    for changed in ({"FIRST_ITERATION": "2"}, {"REFERENCE": policy}):
        output, code = loop.run(**start | changed)
        ((name, value),) = changed.items()
        assert code == 1 and f"{name}: {start[name]} then, {value} now" in output, output
    assert loop.run(**start)[1] == 0
    for name in ("FIRST_ITERATION", "REFERENCE"):
        output, code = loop.run(FROM=f"{run}/iter4", NAME=f"{loop.name}/fork", **{name: start[name]})
        assert code == 1 and f"leave out {name}" in output, output
    output, code = loop.run(FROM=f"{run}/iter4", NAME=f"{loop.name}/fork", ROUNDS="3")
    assert code == 0 and "=== iteration 5 of 6" in output, output
    output, code = loop.run("--plan", METHOD="dpo", FIRST_ITERATION="1")
    assert code == 1 and "the last iteration has the number 0; METHOD=dpo has no other" in output


def test_the_demo_has_settings_of_its_own_where_results_depend_on_them(loop):
    """No weight decay, and all of the distribution in evaluation too; the full recipe has those of the paper."""
    (evaluated, *_), (trained, *_) = planned(loop, "eval.py generate", "inpo.py")
    assert (evaluated["--top_p"], trained["--weight_decay"], trained["--eval_steps"]) == ("1", "0", "500")
    full = {"RECIPE": "full", "PROMPTS_DIR": "own", "EVAL_PROMPTS": "own.jsonl", "TOP_P": "0.9"}
    (sampled, *_), (trained, *_), (answer, *_) = planned(loop, "sampling.py", "inpo.py", "eval.py generate", **full)
    assert (sampled["--top_p"], sampled["--temperature"]) == ("0.9,0.9,0.95", "0.8,0.8,0.7")
    assert (trained["--weight_decay"], trained["--eval_steps"]) == ("0.01", "500")
    assert answer["--top_p"] == "0.95"


def test_run_json_is_json_and_says_what_the_method_is(loop):
    flags = """--labels "A,B" --x 'it''s'"""
    output, code = loop.run(METHOD="inpo-small", JUDGE_FLAGS=flags, ETA="0.5,0.1", FAIL="data_processing.py")
    assert code == 1 and "stage pairs failed" in output, output  # it has seen enough
    found = json.loads((loop.exps / "run/run.json").read_text())
    assert found["JUDGE_FLAGS"] == flags and all(isinstance(value, str) for value in found.values())
    names = ("METHOD", "TRAINER", "METHOD_TITLE", "ITERATIONS", "ETA", "UPDATE_INTERVAL", "ROUNDS", "SPLITS")
    expected = ["inpo-small", "inpo", "INPO, fixed reference", "4", "0.5,0.1", "0", "2", "2"]
    assert [found[name] for name in names] == expected
    assert {"code", "torch", "transformers", "vllm", "accelerate", "commit", "started"} < found.keys()
    assert f"sha256 {loop.folder}/models/prompts/test.jsonl" in found
    log = (loop.exps / "run/iter0/logs/scoring.log").read_text()
    assert "--labels A,B --x its" in log


def test_a_setting_that_is_not_in_run_json_had_its_default(loop):
    one = {"ROUNDS": "1", "SPLITS": "1"}
    assert loop.run(**one)[1] == 0
    path = loop.exps / "run/run.json"
    old = json.loads(path.read_text())
    for name in ("WARMUP_RATIO", "BETA", "TRAINER", "METHOD_TITLE", "ITERATIONS", "REFERENCE", "FIRST_ITERATION"):
        del old[name]
    del old["WEIGHT_DECAY"], old["EVAL_TOP_P"]  # which were 0 and TOP_P
    old["JUDGE_TYPE"] = "offsetbias-lm"  # as generative judges were called
    old["SAVE_STEPS"] = "200"  # a setting that does not exist any more
    path.write_text(json.dumps(old))
    assert loop.run(**one)[1] == 0
    assert json.loads(path.read_text())["TRAINER"] == "inpo"
    output, code = loop.run(WARMUP_RATIO="0.2", WEIGHT_DECAY="0.01", EVAL_TOP_P="0.9", **one)
    assert code == 1 and "WARMUP_RATIO: 0.1 then, 0.2 now" in output
    assert "WEIGHT_DECAY: 0 then, 0.01 now" in output and "EVAL_TOP_P: 1 then, 0.9 now" in output
    assert loop.run(**one | {"ROUNDS": "2"})[1] == 0  # more rounds may follow
    found = json.loads(path.read_text())
    assert (found["ROUNDS"], found["ITERATIONS"]) == ("2", "2")
    path.write_text(path.read_text().replace('"JUDGE_FLAGS": ""', '"JUDGE_FLAGS": "--labels "A,B""'))
    output, code = loop.run(**one)
    assert code == 1 and "is no valid JSON" in output and "JUDGE_FLAGS" in output


# ---------------------------------------------------------------------------------------------- settings


def test_any_judge_reaches_the_stages(loop):
    plan, code = loop.run("--plan", JUDGE="own/judge,own/policy", JUDGE_TYPE="generative,reward", JUDGE_WEIGHTS="1,3")
    flags = "--judge own/judge,own/policy --judge_type generative,reward --judge_weights 1,3"
    assert code == 0 and plan.count(flags) == 4, plan  # two kinds of scoring, the evaluation, the matrix
    plan = loop.run("--plan", JUDGE_FLAGS="--labels 'A x,B x' --reward_temperature 2")[0]
    assert plan.count("--labels A\\ x\\,B\\ x --reward_temperature 2") == 4, plan
    output, code = loop.run(JUDGE=f"{loop.folder}/models/judge,no-such-model", JUDGE_TYPE="reward")
    assert code == 1 and "no-such-model (JUDGE): no such directory" in output
    plan, code = loop.run("--plan", JUDGE="some-model", JUDGE_TYPE="server", API_BASE="http://127.0.0.1:8000/v1")
    assert (
        code == 0 and "--judge some-model --judge_type server" in plan and "--api_base http://127.0.0.1:8000/v1" in plan
    )


def test_arguments_come_before_the_environment(loop):
    plan, code = loop.run("METHOD=inpo-small", "ETA=0.25", "--plan", "UPDATE_INTERVAL=3", ETA="0.5")
    assert code == 0 and plan.count("--eta 0.25") == 2 and "ETA=0.25 (0.333333)" in plan
    assert "INPO, fixed reference, 4 iterations" in plan and "the reference stays" in plan
    assert "UPDATE_INTERVAL is not used by METHOD=inpo-small" in plan


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["LEARNING_RTE=1"], {}, "unknown argument LEARNING_RTE=1. Did you mean LEARNING_RATE=...?"),
        (["eta=1"], {}, "unknown argument eta=1. Did you mean ETA=...?"),
        (["--pln"], {}, "unknown argument --pln. Did you mean --plan?"),
        (["--prepair"], {}, "unknown argument --prepair. Did you mean --prepare?"),
        (["PATH=/"], {}, "unknown argument PATH=/"),
        (["GPUS_PER_WORKER=2"], {}, "GPUS_PER_WORKER is now called TENSOR_PARALLEL_SIZE"),
        (["SAVE_STEPS=9"], {}, "SAVE_STEPS has become SAVE_MINUTES, minutes of training between points where it can"),
        (
            [],
            {"GPUS_PER_WORKER": "2"},
            "GPUS_PER_WORKER is in the environment, but it is now called TENSOR_PARALLEL_SIZE",
        ),
        ([], {"LEARNING_RTE": "1"}, "LEARNING_RTE is in the environment; did you mean LEARNING_RATE?"),
        ([], {"NUM_EPOCH": "1"}, "NUM_EPOCH is in the environment; did you mean NUM_EPOCHS?"),
    ],
)
def test_misspelt_settings_are_refused(loop, arguments, environment, message):
    output, code = loop.run(*arguments, **environment)
    assert code == 1 and output.startswith(f"comal.sh: {message}") and not loop.exps.exists(), output


def test_a_variable_that_may_mean_something_else_is_told_of(loop):
    output, code = loop.run("--plan", SEEDS="0 1")
    assert code == 0 and "WARNING: SEEDS in the environment is no setting, SEED is" in output


def test_the_disk_is_checked(loop):
    with open(loop.folder / "models/policy/model/model.safetensors", "wb") as file:
        file.truncate(2**42)  # without contents
    output, code = loop.run()
    assert code == 1 and "needs about 33555456 MiB" in output and "KEEP_CKPTS=last" in output, output


@pytest.mark.parametrize(
    "setting, message",
    [
        ("RECIPE=Demo", "RECIPE=Demo is unknown; choose one of: demo full"),
        ("METHOD=como", "METHOD=como is unknown; choose one of: comal inpo-small inpo-large iter-ipo iter-dpo ipo dpo"),
        ("PAIR_RULE=bestworst", "PAIR_RULE=bestworst is unknown; choose one of: top_two best_worst random"),
        ("SOFT_LABELS=maybe", "SOFT_LABELS=maybe is unknown; choose one of: true false"),
        ("KEEP_CKPTS=some", "KEEP_CKPTS=some is unknown; choose one of: all rounds last"),
        ("ON_ERROR=no", "ON_ERROR=no is unknown; choose one of: fail skip"),
        ("ROUNDS=x", "ROUNDS=x should be a whole number, at least 1"),
        ("EVAL_EVERY=0", "EVAL_EVERY=0 should be a whole number, at least 1"),
        ("NUM_SAMPLES=1", "NUM_SAMPLES=1 should be a whole number, at least 2"),
        ("UPDATE_INTERVAL=six", "UPDATE_INTERVAL=six should be a whole number, at least 0"),
        ("SAVE_MINUTES=x", "SAVE_MINUTES=x should be a number, 0 or more"),
        ("EVAL_STEPS=0", "EVAL_STEPS=0 should be a whole number, at least 1"),
        (
            "FIRST_ITERATION=06",
            "FIRST_ITERATION=06 should be a whole number, at least 0",
        ),  # bash would read it as octal
        ("FIRST_ITERATION=12", "FIRST_ITERATION=12, but the last iteration has the number 11; raise ROUNDS"),
        ("WEIGHT_DECAY=w", "WEIGHT_DECAY=w should be a number, 0 or more"),
        ("EVAL_TOP_P=1.1", "EVAL_TOP_P=1.1 should be at most 1"),
        ("STALL_TIMEOUT=-1", "STALL_TIMEOUT=-1 should be a whole number, at least 0"),
        ("ETA=0", "ETA=0 should be greater than 0"),
        ("ETA=-1", "ETA=-1 should be a number greater than 0"),
        ("BETA=b", "BETA=b should be a number, 0 or more"),
        ("BETA=0.0", "BETA=0.0 should be greater than 0"),
        ("LEARNING_RATE=0e-5", "LEARNING_RATE=0e-5 should be greater than 0"),
        ("TOP_P=0", "TOP_P=0 should be greater than 0"),
        ("TOP_P=1.1", "TOP_P=1.1 should be at most 1"),
        ("WARMUP_RATIO=2", "WARMUP_RATIO=2 should be at most 1"),
        ("JUDGE_TYPE=bt", "JUDGE_TYPE=bt should be generative, reward or server; of several judges one each, "),
        ("JUDGE_TYPE=reward,openai", "JUDGE_TYPE=reward,openai: openai is now called server"),
        ("MICRO_BATCH_TOKENS=all", "MICRO_BATCH_TOKENS=all should be a whole number, at least 0, or auto"),
        ("ROUNDS=auto", "ROUNDS=auto should be a whole number, at least 1"),
        ("SHARDING=none", "SHARDING=none is unknown; choose one of: auto full optimizer"),
        ("JUDGE_WEIGHTS=x", "JUDGE_WEIGHTS=x should be numbers, comma-separated"),
        ("JUDGE_TYPE=server", "OPENAI_API_KEY is not set"),
        ("JUDGE_FLAGS=--labels 'A", "JUDGE_FLAGS=--labels 'A cannot be split into flags: No closing quotation"),
        ("ENGINE_ARGS=[1]", "ENGINE_ARGS=[1] should be a JSON object such as '{\"max_num_seqs\": 512}'"),
        ("JUDGE_ENGINE_ARGS={'a': 1}", "JUDGE_ENGINE_ARGS={'a': 1} should be a JSON object"),
        ("NAME=../../x", "NAME=../../x should be the name of a folder in exps/"),
        ("NAME=a/../../x", "NAME=a/../../x should be the name of a folder in exps/"),
        ("NAME=/tmp/x", "NAME=/tmp/x should be the name of a folder in exps/"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    name, value = setting.split("=")
    methods = {"METHODS": re.search(r'METHODS="(.*?)"', (ROOT / "comal.sh").read_text(), re.S)[1]}
    values = launch_settings.defaults({"RECIPE": "demo", "METHOD": "comal"}) | methods | {name: value}
    with pytest.raises(launch_settings.Refused, match=f"^{re.escape(message)}"):
        launch_settings.check_values(values)


def test_a_wrong_setting_is_refused_at_once(loop):
    """Before anything else is printed or written, as an argument and in the environment."""
    for arguments, given in ((["--plan"], {"ETA": "0"}), (["ETA=0"], {})):
        assert loop.run(*arguments, **given) == ("comal.sh: ETA=0 should be greater than 0\n", 1)
    assert not loop.exps.exists()


@pytest.mark.parametrize(
    "setting, message",
    [
        ("MODEL=no/such/model", "no/such/model (MODEL): no such directory"),
        ("REFERENCE=no/such/model", "no/such/model (REFERENCE): no such directory"),
        ("EVAL_PROMPTS=none.jsonl", "none.jsonl does not exist"),
        ("SPLITS=9", "train_2.jsonl does not exist"),
        ("GPUS=97", "GPUS=97 names GPU 97, but nvidia-smi lists: "),
    ],
)
def test_what_does_not_exist_is_refused(loop, setting, message):
    output, code = loop.run(setting)
    assert code == 1 and message in output and not loop.exps.exists(), output


LISTING = """#!/bin/sh
echo 'GPU 0: NVIDIA A100 (UUID: GPU-0a)'
echo 'GPU 1: NVIDIA A100 (UUID: GPU-1b)'
echo '  MIG 3g.20gb     Device  0: (UUID: MIG-2c)'
echo '  MIG 3g.20gb     Device  1: (UUID: MIG-3d)'
"""


@pytest.fixture
def two_gpus(tmp_path):
    """Settings of a machine with two GPUs, the second one with two MIG instances."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(LISTING)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    "settings, visible",
    [
        ({}, "0,1"),
        ({"GPUS": "1", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:9"}, "1"),
        ({"GPUS": "GPU-1b,0"}, "GPU-1b,0"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-0a,GPU-1b"}, "GPU-0a,GPU-1b"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-3d"}, "MIG-3d"),
        ({"GPUS": "MIG-2c,MIG-3d"}, "MIG-2c"),
    ],
)
def test_training_gets_the_gpus_that_are_named(loop, two_gpus, settings, visible):
    plan, code = loop.run("--plan", **(two_gpus | settings))
    environment = f"CUDA_VISIBLE_DEVICES={visible} CUDA_DEVICE_ORDER=PCI_BUS_ID "
    environment += f"PYTORCH_ALLOC_CONF={settings.get('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')}"
    command = rf"^env {environment} .* --num_processes {len(visible.split(','))} inpo.py "
    assert code == 0 and re.search(command, plan, re.M), plan
    assert ("training uses MIG-2c alone" in plan) == (visible == "MIG-2c")


def test_gpus_are_named_as_nvidia_smi_lists_them(loop, two_gpus):
    message = "nvidia-smi lists: 0,1; give numbers or UUIDs of nvidia-smi -L, auto or none"
    for wrong in ("2", "GPU-1", "0,MIG-9"):
        output, code = loop.run(GPUS=wrong, **two_gpus)
        assert code == 1 and message in output, output
    assert not loop.exps.exists()
    output, code = loop.run(GPUS="MIG-3d", FAIL="sampling.py", **two_gpus)
    assert "stage sampling failed" in output, output
    assert "--gpus MIG-3d" in (loop.exps / "run/iter0/logs/sampling.log").read_text()


def test_a_vllm_for_gpus_is_refused_at_once_where_none_is_used(loop, tmp_path):
    (tmp_path / "vllm-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm-0.32.0.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.32.0\n")
    output, code = loop.run(PYTHON=sys.executable, PYTHONPATH=str(tmp_path), GPUS="none")
    message = (
        r"no GPU is used \(GPUS=none\), but vLLM 0.32.0 of \S+ is a build for GPUs and cannot run on a CPU; SETUP_FOR"
    )
    assert code == 1 and re.search(message, output) and not loop.exps.exists(), output


def test_packages_for_the_cpu_use_no_gpu(loop, two_gpus):
    plan, code = loop.run("--plan", RECIPE="", SETUP_FOR="cpu", **two_gpus)
    assert code == 0 and "the demo (two tiny models, minutes on a CPU), because GPUS=none" in plan, plan
    assert "--gpus none" in plan and "CUDA_VISIBLE_DEVICES" not in plan


def test_every_setting_is_checked_for_what_it_is():
    """Each of those that have a check exists, and what results depend on is the rest."""
    known = launch_settings.settings().keys()
    checked = {*launch_settings.CHOICES, *launch_settings.WHOLE, *launch_settings.NUMBERS, *launch_settings.FREE}
    assert checked <= known
    assert {"METHOD", "SEED", "ETA", "TEMPERATURE", "JUDGE_FLAGS", "FROM"} <= known - launch_settings.FREE


# ---------------------------------------------------------------------------------------------- methods


def commands(plan, script):
    """The flags of every planned run of a script, in order."""
    lines = [line.split() for line in plan.split("\n") if f" {script} " in line]
    return [dict(zip(words, words[1:])) for words in lines]


def planned(loop, *scripts, **settings):
    """The same of each of the scripts."""
    plan = loop.run("--plan", **settings)[0]
    return [commands(plan, script) for script in scripts]


def repeated(plan):
    """[(iterations that the plan does not print, the one that they repeat, their reference)]"""
    return re.findall(r"^# iterations? (.*): as iteration (\d+) but .* with (.*) as the reference$", plan, re.M)


def test_plan_prints_what_repeats_once(loop):
    """Iteration 0 compares nothing, the baselines of iteration 1 are the initial policy's; from 2 on all is alike."""
    plan, last = loop.run("--plan", EVAL_EVERY="1")[0], f"exps/{loop.name}/run/iter1/ckpt"
    assert plan.count("inpo.py") == 3 and repeated(plan) == [("3", "2", last)], plan
    plan = loop.run("--plan", ROUNDS="3", METHOD="iter-dpo", EVAL_EVERY="1")[0]
    assert plan.count("dpo.py") == 3 and repeated(plan) == [("3 to 5", "2", "the last policy")], plan
    plan = loop.run("--plan", METHOD="inpo-small", FIRST_ITERATION="2")[0]
    assert plan.count("inpo.py") == 2 and not repeated(plan), plan
    plan = loop.run("--plan", METHOD="inpo-small")[0]
    assert repeated(plan) == [("2 to 3", "1", f"{loop.folder}/models/policy")], plan


MOVES = {  # the trainer, and from which iteration on the reference is which iteration's policy (UPDATE_INTERVAL 2)
    "comal": ("inpo.py", {2: 1}),
    "inpo-small": ("inpo.py", {}),
    "inpo-large": ("inpo.py", {}),
    "iter-ipo": ("ipo.py", {1: 0, 2: 1, 3: 2}),
    "iter-dpo": ("dpo.py", {1: 0, 2: 1, 3: 2}),
}


def models_of(loop, method, count):
    """[(policy, reference)] that the iterations should have."""
    policy = reference = f"{loop.folder}/models/policy"
    checkpoint, found = f"exps/{loop.name}/run/iter%d/ckpt", []
    for i in range(count):
        reference = checkpoint % MOVES[method][1][i] if i in MOVES[method][1] else reference
        found.append((checkpoint % (i - 1) if i else policy, reference))
    return found


@pytest.mark.parametrize("method", MOVES)
def test_the_reference_moves_as_the_method_says(loop, method):
    """In the plan, which prints the iterations that differ."""
    plan = loop.run("--plan", METHOD=method, EVAL_EVERY="1")[0].replace("\\ ", " ")
    flags = r"--model (.*?) --reference (.*?) --tokenizer \S* --input \S*train.pairs"
    models = re.findall(rf" get_logprobs.py {flags}", plan)
    assert len(models) >= 2 and models == models_of(loop, method, len(models)), plan
    assert plan.count(f" {MOVES[method][0]} ") == len(models)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["comal", "iter-dpo"])
def test_the_reference_moves_in_the_loop(loop, method):
    output, code = loop.run(METHOD=method)
    assert code == 0, output
    for i, (policy, reference) in enumerate(models_of(loop, method, 4)):
        command = (loop.exps / f"run/iter{i}/logs/logprobs.log").read_text().replace("'", "")
        assert f" --model {policy} --reference {reference} " in command
        assert f" {MOVES[method][0]} " in (loop.exps / f"run/iter{i}/logs/training.log").read_text()


@pytest.mark.parametrize("method, trainer", [("ipo", "ipo.py"), ("dpo", "dpo.py")])
def test_baselines_take_one_iteration_over_all_prompts(loop, method, trainer):
    trained, sampled = planned(loop, trainer, "sampling.py", METHOD=method, PROMPTS_DIR="prompts")
    assert len(trained) == 1 and sampled[0]["--input"].startswith("prompts/train.jsonl")


def test_the_documents_recipe_of_the_second_version_is_planned(loop, tmp_path):
    """With local models in the place of Llama-3 and of RM1 and RM2, which the documents do not name."""
    text = (ROOT / "docs/recipes.md").read_text()
    (command,) = re.findall(r"bash comal.sh (NAME=v2 .*?)\n```", text.replace("\\\n", " "), re.DOTALL)
    for name in ("policy", "RM1", "RM2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(2**20))
    command = command.replace("meta-llama/Meta-Llama-3-8B-Instruct", str(tmp_path / "policy"))
    command = command.replace("RM1,RM2", f"{tmp_path}/RM1,{tmp_path}/RM2").split()
    plan, code = loop.run("--plan", *command, RECIPE="full", GPUS="none", SPLITS="6")
    assert code == 0 and "COMAL, 18 iterations into exps/v2; eta 0.002,0.1, the reference moves every 6" in plan, plan
    assert plan.count(f"--judge {tmp_path}/RM1,{tmp_path}/RM2 --judge_type reward ") == 7
    etas = [("0", "0.002"), ("1", "0.002"), ("2", "0.002"), ("6", "0.1"), ("11", "0.1")]
    assert re.findall(r"iter(\d+)/ckpt --eta (\S+)", plan) == etas
    assert repeated(plan) == [
        ("3 to 5", "2", str(tmp_path / "policy")),
        ("7 to 10", "6", "exps/v2/iter5/ckpt"),
        ("12 to 16", "6", "exps/v2/iter11/ckpt"),
        ("17", "11", "exps/v2/iter11/ckpt"),  # at a round's end there is one stage more
    ]
    assert "checkpoints 18 x 1.0 MiB" in plan and not (ROOT / "exps/v2").exists()


def test_full_recipe_has_the_methods_own_eta(loop):
    for method, eta in (("comal", "0.002"), ("inpo-large", "0.1")):
        settings = {"RECIPE": "full", "METHOD": method, "PROMPTS_DIR": "own"}
        assert {words["--eta"] for words in planned(loop, "inpo.py", **settings)[0]} == {eta}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"NODES": "2"}, "MASTER_ADDR, the address of node 0, is not set"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 should be less than NODES=2"),
    ],
)
def test_the_address_of_node_0_is_needed(loop, settings, message):
    output, code = loop.run("--plan", **settings)
    assert code == 1 and message in output
