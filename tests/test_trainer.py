"""The training loop in one process, with tiny models on the CPU.

    python -m pytest tests/test_trainer.py        (-s shows the differences that were measured)

In float32, losses and gradient norms of computations that differ in batching, padding and summation agreed to 6e-7
relative.
"""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.training import (
    BETA,
    ETA,
    FLOAT32,
    LOGP_FIELDS,
    R,
    broken_model,
    column,
    load,
    pair_losses,
    plain_logps,
    read,
    relative_difference,
    run_here,
    saved_tensors,
    write,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dpo
import get_logprobs
import inpo
import ipo
from training import trainer
from training.start_check import TOLERANCE, check_start, furthest_off
from training.trainer import data_order, learning_rate
from utils import StageError


def learning_rates(total_steps, warmup_ratio):
    config = SimpleNamespace(learning_rate=8.0, warmup_ratio=warmup_ratio)
    return [learning_rate(config, step, total_steps) for step in range(total_steps)]


def test_learning_rate_rises_in_the_warm_up_and_then_falls_to_zero():
    assert learning_rates(10, warmup_ratio=0.2) == [4, 8, 8, 7, 6, 5, 4, 3, 2, 1]  # the next would be 0
    assert learning_rates(4, warmup_ratio=0.3) == [4, 8, 8, 4]  # 1.2 steps are 2
    assert learning_rates(4, warmup_ratio=0.0) == [8, 6, 4, 2]
    assert learning_rates(4, warmup_ratio=1.0) == [2, 4, 6, 8]
    assert learning_rates(1, warmup_ratio=0.1) == [8]


def order(seed, epoch, shuffle=True):
    return data_order(SimpleNamespace(seed=seed, shuffle=shuffle), 20, epoch)


def test_data_order_is_a_function_of_seed_and_epoch():
    first = order(0, 0)
    torch.manual_seed(1)  # what else was drawn does not matter
    assert order(0, 0) == first
    assert sorted(first) == list(range(20)) != first
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0, shuffle=False) == order(1, 5, shuffle=False) == list(range(20))


def test_training_equals_a_plain_loop_also_in_the_incomplete_last_batch(train, setting, tmp_path):
    # Five pairs in batches of four: the fifth makes an update of its own, with its full loss. Learning rates by hand.
    records, rates = setting.records[:5], [3e-5, 3e-5, 2e-5, 1e-5]
    model = load(setting.policy)
    optimizer = torch.optim.AdamW(model.parameters())  # whose own weight decay is our default
    expected = []
    for batch, rate in zip([records[:4], records[4:]] * 2, rates):
        losses = pair_losses(model, batch)
        losses.mean().backward()
        with torch.no_grad():
            values = torch.tensor([plain_logps(model, record) for record in batch])  # (N, 2)
            last, ref = (
                torch.tensor([[record[f"{name}_{side}_logp"] for side in ("chosen", "rejected")] for record in batch])
                for name in ("last", "ref")
            )
            untouched = pair_losses(load(setting.policy), batch).mean().item()
        margins = (values - last)[:, 0] - (values - last)[:, 1]
        expected.append(
            {
                "loss": losses.mean().item(),
                "normalised_loss": losses.mean().item() / untouched,
                "margin": margins.mean().item(),
                "kl_last": (last - values).mean().item(),
                "kl_ref": (values - ref).mean().item(),
                "accuracy": (margins > 0).float().mean().item(),
                "learning_rate": rate,
                "grad_norm": torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(),
            }
        )
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    output = train(
        input=write(tmp_path / "five.jsonl", records),
        global_batch_size=4,
        micro_batch_tokens=150,
        num_epochs=2,
        warmup_ratio=0.25,
        shuffle=False,
        max_grad_norm=1.0,
    )
    for name in ("loss", "normalised_loss", "grad_norm", "learning_rate"):
        assert relative_difference(column(output, name), [step[name] for step in expected]) < FLOAT32, name
    for name in ("margin", "kl_last", "kl_ref"):  # in nats; measured: under 5e-6
        assert column(output, name) == pytest.approx([step[name] for step in expected], abs=2e-5), name
    assert column(output, "accuracy")[1:] == [step["accuracy"] for step in expected[1:]]  # at step 1 it is rounding
    # Adam's first steps divide gradients by their own size, also those that are rounding: hence norms, not single
    # weights.
    trained, plain, start = (weights.state_dict() for weights in (load(output / "model"), model, load(setting.policy)))
    distance = lambda one, other: sum((one[name] - other[name]).square().sum() for name in plain) ** 0.5
    assert distance(trained, plain) < 1e-3 * distance(plain, start)  # measured: 1e-4


def test_training_starts_at_the_last_policy_and_its_loss_falls(train, setting, capsys, caplog):
    caplog.set_level("INFO")
    output = train(num_epochs=6)
    off = float(caplog.text.split("off by up to ")[1].split(" nats")[0])
    distance = abs(column(output, "normalised_loss")[0] - 1)
    with capsys.disabled():
        print(
            f" [float32: stored log-probabilities off by {off:.1e} nats, normalised loss from 1 by {distance:.1e}] ",
            end="",
        )
    assert off < 1e-4  # measured: 4e-6, sums of up to 160 nats
    assert distance < 1e-6  # measured: 3e-8; 2e-7 with other settings
    losses = column(output, "loss")
    assert all(later < earlier for earlier, later in zip(losses, losses[1:])) and losses[-1] < 0.8 * losses[0]
    assert re.search(r"step 6/6 \| loss \S+ \| normalised_loss 0\.\d{4} \| margin ", capsys.readouterr().out)


def test_metrics_and_files_of_a_checkpoint(train, setting):
    output = train(max_grad_norm=1.0, global_batch_size=4, num_epochs=2)
    assert {path.name for path in output.iterdir()} == {
        "model",
        "DONE",
        "metrics.jsonl",
        "training.json",
        "tensorboard",
    }
    steps = read(output / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert set(step) == {
            "step",
            "loss",
            "normalised_loss",
            "margin",
            "accuracy",
            "kl_last",
            "kl_ref",
            "grad_norm",
            "learning_rate",
            "tokens_per_s",
        }
    training = json.loads((output / "training.json").read_text())
    assert training["learning_rate"] == 3e-5 and {"torch", "transformers", "accelerate", "commit"} <= set(training)
    assert json.loads((output / "DONE").read_text()) == {"updates": 6}


def test_losses_do_not_depend_on_the_micro_batches(train):
    runs = [
        column(train(output=f"micro{tokens}", micro_batch_tokens=tokens, global_batch_size=8), "loss")
        for tokens in (0, 150, 10_000)
    ]
    assert len(runs[0]) == 8 and len(set(runs[0])) == 8
    assert relative_difference(runs[1], runs[0]) < FLOAT32 and relative_difference(runs[2], runs[0]) < FLOAT32


def test_gradient_checkpointing_gives_the_same_losses(train, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    calls = []
    forward = Qwen2Attention.forward
    monkeypatch.setattr(Qwen2Attention, "forward", lambda *args, **kwargs: calls.append(0) or forward(*args, **kwargs))
    runs, counts = [], []
    for checkpointing in (False, True):
        calls.clear()
        runs.append(column(train(output=str(checkpointing), gradient_checkpointing=checkpointing), "loss"))
        counts.append(len(calls))
    assert relative_difference(*runs) < FLOAT32
    assert counts[1] == 2 * counts[0]  # it did recompute


def pair_loss_at_start(record, method, soft):
    """What the data file alone says about the loss of the last policy."""

    def difference(name):
        return record[f"{name}_chosen_logp"] - record[f"{name}_rejected_logp"]

    last, ref = difference("last"), difference("ref")
    p = record["win_prob"] if soft else 1
    target = (2 * p - 1) / (2 * ETA)
    return {
        "inpo": (R * (last - ref) - target) ** 2,  # the share 1 - R of the last policy itself cancels
        "ipo": (last - ref - target) ** 2,
        "dpo": math.log1p(math.exp(-BETA * (last - ref))) + (1 - p) * BETA * (last - ref),
    }[method]


@pytest.mark.parametrize(
    "method, soft", [("inpo", False), ("inpo", True), ("ipo", False), ("ipo", True), ("dpo", False), ("dpo", True)]
)
def test_first_loss_of_every_method_by_hand(train, setting, method, soft):
    main = {"inpo": inpo.main, "ipo": ipo.main, "dpo": dpo.main}[method]
    own = {"inpo": dict(eta=ETA, tau_eta_ratio=R), "ipo": dict(eta=ETA), "dpo": dict(beta=BETA)}[method]
    own |= {"soft_labels": True} if soft else {}
    output = train(main, global_batch_size=11, micro_batch_tokens=10_000, num_epochs=1, **own)
    expected = sum(pair_loss_at_start(record, method, soft) for record in setting.records) / len(setting.records)
    assert relative_difference(column(output, "loss"), [expected]) < FLOAT32
    assert abs(column(output, "normalised_loss")[0] - 1) < FLOAT32


def test_data_of_another_model_is_refused(train, setting):
    with pytest.raises(StageError, match=r"stored log-probabilities differ .* by up to \d.* nats .*get_logprobs.py"):
        train(model=setting.reference)
    train(model=setting.reference, output="allowed", start_tolerance=1000)


def test_what_is_allowed_at_the_start_grows_with_the_root_of_the_length():
    rows = [([1], [[2] * 100, [2] * 4])]
    off = torch.tensor([0.9 * 10 * TOLERANCE["bf16"], -1.1 * 2 * TOLERANCE["bf16"]])  # nats over 100 and over 4 tokens
    bfloat16, float32 = (SimpleNamespace(mixed_precision=precision) for precision in ("bf16", "no"))
    config = SimpleNamespace(start_tolerance=0.0, input="data.jsonl", model="policy")
    found = furthest_off(config, off, rows, bfloat16).tolist()
    assert found == pytest.approx([1.1, 2.2 * TOLERANCE["bf16"], 4])
    with pytest.raises(
        StageError, match=r"data.jsonl: .* those of policy by up to 0.44 nats \(over 4 tokens, allowed: 0.4\)"
    ):
        check_start(config, found, 1.0)
    assert furthest_off(config, off / 100, rows, float32).tolist() == pytest.approx([1.1, 2.2 * TOLERANCE["no"], 4])
    config.start_tolerance = 2.0
    found = furthest_off(config, off, rows, bfloat16).tolist()
    assert found == pytest.approx([4.5 * TOLERANCE["bf16"], 9 * TOLERANCE["bf16"], 100])
    check_start(config, found, 1.0)


@pytest.mark.parametrize("side, off", [("chosen", 0.1), ("rejected", -0.1)])
def test_a_single_pair_of_another_model_is_refused(train, setting, tmp_path, side, off):
    records = [dict(record) for record in setting.records]
    records[5][f"last_{side}_logp"] += off  # in the second of three micro-batches
    with pytest.raises(StageError, match="by up to 0.1 nats"):
        train(input=write(tmp_path / "data.jsonl", records), shuffle=False)


def test_a_loss_that_is_not_a_number_stops_with_the_prompt_ids(train, setting, tmp_path):
    with pytest.raises(StageError, match=r"loss nan at step 1; prompt ids of the batch: p0, p1, p2$"):
        train(model=broken_model(setting, tmp_path / "broken"), global_batch_size=3, shuffle=False)
    assert not (tmp_path / "ckpt/DONE").exists() and not (tmp_path / "ckpt/model").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"learning_rate": 0}, "--learning_rate should be greater than 0"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio"),
        ({"save_minutes": -1}, "--save_minutes should be at least 0"),
        ({"select": "first"}, "--select should be best or last"),
        ({"eta": 0}, "--eta should be greater than 0"),
        ({"tau_eta_ratio": 2}, "--tau_eta_ratio"),
        ({"input": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"max_length": 30}, "exceed --max_length 30"),
    ],
)
def test_bad_settings_are_refused(train, flags, message):
    with pytest.raises(StageError, match=message):
        train(**flags)


def test_bfloat16_training_starts_where_log_probabilities_say(setting, tmp_path, train, capsys):
    data = tmp_path / "data.jsonl"
    flags = dict(model=setting.policy, reference=setting.reference, input=setting.pairs, output=str(data))
    run_here(get_logprobs.main, mixed_precision="bf16", **flags)
    same, batched = (
        train(output=f"{tokens}", input=str(data), micro_batch_tokens=tokens, num_epochs=1, mixed_precision="bf16")
        for tokens in (0, 10_000)
    )
    stored = [record[name] for record in read(data) for name in LOGP_FIELDS]
    exact = [record[name] for record in setting.records for name in LOGP_FIELDS]
    rounding = max(abs(a - b) for a, b in zip(stored, exact))
    off_same, off_batched = (abs(column(output, "normalised_loss")[0] - 1) for output in (same, batched))
    with capsys.disabled():
        print(
            f" [bfloat16: log-probabilities off the float32 ones by {rounding:.2f} nats; normalised loss from 1 by "
            f"{off_same:.1e} in the layout of get_logprobs.py, {off_batched:.1e} in batches of 11] ",
            end="",
        )
    assert 1e-3 < rounding < 0.5  # it did run in bfloat16; measured: 0.12
    assert off_same < 1e-6  # the same forward path: measured 0
    assert off_batched < 1e-3  # measured: 3e-4
    assert {value.dtype for value in saved_tensors(same / "model").values()} == {torch.float32}


def test_no_value_is_read_before_all_micro_batches_are_done(setting, train, tmp_path, monkeypatch):
    """So that a GPU never waits for the program. Tensors without data have no values: what reads one raises."""
    run_batch, on_device, transfers = trainer.Trainer.run_batch, trainer.on_device, []

    def without_data(self, *arguments, **settings):
        with FakeTensorMode(allow_non_fake_inputs=True):
            return run_batch(self, *arguments, **settings)

    monkeypatch.setattr(trainer.Trainer, "run_batch", without_data)
    monkeypatch.setattr(trainer, "on_device", lambda *arguments: transfers.append(1) or on_device(*arguments))
    with pytest.raises(DataDependentOutputException):
        train(input=write(tmp_path / "three.jsonl", setting.records[:3]), micro_batch_tokens=0)
    assert len(transfers) == 3  # one a micro-batch, and each has one of the pairs
