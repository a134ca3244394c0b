"""Two processes on the CPU (gloo): DDP, and real FSDP 2 through fsdp_on_cpu.py, against one process.

python -m pytest tests/test_fsdp.py        (-s shows the differences that were measured)
"""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.training import (
    FLOAT32,
    LOGP_FIELDS,
    column,
    launch_several,
    load,
    read,
    relative_difference,
    run_here,
    save_model,
    words,
    write,
)
from safetensors.torch import load_file

import inpo
import mle

# Eleven pairs in batches of six and five: one or two forward passes an update on each process, of one to three pairs.
INPO = dict(eta=0.02, tau_eta_ratio=0.25, global_batch_size=6, micro_batch_tokens=150)
INPO |= dict(num_epochs=2, learning_rate=3e-5, max_grad_norm=1.0)

FINISHED = {"model", "DONE", "metrics.jsonl", "training.json", "tensorboard"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("two-processes")


def flags(setting, **changes):
    return INPO | dict(model=setting.policy, input=setting.data, validation=setting.data) | changes


@pytest.fixture
def one_process(setting, outputs):
    """The output directory of the same training in this process; done once."""
    output = outputs / "one"
    if not output.exists():
        run_here(inpo.main, **flags(setting, output=str(output)))
    return output


def differences(output, expected):
    """Largest relative difference of the per-step losses, of the gradient norms and of the validation losses, and
    largest absolute difference of a saved weight."""
    names = ("loss", "grad_norm", "validation_loss")
    relative = [relative_difference(column(output, name), column(expected, name)) for name in names]
    first, second = (load_file(directory / "model/model.safetensors") for directory in (output, expected))
    assert first.keys() == second.keys()  # neither holds the tied lm_head
    return *relative, max((first[name] - second[name]).abs().max().item() for name in first)


def check_against_one_process(name, output, expected, capsys):
    loss, grad_norm, validation_loss, weights = differences(output, expected)
    with capsys.disabled():
        print(
            f" [{name} against one process: losses {loss:.1e}, gradient norms {grad_norm:.1e}, validation losses "
            f"{validation_loss:.1e}, weights {weights:.1e}] ",
            end="",
        )
    assert max(loss, validation_loss) < FLOAT32
    assert grad_norm < 1e-5  # measured: 3e-6 under FSDP 2, 2e-7 under DDP
    assert weights < 1e-6  # measured: 7e-8, where the four updates moved them by up to 9e-5


# inpo.py, whose second process alone is told to stop, in the third of four updates.
STOPPED = """
import os, runpy, signal
from training.trainer import Trainer

def update(self, step, indices):
    global output
    output = self.checkpoints.output
    if step == 2 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return original(self, step, indices)

original, Trainer.update = Trainer.update, update
try:
    runpy.run_path("inpo.py", run_name="__main__")
finally:
    Trainer.update = original
    print(f"{len(list(output.glob('resume-3/*/*.distcp')))} shards")
"""


@pytest.fixture(scope="module")
def runs(setting, outputs):
    """All runs, in one launch: for each its `output` and `report` (see fsdp_on_cpu.py), and all that was `printed`."""
    untied_model = save_model(outputs / "untied-model", setting.config, seed=3, tie_word_embeddings=False)
    chats = write(
        outputs / "chats.jsonl", [{"messages": record["prompt"] + record["chosen"]} for record in setting.records]
    )
    logprobs = dict(model=setting.policy, reference=setting.reference, input=setting.pairs)
    bf16_data = outputs / "logprobs_bf16"
    last = setting.records[-1] | {"last_chosen_logp": setting.records[-1]["last_chosen_logp"] + 1}
    one_off = write(outputs / "one-off.jsonl", setting.records[:-1] + [last])
    runs = SimpleNamespace(chats=chats, untied_model=untied_model)
    jobs = []

    def job(name, script, flags, efficient=True, precision="no", fsdp=True):
        run = SimpleNamespace(output=outputs / name, report=outputs / f"{name}.json")
        setattr(runs, name, run)
        jobs.append(
            {
                "script": script,
                "argv": words(**flags | {"output": run.output}),
                "report": run.report,
                "fsdp": fsdp,
                "env": {"FSDP_CPU_RAM_EFFICIENT_LOADING": efficient, "ACCELERATE_MIXED_PRECISION": precision},
            }
        )

    job("ddp", "inpo.py", flags(setting), fsdp=False)
    job("float32", "inpo.py", flags(setting), efficient=False)
    job("efficient", "inpo.py", flags(setting, gradient_checkpointing=True))
    job("optimizer", "inpo.py", flags(setting, sharding="optimizer"))
    job("logprobs", "get_logprobs.py", logprobs)
    job("logprobs_bf16", "get_logprobs.py", logprobs, precision="bf16")
    copies = logprobs | {"sharding": "optimizer"}
    job("copies_bf16", "get_logprobs.py", copies, precision="bf16")
    job("copies_batched_bf16", "get_logprobs.py", copies | {"micro_batch_tokens": 150}, precision="bf16")
    job("logprobs_batched_bf16", "get_logprobs.py", logprobs | {"micro_batch_tokens": 150}, precision="bf16")
    job(
        "bf16", "inpo.py", flags(setting, input=bf16_data, validation=bf16_data, micro_batch_tokens=0), precision="bf16"
    )
    stopped = outputs / "stopped.py"
    stopped.write_text(STOPPED)
    for select in ("best", "last"):
        for name, script, save_minutes in ((f"whole_{select}", "inpo.py", 0), (f"stopped_{select}", stopped, 60)):
            job(name, script, flags(setting, select=select, save_minutes=save_minutes))
        job(f"resumed_{select}", "inpo.py", flags(setting, select=select, save_minutes=60))
        jobs[-1]["argv"][-1] = outputs / f"stopped_{select}"
    job(
        "untied", "mle.py", dict(model=untied_model, input=chats, global_batch_size=8, num_epochs=1, learning_rate=3e-5)
    )
    job(
        "random",
        "mle.py",
        dict(model=setting.config, from_config=True, input=chats, global_batch_size=11, num_epochs=1),
    )
    job("refused", "inpo.py", flags(setting, input=one_off, global_batch_size=11))
    (outputs / "jobs.json").write_text(json.dumps(jobs, default=str))
    runs.printed = launch_several(2, "tests/helpers/fsdp_on_cpu.py", outputs / "jobs.json").stdout
    for run in vars(runs).values():
        if hasattr(run, "report"):
            run.report = json.loads(run.report.read_text())
    return runs


def test_ddp_gives_the_losses_of_one_process(runs, one_process, capsys):
    assert (
        "global batch 6, dealt to 2 processes, 150 tokens a forward pass; 11 examples, 4 updates; MULTI_CPU, float32"
        in runs.printed
    )
    check_against_one_process("DDP", runs.ddp.output, one_process, capsys)


def test_fsdp_shards_every_parameter_and_gathers_layer_by_layer(runs):
    assert runs.float32.report["distributed_type"] == "FSDP" and runs.float32.report["timeout"] == "2:00:00"
    for run in (runs.float32, runs.efficient, runs.logprobs, runs.untied):
        assert {"", "model.layers.0", "model.layers.1"} <= set(run.report["units"])
        shards = run.report["shards"]
        assert {
            "model.embed_tokens.weight",
            "model.layers.1.mlp.down_proj.weight",
            "model.norm.weight",
        } <= shards.keys()
        for name, shapes in shards.items():
            assert shapes, f"{name} is no DTensor"
            (rows, *rest), local = shapes
            assert local == [rows // 2, *rest], name
    assert "lm_head.weight" in runs.untied.report["shards"] and "lm_head.weight" not in runs.float32.report["shards"]


@pytest.mark.parametrize("name", ["float32", "efficient", "optimizer"])
def test_fsdp_gives_the_losses_and_the_checkpoint_of_one_process(runs, name, one_process, capsys):
    # "efficient" also recomputes activations (--gradient_checkpointing).
    check_against_one_process(f"FSDP 2, {name},", getattr(runs, name).output, one_process, capsys)


def test_fsdp_gathers_and_reduces_less_where_only_the_optimiser_is_sharded(runs):
    """Four updates, the last of one pass and the others of two; after the second and the fourth a validation of three
    passes, and its weights saved. Three units: two layers, and the rest, which is kept until it is used again."""
    full, optimizer = runs.float32.report, runs.optimizer.report
    passes, validations = 2 + 2 + 2 + 1, 2
    assert full["reductions"] == passes * 3 and optimizer["reductions"] == 4 * 3
    assert full["gathers"] == passes * (3 + 2) + validations * (3 * 2 + 1)  # layers in the backward pass once more
    assert optimizer["gathers"] == 4 * 3 + validations * 3


def test_log_probabilities_of_a_copy_are_those_of_the_sharded_model_bit_for_bit(runs):
    for passes in ("", "_batched"):
        sharded, copies = (getattr(runs, f"{name}{passes}_bf16") for name in ("logprobs", "copies"))
        assert copies.output.read_bytes() == sharded.output.read_bytes()
        assert sharded.report["units"] and "units" not in copies.report
        assert copies.report["logps_dtypes"] == ["torch.float32"] and "gathers" not in copies.report
    assert runs.copies_bf16.output.read_bytes() != runs.logprobs.output.read_bytes()  # those are float32


def test_fsdp_efficient_loading_reads_the_weights_in_one_process(runs):
    assert all(norm > 1 for norm in runs.float32.report["loaded_norms"])
    assert [norm > 1 for norm in runs.efficient.report["loaded_norms"]] == [True, False]
    assert [norm > 1 for norm in runs.logprobs.report["loaded_norms"]] == [True, False]


def test_fsdp_gathers_a_checkpoint_that_transformers_loads(runs, setting):
    for output, tied in ((runs.efficient.output, True), (runs.untied.output, False)):
        tensors = load_file(output / "model/model.safetensors")
        assert ("lm_head.weight" in tensors) != tied
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        model = load(output / "model")
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
        assert {path.name for path in output.iterdir()} == FINISHED


def test_fsdp_trains_models_with_a_head_of_their_own_and_from_random_weights(runs, setting, tmp_path):
    run_here(
        mle.main,
        model=runs.untied_model,
        input=runs.chats,
        output=str(tmp_path / "untied"),
        global_batch_size=8,
        num_epochs=1,
        learning_rate=3e-5,
    )
    assert relative_difference(column(runs.untied.output, "loss"), column(tmp_path / "untied", "loss")) < FLOAT32
    run_here(
        mle.main,
        model=setting.config,
        from_config=True,
        input=runs.chats,
        output=str(tmp_path / "random"),
        global_batch_size=11,
        num_epochs=1,
    )
    assert relative_difference(column(runs.random.output, "loss"), column(tmp_path / "random", "loss")) < FLOAT32


def test_fsdp_get_logprobs_equals_the_plain_computation_in_order(runs, setting):
    for record, expected in zip(read(runs.logprobs.output), setting.records, strict=True):
        assert record["prompt_id"] == expected["prompt_id"]
        for name in LOGP_FIELDS:
            assert record[name] == pytest.approx(expected[name], abs=2e-5)  # measured: 5e-6


def test_fsdp_bfloat16_reduces_and_returns_float32(runs, setting, capsys):
    for run in (runs.bf16, runs.logprobs_bf16):
        assert run.report["policies"] == [
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, "
            "output_dtype=None, cast_forward_inputs=True)"
        ]
        assert run.report["logps_dtypes"] == ["torch.float32"]
    assert "bfloat16" not in "".join(runs.float32.report["policies"])
    rounding = max(
        abs(record[name] - expected[name])
        for name in LOGP_FIELDS
        for record, expected in zip(read(runs.logprobs_bf16.output), setting.records, strict=True)
    )
    distance = abs(column(runs.bf16.output, "normalised_loss")[0] - 1)
    with capsys.disabled():
        print(
            f" [FSDP 2 in bfloat16: log-probabilities off the float32 ones by {rounding:.2f} nats, normalised loss "
            f"from 1 by {distance:.1e}] ",
            end="",
        )
    assert 1e-3 < rounding < 0.5  # measured: 0.15
    assert distance < 1e-6  # get_logprobs.py took the same path: measured 0
    assert {tensor.dtype for tensor in load_file(runs.bf16.output / "model/model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("select", ["best", "last"])
def test_fsdp_goes_on_bit_for_bit_where_it_was_stopped(runs, outputs, select):
    whole, stopped, resumed = (getattr(runs, f"{name}_{select}") for name in ("whole", "stopped", "resumed"))
    assert stopped.report["exit_codes"] == [1, 1] and resumed.report["exit_codes"] == [0, 0]
    assert runs.printed.count("has a resume point after update 3; the same command goes on there") == 4
    assert runs.printed.count("resuming after step 3 of 4") == 2
    # Of weights and of optimiser, one a process; seen by two processes, twice.
    assert runs.printed.count("4 shards") == 4
    for name in ("step", "loss", "grad_norm", "kl_last", "validation_loss"):
        assert column(stopped.output, name) == column(whole.output, name), name
    first, second = ((run.output / "model/model.safetensors").read_bytes() for run in (stopped, whole))
    assert first == second
    assert {path.name for path in stopped.output.iterdir()} == FINISHED


def test_fsdp_refuses_in_all_processes_what_one_of_them_has_seen(runs):
    assert runs.refused.report["exit_codes"] == [1, 1] and "by up to 1 nats" in runs.printed
    assert runs.float32.report["exit_codes"] == [0, 0]


# ---------------------------------------------------------------------------------------------- two nodes


@pytest.fixture(scope="module")
def nodes(setting, outputs):
    """inpo.py in four processes, as of two nodes with two each: stopped after the third update, and then to its end;
    the `output`, the `reports` and all that was `printed`."""
    folder = outputs / "nodes"
    folder.mkdir()
    (folder / "stopped.py").write_text(STOPPED)
    jobs = [
        {
            "script": script,
            "argv": words(**flags(setting, save_minutes=60, output=folder / "ckpt")),
            "report": folder / f"{number}.json",
            "fsdp": True,
            "env": {"LOCAL_WORLD_SIZE": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": True},
        }
        for number, script in enumerate((folder / "stopped.py", "inpo.py"))
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    printed = launch_several(4, "tests/helpers/fsdp_on_cpu.py", folder / "jobs.json").stdout
    reports = [json.loads(job["report"].read_text()) for job in jobs]
    return SimpleNamespace(output=folder / "ckpt", reports=reports, printed=printed)


def test_nodes_hold_the_whole_model_each(nodes):
    assert "sharded within each of 2 nodes, replicated between them" in nodes.printed
    for report in nodes.reports:
        assert list(report["mesh"].values()) == [2, 2] and "replicate" in min(report["mesh"])
        (rows, *rest), local = report["shards"]["model.embed_tokens.weight"]
        assert local == [rows // 2, *rest]


def test_nodes_give_the_losses_and_the_checkpoint_of_one_process(nodes, one_process, capsys):
    assert [report["exit_codes"] for report in nodes.reports] == [[1] * 4, [0] * 4]
    assert nodes.printed.count("resuming after step 3 of 4") == 1  # the first process says it
    check_against_one_process("two nodes", nodes.output, one_process, capsys)
