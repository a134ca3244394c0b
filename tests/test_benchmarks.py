"""benchmarks/: the arithmetic behind their figures, and gpu.py as far as it runs without a GPU.

python -m pytest tests/test_benchmarks.py
"""

import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import cost  # noqa: E402
import gpu  # noqa: E402
import gpu_attention as attention  # noqa: E402
import gpu_sections  # noqa: E402

import utils  # noqa: E402


def test_flops_of_a_forward_pass_by_hand():
    """Hidden 4, two heads and one key-value head of dimension 2, intermediate 6, 3 layers, vocabulary 10: a layer has
    4 x 4 + 4 x 2 + 4 x 2 + 4 x 4 + 3 x 4 x 6 = 120 weights."""
    config = SimpleNamespace(
        hidden_size=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=6,
        num_hidden_layers=3,
        vocab_size=10,
    )
    rows = [([0] * 5, [[0] * 2, [0] * 3]), ([0], [[0]])]
    # A prompt of 5 sees 15 keys; its responses 2 x 5 + 3 and 3 x 5 + 6; the second row 1 and 1 + 1: 52 together.
    assert common.attention_flops(config, rows) == 4 * 4 * 3 * 52
    # 12 tokens go through the layers, 6 positions through the output layer.
    assert common.forward_flops(config, rows) == 2 * (3 * 120 * 12 + 4 * 10 * 6) + 4 * 4 * 3 * 52
    # Without sharing, each response has its prompt before it again.
    alone = [([0] * 5, [[0] * 2]), ([0] * 5, [[0] * 3]), ([0], [[0]])]
    assert common.forward_flops(config, alone) - common.forward_flops(config, rows) == 2 * 3 * 120 * 5 + 4 * 4 * 3 * 15


def test_flops_of_qwen2_are_two_a_weight_and_token():
    """Of a model that is made, without biases and norms (under 1 % of its weights); attention aside."""
    config = common.make_config("tiny")
    weights = sum(parameter.numel() for parameter in common.make_model("tiny").parameters() if parameter.dim() == 2)
    rows = [([0], [[0] * 99])]
    dense = common.forward_flops(config, rows) - common.attention_flops(config, rows)
    head = config.hidden_size * config.vocab_size
    assert dense == 2 * ((weights - head) * 100 + head * 99)


# ---------------------------------------------------------------------------------------------- commands

PAGES = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "benchmarks").glob("*.py")]
COMMANDS = sorted(
    {line for page in PAGES for line in re.findall(r"python (benchmarks/\w+\.py[^`\n>]*)", page.read_text())}
)


def test_every_benchmark_has_help_and_commands_have_flags_that_exist(monkeypatch, capsys):
    """All commands of the documents, of the results and of the docstrings; nothing runs."""
    commands = {path.name: None for path in (ROOT / "benchmarks").glob("*.py")}
    monkeypatch.setattr(utils, "run", lambda *found: commands.update({Path(sys.argv[0]).name: found}))
    for name in commands:
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
    helpers = {name for name, command in commands.items() if command is None}
    assert helpers == {"common.py", "gpu_sections.py", "gpu_attention.py", "gpu_engines.py"}
    for name in commands.keys() - helpers:
        for command in commands[name]:
            with pytest.raises(SystemExit):
                utils._read_flags(name, command, ["--help"])
            assert "usage: " + name in capsys.readouterr().out
    assert len(COMMANDS) > 20
    for line in COMMANDS:
        words = re.sub(r" {4,}.*|[][]", "", line).split()  # without what explains it, and with what is optional
        name, words = Path(words[0]).name, [word.split("|")[0] for word in words[1:]]
        command = commands[name][0]
        if len(commands[name]) > 1:  # the first word names one
            command = {command.__name__: command for command in commands[name]}[words.pop(0)]
        assert words == ["--help"] or utils._read_flags(name, command, words) is not None, line


# ---------------------------------------------------------------------------------------------- the cost on paper

A_POLICY = cost.Model("a policy", hidden=1000, layers=10, key_values=100, vocabulary=1000, parameters=1e9)


def training_seconds(**rates):
    """Of an iteration on two GPUs whose products take no time: that of what they tell each other."""
    return cost.training(A_POLICY, 2, cost.Rates(matrix_rate=1e9, launch=0, **rates))[0]


def test_traffic_of_sharded_training_by_hand():
    """937.5 updates of 16 pairs a GPU. A shard of 1e9 parameters takes 8 GB, two gathered layers 0.4, a pair of 790
    tokens 83 x 1000 x 10 x 790 bytes = 0.656 GB."""
    # 90 % of 12 GB: 2.4 GB are left, for 3 pairs a pass, so 6 passes of 8 GB, half of which comes from the other GPU.
    assert training_seconds(memory=12, link=450) == pytest.approx(937.5 * 6 * 4 / 450)
    assert training_seconds(memory=12, link=25) == pytest.approx(937.5 * 6 * 4 / 25)
    # Of 60 GB, gathered once an update: 2 + 4 bytes a parameter, half of them from the other GPU.
    assert training_seconds(memory=60, link=450) == pytest.approx(937.5 * 3 / 450)
    # Of 10 GB nothing is left.
    assert cost.training(A_POLICY, 2, cost.Rates(memory=10)) is None


def test_kernels_take_time_to_launch():
    """16 passes of a pair on each of two GPUs, 122 kernels a layer of 10."""
    policy = replace(A_POLICY, parameters=1e6)
    taken, _ = cost.training(policy, 2, cost.Rates(matrix_rate=1e9, memory=0.8, launch=5))
    assert taken == pytest.approx(937.5 * 16 * 122 * 10 * 5e-6)


def test_fp8_halves_judging_and_the_cache_spares_two_compilations():
    usual, _ = cost.hours(cost.POLICIES[0], 8, cost.Rates())
    assert cost.hours(cost.POLICIES[0], 8, cost.Rates(fp8=True))[0]["judging"] == pytest.approx(usual["judging"] / 2)
    without = cost.hours(cost.POLICIES[0], 8, cost.Rates(cached=False))[0]
    assert 3600 * (without["starts"] - usual["starts"]) == pytest.approx(2 * cost.Rates().compile)


def test_cost_and_plan_count_the_same_bytes(monkeypatch, tmp_path):
    """benchmarks/cost.py against what `comal.sh --plan` prints (launch/experiment.py), with its settings."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import experiment

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("{}\n" * ((cost.PROMPTS + cost.TEST) // 2))
    values = {"NUM_SAMPLES": cost.K, "MAX_NEW_TOKENS": cost.RESPONSE, "MAX_PROMPT_TOKENS": cost.PROMPT}
    monkeypatch.setattr(experiment, "current", lambda: values)
    monkeypatch.setattr(experiment, "input_files", lambda: [prompts, prompts])
    assert cost.work(cost.JUDGE)["record bytes"] == experiment.record_bytes()
    monkeypatch.setenv("SAVE_MINUTES", "10")
    kept, best = 2, 1  # KEEP_CKPTS=last
    assert kept + best + experiment.resume_size(1) == 9
    size = f"{9 * cost.POLICIES[1].checkpoint / 1e12:.2f} TB"
    assert any(line.startswith("| 8B ") and size in line for line in cost.disk())


# ---------------------------------------------------------------------------------------------- gpu.sh


@pytest.fixture
def gpu_table(tmp_path, monkeypatch):
    """A function of the sections: (exit code, the table's rows) of gpu.py on the CPU, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    def measured(only):
        with pytest.raises(SystemExit) as ended:
            gpu.main(device="cpu", shape="tiny", only=only, output=str(tmp_path / "GPU.md"))
        lines = [line for line in (tmp_path / "GPU.md").read_text().splitlines() if line.startswith("| ")]
        return ended.value.code, [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    yield measured
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_gpu_measures_on_a_cpu_too(gpu_table):
    sections = "rates,exactness,throughput,kernels,attention"
    code, rows = gpu_table(sections)
    assert code == 0 and {row[0] for row in rows} == set(sections.split(","))
    assert [row[4] for row in rows if row[0] == "exactness"] == 4 * ["met"]
    assert not [row for row in rows if "failed" in row[2]]
    ways = {row[1].split(";")[0]: row[2:] for row in rows if row[0] == "attention"}
    for name in (
        "masked, torch's choice (the project's way)",
        "rows of their own, FlashAttention",
        "three calls, FlashAttention",
    ):
        assert "ms a layer" in ways[name][0] and ways[name][2] == "met"
    assert "Error" in ways["varlen, gathered keys"][0]  # only CUDA has it


@pytest.mark.parametrize("section", ["exactness", "kernels"])
def test_gpu_goes_on_after_a_section_that_fails(gpu_table, monkeypatch, section):
    """And its exit code says whether exactness could be shown."""

    def broken(bench):
        yield gpu.Row("the first figure", "1")
        raise RuntimeError("no | kernel\nat all")

    def right(bench):
        yield gpu.Row("the last figure", "2", "2", True)

    monkeypatch.setattr(gpu, "SECTIONS", gpu.SECTIONS | {section: broken, "attention": right})
    code, rows = gpu_table(f"attention,{section}")
    assert [row[1:3] for row in rows] == [
        ["the first figure", "1"],
        ["", "failed: RuntimeError: no / kernel"],
        ["the last figure", "2"],
    ]
    assert code == (section == "exactness")


def test_gpu_fails_where_a_result_is_not_exact(gpu_table, monkeypatch):
    """Log-probabilities that are off by a hundredth of a nat, in float32."""
    ours = gpu_sections.Bench.ours
    monkeypatch.setattr(gpu_sections.Bench, "ours", lambda self, *arguments: ours(self, *arguments) + 0.01)
    code, rows = gpu_table("exactness")
    assert code == 1 and rows[0][4] == "**off**"


def test_varlen_sequences_see_what_the_mask_allows():
    """The kernel is CUDA's alone; its sequences, one by one, with the last query at the last key: the masked result."""
    lengths, config = (5, 3, 4), common.make_config("tiny")
    inputs, gradient = attention.make_inputs(config, lengths, torch.device("cpu"), torch.float32)
    mask = attention.make_masks(lengths, "cpu", torch.float32)["boolean"]
    expected = attention.output_and_gradients(attention.WAYS[0], inputs, gradient, mask, lengths)

    def one_by_one(query, key, value, cu_query, cu_key, longest_query, longest_key, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa and (longest_query, longest_key) == (5, 9)
        outputs = []
        for i in range(3):
            own, seen = slice(*cu_query[i : i + 2]), slice(*cu_key[i : i + 2])
            count, total = own.stop - own.start, seen.stop - seen.start
            allowed = torch.ones(count, total, dtype=torch.bool).tril(total - count)
            states = [one[piece].transpose(0, 1) for one, piece in ((query, own), (key, seen), (value, seen))]
            outputs.append(F.scaled_dot_product_attention(*states, attn_mask=allowed, enable_gqa=True).transpose(0, 1))
        return torch.cat(outputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", one_by_one)
        way = next(way for way in attention.WAYS if way.attend is attention.varlen)
        found = attention.output_and_gradients(way, inputs, gradient, mask, lengths)
    for one, other in zip(found, expected):
        assert attention.relative(one, other) < 1e-5


UNDER_FSDP = """
import sys

sys.path[:0] = ["benchmarks", "tests/helpers"]
import fsdp_on_cpu
import gpu
from training import models

if __name__ == "__main__":
    models.Accelerator = fsdp_on_cpu.FSDPAccelerator
    gpu.main(device="cpu", shape="tiny", only="exactness,throughput,kernels", output=sys.argv[1])
"""


@pytest.mark.slow
def test_gpu_measures_under_fsdp(tmp_path):
    """One process of real FSDP 2, as on one GPU."""
    (tmp_path / "script.py").write_text(UNDER_FSDP)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "fsdp_config.yaml", "--num_processes", "1"]
    command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path / "GPU.md")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "GPU.md").read_text()
    assert "failed" not in found and found.count("| exactness | bfloat16") == 2


@pytest.mark.slow
def test_gpu_starts_engines_and_simulations(gpu_table, monkeypatch):
    # test_simulation.py simulates; each process for it would import torch.
    monkeypatch.setattr(gpu_sections, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    monkeypatch.setattr(gpu_sections, "simulated_peak", lambda *case: 2**30)
    monkeypatch.setitem(gpu_sections.SIZES, "tiny", (*gpu_sections.SIZES["tiny"][:4], [(1, 15)]))
    code, rows = gpu_table("vllm")
    assert code == 0 and not [row for row in rows if "failed" in row[2]]
    assert {row[1] for row in rows} >= {"sampling, start", "judging, start", "judging, 3 prompts"}
    with pytest.raises(utils.StageError, match="got memory"):  # of a process on a CPU it would say nothing
        gpu_table("memory")
    rows = list(gpu_sections.memory(gpu_sections.Bench("cpu", "tiny")))  # the code runs all the same
    assert len(rows) == 3 and all("simulated" in row.goal and "GiB" in row.figure for row in rows[:2])
