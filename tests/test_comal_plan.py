"""comal.sh --plan: commands, costs, and the iterations of each method; for some methods the loop as well.

python -m pytest tests/test_comal_plan.py
"""

import json
import re

import pytest
from helpers.loop import ROOT


def test_plan_says_what_it_costs(loop):
    plan = loop.run("--plan")[0]
    assert "checkpoints 4 x 0.0 KiB = 0.0 KiB (KEEP_CKPTS=all)" in plan and "# time: not known" in plan, plan
    with open(loop.folder / "models/policy/model/model.safetensors", "wb") as file:
        file.truncate(3 * 2**20)
    plan = loop.run("--plan", KEEP_CKPTS="rounds")[0]
    assert "checkpoints 3 x 3.0 MiB = 9.0 MiB (KEEP_CKPTS=rounds)" in plan and "training 21.0 MiB more" in plan, plan
    assert not loop.exps.exists()
    iteration = loop.exps / "run/iter0"
    (iteration / "logs").mkdir(parents=True)
    (iteration / "next.json").write_text("{}")
    # Sampling was run again; the last policy was evaluated before there were more ROUNDS.
    times = [
        ("sampling", 900),
        ("sampling", 100),
        ("training", 20),
        ("responses", 40),
        ("evaluation", 50),
        ("matrix", 60),
    ]
    rows = (json.dumps({"stage": stage, "seconds": seconds}) for stage, seconds in times)
    (iteration / "logs/times.jsonl").write_text("\n".join(rows) + "\n")
    assert "# time: 3 x 2.0 min = 0.1 h" in loop.run("--plan")[0]


def test_the_recipe_says_why(loop):
    output = loop.run("--plan", RECIPE="", GPUS="none")[0]
    assert output.startswith(
        "comal.sh: the demo (two tiny models, minutes on a CPU), because GPUS=none says to use no GPU;"
    )


def test_the_demo_has_settings_of_its_own_where_results_depend_on_them(loop):
    """No weight decay, and all of the distribution in evaluation too; the full recipe has those of the paper."""
    (evaluated, *_), (trained, *_) = loop.planned("eval.py generate", "inpo.py")
    assert (evaluated["--top_p"], trained["--weight_decay"], trained["--eval_steps"]) == ("1", "0", "500")
    full = {"RECIPE": "full", "PROMPTS_DIR": "own", "EVAL_PROMPTS": "own.jsonl", "TOP_P": "0.9"}
    (sampled, *_), (trained, *_), (answer, *_) = loop.planned("sampling.py", "inpo.py", "eval.py generate", **full)
    assert (sampled["--top_p"], sampled["--temperature"]) == ("0.9,0.9,0.95", "0.8,0.8,0.7")
    assert (trained["--weight_decay"], trained["--eval_steps"]) == ("0.01", "500")
    assert answer["--top_p"] == "0.95"


# ---------------------------------------------------------------------------------------------- methods


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
    trained, sampled = loop.planned(trainer, "sampling.py", METHOD=method, PROMPTS_DIR="prompts")
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
        assert {words["--eta"] for words in loop.planned("inpo.py", **settings)[0]} == {eta}
