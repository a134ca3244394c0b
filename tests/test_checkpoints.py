"""What a training run saves, and what it replaces.

python -m pytest tests/test_checkpoints.py
"""

import json

import pytest
import torch
from helpers.training import (
    FLOAT32,
    column,
    load,
    pair_losses,
    read,
    relative_difference,
    run_here,
    save_model,
    saved_tensors,
    swap,
    write,
)
from transformers import AutoTokenizer

import get_logprobs
from data_utils import encode_chat
from utils import StageError


def test_checkpoint_loads_and_holds_tied_weights_once_in_float32(train, setting):
    output = train(validation=setting.data)
    tensors = saved_tensors(output / "model")
    assert "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    model = load(output / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tensors.keys() | {"lm_head.weight"} == model.state_dict().keys()
    with torch.no_grad():  # it is the model whose loss was reported
        loss = pair_losses(model, setting.records).mean().item()
    assert relative_difference([loss], column(output, "validation_loss")[-1:]) < FLOAT32
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    messages = [{"role": "user", "content": "Where to?"}]
    assert encode_chat(tokenizer, messages) == encode_chat(setting.tokenizer, messages)


def test_checkpoint_of_an_untied_model_has_its_own_head(train, setting, tmp_path):
    model = save_model(tmp_path / "untied", setting.config, seed=3, tie_word_embeddings=False)
    run_here(get_logprobs.main, model=model, reference=model, input=setting.pairs, output=str(tmp_path / "data.jsonl"))
    output = train(model=model, input=str(tmp_path / "data.jsonl"))
    tensors = saved_tensors(output / "model")
    assert tensors.keys() == load(model).state_dict().keys()
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("select", ["best", "last"])
def test_lowest_validation_loss_selects_the_checkpoint(train, setting, tmp_path, select):
    validation = [swap(record) for record in setting.records]
    output = train(
        validation=write(tmp_path / "validation.jsonl", validation),
        eval_steps=2,
        global_batch_size=4,
        num_epochs=2,
        select=select,
        keep_last=select == "best",
    )
    steps = [record["step"] for record in read(output / "metrics.jsonl") if "validation_loss" in record]
    assert steps == [2, 3, 4, 6]  # every second one and each epoch's end
    losses = column(output, "validation_loss")
    assert losses[0] == min(losses) and losses[-1] > 1.1 * losses[0]
    assert json.loads((output / "DONE").read_text()) == {
        "updates": 6,
        "best": {"step": 2, "validation_loss": losses[0]},
    }
    kept = {"best": [("model", losses[0]), ("last", losses[-1])], "last": [("model", losses[-1])]}[select]
    for name, loss in kept:
        with torch.no_grad():
            assert relative_difference([pair_losses(load(output / name), validation).mean().item()], [loss]) < FLOAT32
    assert (output / "last").exists() == (select == "best")


def test_a_complete_output_is_refused_and_an_unfinished_one_replaced(train, tmp_path):
    for name, marker in (("complete", "DONE"), ("unfinished", "metrics.jsonl")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model/old").write_text("")
        (tmp_path / name / marker).write_text("")
    with pytest.raises(StageError, match="complete .*DONE marker.*choose another --output"):
        train(output="complete")
    assert (tmp_path / "complete/model/old").exists()
    train(output="unfinished")
    assert not (tmp_path / "unfinished/model/old").exists() and (tmp_path / "unfinished/DONE").exists()


def test_an_output_that_holds_other_things_is_never_replaced(train, setting, tmp_path):
    model = save_model(tmp_path / "run/model", setting.config, seed=0)
    for flags, message in (
        ({"output": "run/model"}, "exists and is not a training run's"),
        ({"output": "run", "model": setting.policy}, "exists and is not a training run's"),
    ):
        with pytest.raises(StageError, match=message):
            train(**({"model": model} | flags))
    (tmp_path / "run/metrics.jsonl").write_text("")  # it did not finish, but its best weights start this run
    for flags in ({"model": model}, {"model": str(tmp_path / "run")}, {"tokenizer": model}):
        with pytest.raises(StageError, match="would replace .*run/model, which training reads"):
            train(output="run", **flags)
    assert (tmp_path / "run/model/model.safetensors").exists()
