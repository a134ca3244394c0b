"""Exports: AlpacaEval's outputs, and checkpoints with a card.

python -m pytest tests/test_export.py
"""

import json

import pytest

from analysis.export import main as export
from utils import StageError


def test_alpaca_eval_outputs(jsonl, tmp_path):
    source = jsonl(
        "responses.jsonl", {"prompt_id": "1", "prompt": "é\u2028?", "samples": [{"text": "yes", "token_ids": [1]}]}
    )
    export("alpaca_eval", str(source), str(tmp_path / "outputs.json"), "mine")
    assert json.loads((tmp_path / "outputs.json").read_text()) == [
        {"instruction": "é\u2028?", "output": "yes", "generator": "mine"}
    ]


@pytest.mark.parametrize(
    "path, generator", [("exps/run/iter3/eval/responses.jsonl", "iter3"), ("responses.jsonl", "responses")]
)
def test_the_generator_is_named_by_the_path(tmp_path, monkeypatch, path, generator):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text('{"prompt_id": "1", "prompt": "?", "samples": [{"text": "yes"}]}\n')
    export("alpaca_eval", path, "outputs.json")
    assert json.loads((tmp_path / "outputs.json").read_text())[0]["generator"] == generator


@pytest.fixture
def checkpoint(some_model, tmp_path):
    """A finished iteration's checkpoint, with the files that a card is made from."""
    import shutil

    iteration = tmp_path / "exps/run/iter3"
    shutil.copytree(some_model, iteration / "ckpt/model")
    (iteration / "eval").mkdir()
    (iteration / "ckpt/training.json").write_text(json.dumps({"loss": "inpo", "eta": 0.002, "tokenizer": ""}))
    (iteration.parent / "run.json").write_text(
        json.dumps({"METHOD": "comal", "METHOD_TITLE": "COMAL", "MODEL": "owner/base", "JUDGE": "owner/judge"})
    )
    (iteration / "eval/vs_start.json").write_text(
        json.dumps(
            {
                "win_rate": 0.625,
                "win_rate_interval": [0.59, 0.66],
                "mean_win_prob": 0.6,
                "num_prompts": 805,
                "mean_tokens": [300.4, 250.0],
            }
        )
    )
    return iteration / "ckpt"


def test_hub_writes_the_model_and_a_card_that_the_hub_can_read(checkpoint, some_model, tmp_path):
    from huggingface_hub import ModelCard

    export("hub", str(checkpoint), str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "owner/base" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and "comal" in card.data.tags
    assert "# run iter3" in card.text and "`METHOD=comal`" in card.text and "`owner/judge`" in card.text
    assert "| the initial policy | 62.5 % [59.0, 66.0] | 0.600 | 805 | 300, 250 |" in card.text
    assert "| `eta` | `0.002` |" in card.text and "tokenizer" not in card.text


def test_hub_of_a_checkpoint_alone_has_a_card_without_results(some_model, tmp_path):
    export("hub", some_model, str(tmp_path / "out"), "mine")
    assert (
        "# mine" in (tmp_path / "out/README.md").read_text()
        and "win rate" not in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"format": "csv"}, "--format should be one of alpaca_eval, hub"),
        ({"format": "alpaca_eval", "input": "a,b"}, "a,b does not exist"),
        ({"format": "alpaca_eval", "input": "none.jsonl"}, "none.jsonl does not exist"),
        ({"format": "hub", "input": "no/such/model"}, "no such directory"),
        ({"format": "hub", "output": "."}, "exists; remove it or give another name"),
    ],
)
def test_export_refuses(tmp_path, flags, message):
    with pytest.raises(StageError, match=message):
        export(**{"input": "x", "output": str(tmp_path / "out")} | flags)
    assert list(tmp_path.iterdir()) == []
