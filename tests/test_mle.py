"""mle.py with a tiny model on the CPU.

python -m pytest tests/test_mle.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.training import FLOAT32, column, load, plain_logp, read, relative_difference, write

import mle
from data_utils import encode_chat, encode_text, end_token_id
from utils import StageError


@pytest.fixture
def chats(tmp_path, setting):
    """Three chats, the second of a quarter's weight, the third of none at all, each with its token ids."""
    answers = ["Go to the sea.", "Stay at home and read until the rain has passed.", "No."]
    question = {"role": "user", "content": "Where to?"}
    records = [
        {"prompt_id": f"c{n}", "messages": [question, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]
    records[1]["weight"], records[2]["weight"] = 0.25, 0  # the first has the default, 1
    prompt, end = encode_chat(setting.tokenizer, [question]), end_token_id(setting.tokenizer)
    ids = [(prompt, encode_text(setting.tokenizer, answer) + [end]) for answer in answers]
    return SimpleNamespace(path=write(tmp_path / "chats.jsonl", records), ids=ids)


def test_mle_loss_is_the_weighted_mean_over_response_tokens(train, setting, chats):
    output = train(
        mle.main, input=chats.path, global_batch_size=3, micro_batch_tokens=60, num_epochs=3, learning_rate=1e-3
    )
    with torch.no_grad():
        logps = [plain_logp(load(setting.policy), *ids).item() for ids in chats.ids]
    lengths = [len(response) for _, response in chats.ids]
    assert lengths[0] != lengths[1]
    expected = -(logps[0] + 0.25 * logps[1]) / (lengths[0] + 0.25 * lengths[1])
    assert relative_difference(column(output, "loss")[:1], [expected]) < FLOAT32
    assert column(output, "loss")[2] < column(output, "loss")[1] < expected
    assert column(output, "normalised_loss")[0] == 1
    assert set(read(output / "metrics.jsonl")[0]) == {
        "step",
        "loss",
        "normalised_loss",
        "learning_rate",
        "tokens_per_s",
    }


def test_mle_from_config_starts_from_random_weights_of_the_seed(train, setting, chats):
    flags = dict(model=setting.config, from_config=True, input=chats.path, global_batch_size=3, num_epochs=1)
    runs = [column(train(mle.main, output=f"run{n}", seed=seed, **flags), "loss") for n, seed in enumerate((0, 0, 1))]
    assert runs[0][0] == pytest.approx(math.log(664), abs=0.2)  # nearly uniform over the vocabulary; measured: 0.08
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(StageError, match="no weights"):  # without the flag weights are never made up
        train(mle.main, output="no", **(flags | {"from_config": False}))


def test_a_batch_without_weight_is_refused(train, chats):
    with pytest.raises(StageError, match="all examples of a batch have weight 0"):
        train(mle.main, input=chats.path, global_batch_size=1, shuffle=False)
