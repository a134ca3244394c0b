"""lm-evaluation-harness on a task made here; skipped where it is not installed (pip install lm_eval).

python -m pytest tests/test_harness.py
"""

import json
import sys
from importlib.util import find_spec

import pytest
from test_end_to_end import run

from utils import StageError

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: pip install lm_eval")

TASK = """task: holiday
dataset_path: json
dataset_kwargs:
  data_files: {{test: {questions}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
- metric: acc
"""


@needs_harness
@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_harness_scores_a_task(demo_models, tmp_path, backend):
    """The start policy gives the first answer with probability 0.8, the others with 0.1: right wherever that is asked
    for."""
    from game import ANSWERS, phrasings

    questions = tmp_path / "holiday.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question": prompt, "choices": ANSWERS, "answer": number % 2}) + "\n"
            for number, prompt in enumerate(phrasings()[0][:8])
        )
    )
    (tmp_path / "holiday.yaml").write_text(TASK.format(questions=questions))
    done = run(
        [
            sys.executable,
            "eval.py",
            "harness",
            "--model",
            str(demo_models / "policy"),
            "--tasks",
            "holiday",
            "--include_path",
            str(tmp_path),
            "--output",
            str(tmp_path / "out.json"),
            "--backend",
            backend,
            "--max_model_len",
            "256",
        ]
    )
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["results"]["holiday"]["acc,none"] == 0.5
    assert "|holiday|" in done.stdout


@needs_harness
def test_harness_names_an_unknown_task(some_model, tmp_path, tokenizers, model_dirs):
    from harness import run_tasks

    with pytest.raises(StageError, match="--tasks holidays: the harness has no such task"):
        run_tasks(some_model, ["holidays"], tmp_path / "out.json", backend="hf", tokenizer=model_dirs["policy"])


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_harness_says_that_it_is_not_installed(some_model, tmp_path):
    from harness import run_tasks

    with pytest.raises(StageError, match="pip install lm_eval"):
        run_tasks(some_model, ["gsm8k"], tmp_path / "out.json")
