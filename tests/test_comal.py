"""comal.sh in a loop whose stages a script plays (tests/helpers/loop.py): locks, ends of every kind, forks, pins, what
it keeps and what it prints.

python -m pytest tests/test_comal.py
"""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from helpers.loop import ROOT, commands, environment, processes, wait_until

from analysis.experiment import beginning

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


@pytest.mark.slow
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
