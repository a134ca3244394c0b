"""training/datasets.py: data sets and their batches, with two tiny tokenizers.

python -m pytest tests/test_datasets.py
"""

import json

import pytest
import torch

from data_utils import encode_prompt, encode_text, end_token_id
from training.datasets import ChatDataset, PairDataset, UnscoredPairDataset
from utils import StageError


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


def test_jsonl_dataset_reads_any_line_in_any_order(tmp_path, tokenizers):
    texts = ["plain", "naïve 東京 🙂", "a\u2028b\u2029c\x85d", "line\nbreak", ""]
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps({"messages": user("x") + assistant(text)}, ensure_ascii=False) for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())  # a byte order mark, no line break at the end
    dataset = ChatDataset(path, tokenizers["policy"], 100, 664)
    assert len(dataset) == 5
    assert [dataset[i]["messages"][-1]["content"] for i in (4, 2, 0, 3, 1, 2)] == [texts[i] for i in (4, 2, 0, 3, 1, 2)]


# ---- PairDataset ----


def pair(prompt_id="a", **changes):
    return {
        "prompt_id": prompt_id,
        "prompt_token_ids": [5, 6],
        "chosen_token_ids": [7, 8, 9],
        "rejected_token_ids": [7],
        "win_prob": 0.75,
        "last_chosen_logp": -1.5,
        "last_rejected_logp": -2.5,
        "ref_chosen_logp": -3,
        "ref_rejected_logp": -4.25,
    } | changes


def pairs(jsonl, tokenizers, *records, kind=PairDataset, max_length=16):
    return kind(jsonl("pairs.jsonl", *records), tokenizers["policy"], max_length, vocab_size=664)


def test_pair_dataset_collates_a_pair(jsonl, tokenizers):
    dataset = pairs(jsonl, tokenizers, pair())
    batch = dataset.collate([dataset[0]])
    assert batch["rows"] == [([5, 6], [[7, 8, 9], [7]])] and dataset.lengths == [6]
    numbers = {name: values.tolist() for name, values in batch.items() if name.endswith(("_logps", "win_prob"))}
    assert numbers == {
        "win_prob": [0.75],
        "last_chosen_logps": [-1.5],
        "last_rejected_logps": [-2.5],
        "ref_chosen_logps": [-3.0],
        "ref_rejected_logps": [-4.25],
    }
    assert all(batch[name].dtype == torch.float32 for name in numbers)


def test_pair_dataset_collates_a_row_each(jsonl, tokenizers):
    other = pair("b", prompt_token_ids=[1], chosen_token_ids=[2], rejected_token_ids=[3, 4])
    dataset = pairs(jsonl, tokenizers, pair(), other)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch["rows"] == [([5, 6], [[7, 8, 9], [7]]), ([1], [[2], [3, 4]])]
    assert dataset.ids == ["a", "b"]
    assert dataset.weights == [1.0, 1.0]


def test_pair_dataset_takes_exactly_max_length_and_the_last_token_of_the_vocabulary(jsonl, tokenizers):
    assert len(pairs(jsonl, tokenizers, pair(rejected_token_ids=[0, 663]), max_length=5)) == 1


@pytest.mark.parametrize("name", ["prompt_token_ids", "chosen_token_ids", "rejected_token_ids"])
def test_pair_dataset_refuses_empty_sequences(jsonl, tokenizers, name):
    with pytest.raises(StageError, match=f"{name}.* should not be empty"):
        pairs(jsonl, tokenizers, pair(**{name: []}))


@pytest.mark.parametrize("name", ["win_prob", "ref_chosen_logp", "last_rejected_logp"])
def test_pair_dataset_needs_every_number(jsonl, tokenizers, name):
    with pytest.raises(StageError, match=f"line 1: prompt_id a: field {name} is missing"):
        pairs(jsonl, tokenizers, {key: value for key, value in pair().items() if key != name})
    with pytest.raises(StageError, match=f"line 1: prompt_id a: {name} should be float, got '0.5'"):
        pairs(jsonl, tokenizers, pair(**{name: "0.5"}))


# ---- UnscoredPairDataset ----


def test_unscored_pair_dataset_tokenises_pairs_from_elsewhere(jsonl, tokenizers):
    tokenizer = tokenizers["policy"]
    record = {
        "prompt": user("Sea or city?<|im_end|>"),
        "chosen": [{"role": "assistant", "content": "The sea.<|im_end|>"}],
        "rejected": [{"role": "assistant", "content": "The city.\u2028"}],
    }
    dataset = pairs(jsonl, tokenizers, record, kind=UnscoredPairDataset, max_length=200)
    found, end = dataset[0], tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found["prompt_token_ids"] == encode_prompt(tokenizer, "Sea or city?<|im_end|>")
    assert found["win_prob"] == 1.0
    for side, text in (("chosen", "The sea.<|im_end|>"), ("rejected", "The city.\u2028")):
        ids = found[f"{side}_token_ids"]
        assert ids[-1] == end and end not in ids[:-1]
        assert tokenizer.decode(ids[:-1]) == text
    assert dataset.ids == [found["prompt_id"]] == [dataset[0]["prompt_id"]]


def test_unscored_pair_dataset_keeps_ids_and_labels_that_are_there(jsonl, tokenizers):
    texts = {"prompt": user("x"), "chosen": assistant("y"), "rejected": assistant("z")}
    ids = {
        f"{side}_token_ids": encode_text(tokenizers["policy"], text)
        for side, text in (("chosen", "y"), ("rejected", "z"))
    }
    ours = pair("a") | texts | ids
    foreign = {"prompt_id": "b", "win_prob": 0.9} | texts
    dataset = pairs(jsonl, tokenizers, ours, foreign, kind=UnscoredPairDataset, max_length=100)
    assert dataset[0] == ours
    assert (dataset[1]["prompt_id"], dataset[1]["win_prob"]) == ("b", 0.9)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ref_rejected_logp": -1e31}, "ref_rejected_logp should be a log-probability, 0 or less"),
        ({"chosen_token_ids": [1.0]}, "chosen_token_ids.0. should be int, got 1.0"),
        ({"prompt_token_ids": ["a"]}, "prompt_token_ids.0. should be int, got .a."),
    ],
)
def test_pair_dataset_refuses(tmp_path, jsonl, tokenizers, changes, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair() | changes) + "\n")
    with pytest.raises(StageError, match=f"prompt_id a: .*{message}"):
        PairDataset(path, tokenizers["policy"], 16, vocab_size=664)


def test_unscored_pair_dataset_gives_every_pair_an_id_of_its_own(jsonl, tokenizers):
    # Published preference data has several pairs a prompt; the data file that is made of them has one key a line.
    records = [{"prompt": user("x"), "chosen": assistant(answer), "rejected": assistant("z")} for answer in ("y", "w")]
    dataset = pairs(jsonl, tokenizers, *records, kind=UnscoredPairDataset, max_length=100)
    assert dataset[0]["prompt_id"] != dataset[1]["prompt_id"]


@pytest.mark.parametrize(
    "chosen", [user("y"), assistant(""), assistant("y") + user("more") + assistant("z"), ["y"], [{"role": "assistant"}]]
)
def test_unscored_pair_dataset_refuses_what_is_not_one_answer(jsonl, tokenizers, chosen):
    record = {"prompt": user("x"), "chosen": chosen, "rejected": assistant("z")}
    with pytest.raises(StageError, match=r"pairs.jsonl, line 1: .*chosen"):
        pairs(jsonl, tokenizers, record, kind=UnscoredPairDataset, max_length=100)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_unscored_pair_dataset_needs_conversations(jsonl, tokenizers, name):
    record = {"prompt": user("x"), "chosen": assistant("y"), "rejected": assistant("z")}
    for wrong in ("text", []):
        with pytest.raises(StageError, match=name):
            pairs(jsonl, tokenizers, record | {name: wrong}, kind=UnscoredPairDataset, max_length=100)


# ---- ChatDataset ----


def chat(prompt, answer, **more):
    return {"messages": user(prompt) + [{"role": "assistant", "content": answer}]} | more


def chats(jsonl, tokenizer, *records, max_length=100):
    return ChatDataset(jsonl("chats.jsonl", *records), tokenizer, max_length, vocab_size=len(tokenizer))


def test_chat_dataset_learns_the_answer_and_its_end_token_alone(jsonl, tokenizer):
    dataset = chats(jsonl, tokenizer, chat("Hello", "The sea.<|im_end|><|eot_id|>"), chat("Hello there", "No"))
    batch = dataset.collate([dataset[0], dataset[1]])
    end = end_token_id(tokenizer)
    for row, (prompt, answer) in enumerate([("Hello", "The sea.<|im_end|><|eot_id|>"), ("Hello there", "No")]):
        ids, (learnt,) = batch["rows"][row]
        assert tokenizer.decode(learnt[:-1]) == answer and learnt[-1] == end and end not in learnt[:-1]
        assert ids == encode_prompt(tokenizer, prompt)
        assert batch["num_tokens"][row] == len(learnt)
        assert dataset.lengths[row] == len(ids) + len(learnt)


def test_chat_dataset_weighs_by_weight_and_response_tokens(jsonl, tokenizers):
    tokenizer = tokenizers["policy"]
    length = len(encode_text(tokenizer, "Go to the sea.")) + 1
    examples = [chat("a", "Go to the sea.", **more) for more in ({}, {"weight": 0.25}, {"weight": 0})]
    assert chats(jsonl, tokenizer, *examples).weights == [length, 0.25 * length, 0]


@pytest.mark.parametrize("weight", ["heavy", None])
def test_chat_dataset_refuses_a_weight_that_is_no_number(jsonl, tokenizers, weight):
    with pytest.raises(StageError, match=f"chats.jsonl, line 1: weight should be float, got {weight!r}"):
        chats(jsonl, tokenizers["policy"], chat("a", "b", weight=weight))


@pytest.mark.parametrize("messages", [user("x"), assistant("y"), user("x") + assistant("y") + user("z")])
def test_chat_dataset_needs_a_prompt_and_an_answer(jsonl, tokenizers, messages):
    with pytest.raises(StageError, match="chats.jsonl, line 1: messages should (be a list of length >= 2|end with)"):
        chats(jsonl, tokenizers["policy"], {"messages": messages})


def test_chat_dataset_takes_exactly_max_length(jsonl, tokenizers):
    tokenizer = tokenizers["policy"]
    length = len(encode_prompt(tokenizer, "a")) + len(encode_text(tokenizer, "b")) + 1
    assert len(chats(jsonl, tokenizer, chat("a", "b"), max_length=length)) == 1
