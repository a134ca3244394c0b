"""get_logprobs.py in one process, with tiny models on the CPU.

python -m pytest tests/test_get_logprobs.py
"""

import re

import pytest
from helpers.training import (
    LOGP_FIELDS,
    broken_model,
    column,
    make_pairs,
    read,
    run_here,
    write,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import get_logprobs
from data_utils import end_token_id
from records import PAIR_KEYS
from training.models import micro_batches
from utils import StageError


def logprobs(setting, output, **flags):
    defaults = dict(model=setting.policy, reference=setting.reference, input=setting.pairs, output=str(output))
    run_here(get_logprobs.main, **(defaults | flags))


@pytest.mark.parametrize("tokens", [0, 150])
def test_get_logprobs_equals_the_plain_computation_in_order(setting, tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(get_logprobs, "GATHER_EVERY", 2)
    pairs = read(setting.pairs)
    files = [write(tmp_path / "one.jsonl", pairs[:4]), write(tmp_path / "two.jsonl", pairs[4:][::-1])]
    outputs = [str(tmp_path / "out" / name) for name in ("one.jsonl", "two.jsonl")]
    logprobs(setting, ",".join(outputs), input=",".join(files), micro_batch_tokens=tokens)
    written = read(outputs[0]) + read(outputs[1])
    for record, pair in zip(written, setting.records[:4] + setting.records[4:][::-1], strict=True):
        for name in LOGP_FIELDS:
            assert record.pop(name) == pytest.approx(pair[name], abs=2e-5), (
                pair["prompt_id"],
                name,
            )  # measured: under 5e-6
        lengths = {f"{side}_num_tokens": len(pair[f"{side}_token_ids"]) for side in ("chosen", "rejected")}
        assert record == {name: value for name, value in pair.items() if name not in LOGP_FIELDS} | lengths


def test_get_logprobs_loads_one_model_where_both_are_the_same(setting, tmp_path, monkeypatch, caplog):
    loaded = []
    caplog.set_level("INFO")
    load_model = get_logprobs.load_model
    monkeypatch.setattr(get_logprobs, "load_model", lambda name: loaded.append(name) or load_model(name))
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/model").symlink_to(setting.policy)
    logprobs(
        setting,
        tmp_path / "out.jsonl",
        model=str(tmp_path / "ckpt"),
        reference=str(tmp_path / "ckpt/model"),
    )
    assert len(loaded) == 1
    said = [re.sub(r"\d+\.\d\d s$", "T s", message) for message in caplog.messages]
    assert "loaded in T s" in said and said.count("11 pairs in T s") == 1
    for record, pair in zip(read(tmp_path / "out.jsonl"), setting.records, strict=True):
        for side in ("chosen", "rejected"):
            assert record[f"last_{side}_logp"] == record[f"ref_{side}_logp"]
            assert record[f"last_{side}_logp"] == pytest.approx(pair[f"last_{side}_logp"], abs=2e-5)


def test_get_logprobs_tokenises_pairs_from_elsewhere(setting, tmp_path, train):
    foreign = [
        {name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in make_pairs(setting.tokenizer, 11)
    ]
    foreign[0]["chosen"][-1]["content"] += "<|im_end|>"  # spelt in the text, it is no special token
    logprobs(setting, tmp_path / "out.jsonl", input=write(tmp_path / "in.jsonl", foreign))
    written = read(tmp_path / "out.jsonl")
    for record, pair in list(zip(written, setting.records, strict=True))[1:]:
        for name in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
            assert record[name] == pair[name]
        assert record["ref_rejected_logp"] == pytest.approx(pair["ref_rejected_logp"], abs=2e-5)
    assert written[0]["chosen_token_ids"].count(end_token_id(setting.tokenizer)) == 1
    assert {record["win_prob"] for record in written} == {1.0}
    assert len({record["prompt_id"] for record in written}) == 11
    output = train(input=str(tmp_path / "out.jsonl"))
    assert abs(column(output, "normalised_loss")[0] - 1) < 1e-6


def test_get_logprobs_goes_on_where_it_was_stopped(setting, tmp_path, monkeypatch):
    """Stopped in the second model; of the last forward pass that was kept, one pair is torn on disk."""
    tokens = 150
    groups = micro_batches(
        range(11), [sum(len(pair[name]) for name in PAIR_KEYS[1:]) for pair in setting.records], tokens
    )
    assert len(groups) > 4 and len(groups[2]) > 1
    expected, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    logprobs(setting, expected, micro_batch_tokens=tokens)
    prompts = [pair["prompt_token_ids"] for pair in setting.records]
    seen, compute = [], get_logprobs.response_logps

    def stopping(model, rows, device):
        seen.append([prompts.index(prompt) for prompt, _ in rows])
        if len(seen) == len(groups) + 4:
            raise KeyboardInterrupt
        return compute(model, rows, device)

    monkeypatch.setattr(get_logprobs, "response_logps", stopping)
    monkeypatch.setattr(get_logprobs, "GATHER_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        logprobs(setting, output, micro_batch_tokens=tokens)
    kept = tmp_path / "out.jsonl.ref.partial"
    assert not output.exists() and len(read(tmp_path / "out.jsonl.last.partial")) == 12
    assert len(read(kept)) == 1 + sum(map(len, groups[:3]))
    kept.write_bytes(kept.read_bytes()[:-20])
    del seen[:]
    logprobs(setting, output, micro_batch_tokens=tokens)
    assert seen == groups[2:]
    assert output.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_get_logprobs_reads_values_once_for_many_forward_passes(setting, tmp_path, monkeypatch):
    """So that a GPU seldom waits for the program. Tensors without data have no values: what reads one raises."""
    compute, response_logps, passes = get_logprobs.compute, get_logprobs.response_logps, []

    def without_data(*arguments):
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield from compute(*arguments)

    monkeypatch.setattr(get_logprobs, "compute", without_data)
    monkeypatch.setattr(get_logprobs, "response_logps", lambda *given: passes.append(1) or response_logps(*given))
    monkeypatch.setattr(get_logprobs, "GATHER_EVERY", 4)
    with pytest.raises(DataDependentOutputException):
        logprobs(setting, tmp_path / "out.jsonl")
    assert len(passes) == 4


def test_get_logprobs_writes_nothing_where_a_value_is_not_finite(setting, tmp_path):
    with pytest.raises(StageError, match="no finite log-probability for prompt_id p0, p1"):
        logprobs(setting, tmp_path / "out/data.jsonl", reference=broken_model(setting, tmp_path / "broken"))
    assert not (tmp_path / "out/data.jsonl").exists()
