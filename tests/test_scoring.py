"""scoring.py: files through real worker processes, with a stand-in for the judge.

python -m pytest tests/test_scoring.py
"""

import json

import pytest

import scoring
from judges import base as judges
from records import Record, read
from utils import StageError


def samples(prompt_id, *texts, prompt="x"):
    return {
        "prompt_id": prompt_id,
        "prompt": prompt,
        "prompt_token_ids": [1, 2],
        "samples": [{"text": text, "token_ids": [3] * len(text), "finish_reason": "stop"} for text in texts],
    }


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("{input} {output_1} {output_2}")
    return str(path)


def test_main_adds_win_probabilities_to_the_samples(some_model, jsonl, tmp_path, template, monkeypatch):
    monkeypatch.setitem(judges.JUDGE_TYPES, "generative", "helpers.work:LengthJudge")
    train = [
        samples("a", "yes", "no", "yes"),
        samples("b", "no", "no", "no"),
        samples("c", "x", "y", "z", prompt="skip"),
    ]
    test = [samples("a", "one", "three")]
    inputs = [jsonl("train.jsonl", *train), jsonl("test.jsonl", *test)]
    outputs = [tmp_path / "train.scores.jsonl", tmp_path / "test.scores.jsonl"]
    scoring.main(
        ",".join(map(str, inputs)),
        ",".join(map(str, outputs)),
        judge=some_model,
        template=template,
        gpus="none",
        chunk_size=2,
    )
    (a, b), (c,) = (list(read(path, Record)) for path in outputs)
    assert a == train[0] | {
        "win_probs": [[None, 0.75, 0.5], [0.25, None, 0.25], [0.5, 0.75, None]],
        "order_gap": 0,
        "label_mass": 1,
    }
    assert b == train[1] | {
        "win_probs": [[None, 0.5, 0.5], [0.5, None, 0.5], [0.5, 0.5, None]],
        "order_gap": None,
        "label_mass": None,
    }
    assert c == test[0] | {"win_probs": [[None, 0.25], [0.75, None]], "order_gap": 0, "label_mass": 1}
    assert list(read(tmp_path / "train.scores.skipped.jsonl", Record)) == [{"prompt_id": "c", "skipped": "too long"}]


def test_main_compares_policies_with_the_same_start_of_the_judge(some_model, jsonl, tmp_path, template, monkeypatch):
    monkeypatch.setitem(judges.JUDGE_TYPES, "generative", "helpers.work:LengthJudge")
    files = {
        name: str(jsonl(f"{name}.jsonl", samples("a", text), samples("b", "x")))
        for name, text in (("new", "yes"), ("start", "no"))
    }
    train = str(jsonl("train.jsonl", samples("a", "yes", "no")))
    options = dict(judge=some_model, template=template, gpus="none", responses=files["new"], baseline=files["start"])
    scoring.main(train, str(tmp_path / "scores.jsonl"), compared=str(tmp_path / "vs_start.jsonl"), **options)
    assert len(list(read(tmp_path / "scores.jsonl", Record))) == 1
    assert [record["win_probs"][0][1] for record in read(tmp_path / "vs_start.jsonl", Record)] == [0.75, 0.5]
    assert json.loads((tmp_path / "vs_start.json").read_text())["mean_win_prob"] == 0.625
    with pytest.raises(StageError, match="--compared has 2"):
        scoring.main(train, str(tmp_path / "other.jsonl"), compared="a.jsonl,b.jsonl", **options)
    with pytest.raises(StageError, match="--compared .* is written twice or is also an input"):
        scoring.main(train, str(tmp_path / "other.jsonl"), compared=files["new"], **options)


@pytest.mark.parametrize("field", ["prompt_id", "prompt", "prompt_token_ids", "samples"])
def test_main_needs_every_field_of_a_samples_file(some_model, jsonl, tmp_path, template, field):
    broken = {name: value for name, value in samples("b", "x", "y").items() if name != field}
    path = jsonl("train.jsonl", samples("a", "x", "y"), broken)
    with pytest.raises(StageError, match=f"train.jsonl, line 2: .*field {field} is missing"):
        scoring.main(str(path), str(tmp_path / "out"), judge=some_model, template=template, gpus="none")
    assert not (tmp_path / "out").exists()
