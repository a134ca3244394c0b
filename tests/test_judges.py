"""judges/ without an engine: templates, labels, settings, and what the judges make of their answers.

python -m pytest tests/test_judges/
"""

import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from data_utils import encode_prompt
from judges.base import GenerativeJudge, JudgeConfig, fill_template, read_template, split_labels, win_matrix
from utils import StageError
from vllm_model import EngineWork

# ---- Win probabilities ----


def test_win_matrix_averages_both_orders():
    # P(x beats y) = (0.9 + 1 - 0.3)/2 = 0.8, gap |0.9 - 0.7| = 0.2; P(x beats z) = (0.6 + 1 - 0.4)/2 = 0.6, gap 0;
    # P(y beats z) = (0.5 + 1 - 0.9)/2 = 0.3, gap |0.5 - 0.1| = 0.4. Mean gap 0.2, mean mass (5 * 1 + 0.4)/6 = 0.9.
    found = win_matrix(
        ["x", "y", "z"],
        {
            ("x", "y"): (0.9, 1.0),
            ("y", "x"): (0.3, 1.0),
            ("x", "z"): (0.6, 1.0),
            ("z", "x"): (0.4, 1.0),
            ("y", "z"): (0.5, 1.0),
            ("z", "y"): (0.9, 0.4),
        },
    )
    expected = [[None, 0.8, 0.6], [0.2, None, 0.3], [0.4, 0.7, None]]
    for i, row in enumerate(expected):
        assert found["win_probs"][i] == [p if p is None else pytest.approx(p) for p in row]
    assert found["order_gap"] == pytest.approx(0.2)
    assert found["label_mass"] == pytest.approx(0.9)


def test_win_matrix_of_opposite_pairs_sums_to_one():
    texts = ["a", "b", "c", "a"]
    judgements = {(x, y): ((3 * i + j) / 10, 1.0) for i, x in enumerate("abc") for j, y in enumerate("abc") if x != y}
    probs = win_matrix(texts, judgements)["win_probs"]
    for i in range(4):
        assert probs[i][i] is None
        for j in range(i):
            assert probs[i][j] + probs[j][i] == pytest.approx(1)


def test_win_matrix_gives_identical_responses_a_half():
    found = win_matrix(["x", "y", "x"], {("x", "y"): (0.75, 1.0), ("y", "x"): (0.25, 1.0)})
    assert found["win_probs"] == [[None, 0.75, 0.5], [0.25, None, 0.25], [0.5, 0.75, None]]
    nothing_judged = {"win_probs": [[None, 0.5], [0.5, None]], "order_gap": None, "label_mass": None}
    assert win_matrix(["x", "x"], {}) == nothing_judged


# ---- Templates ----


@pytest.mark.parametrize(
    "text",
    [
        "{input} {output_1} {output_2}",
        "{output_2}{input}{output_1}",
        "{instruction}: {output_a} {output_b}",
        "{other} {} {input} {output_1} {output_2}",
    ],
)
def test_read_template_takes_each_part_once(tmp_path, text):
    (tmp_path / "t.txt").write_text(f"\n{text}\n\n")
    assert read_template(tmp_path / "t.txt") == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{input} {output_1}",
        "{output_1} {output_2}",
        "{input} {output_1} {output_2} {input}",
        "{input} {instruction} {output_1} {output_2}",
        "{input} {output_1} {output_a}",
    ],
)
def test_read_template_refuses(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(StageError, match="t.txt should contain"):
        read_template(tmp_path / "t.txt")


def test_read_template_names_a_missing_file(tmp_path):
    with pytest.raises(StageError, match="t.txt does not exist"):
        read_template(tmp_path / "t.txt")


def test_fill_template_leaves_braces_in_the_parts_alone():
    found = fill_template("{other} {input} | {output_1} | {output_2} {", "p {output_2}", "{input}", r"\1 {0} \n")
    assert found == r"{other} p {output_2} | {input} | \1 {0} \n {"


# ---- Labels and settings ----


@pytest.mark.parametrize(
    "first, second, expected",
    [([7, 8, 1, 9], [7, 8, 2, 9], ([7, 8], (1, 2))), ([1], [2], ([], (1, 2))), ([7, 1], [7, 2, 3], ([7], (1, 2)))],
)
def test_split_labels_at_the_first_difference(first, second, expected):
    assert split_labels(first, second) == expected


@pytest.mark.parametrize("first, second", [([7, 8], [7, 8]), ([7], [7, 8]), ([], [7])])
def test_split_labels_refuses_labels_that_no_position_decides(first, second):
    with pytest.raises(StageError, match="do not differ"):
        split_labels(first, second)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"judge_type": "bradley-terry"},
            "--judge_type should be one of offsetbias-lm, bt-mixture, openai, got bradley-terry",
        ),
        ({"labels": "yes"}, "--labels should be two different answers"),
        ({"labels": "yes,no,maybe"}, "--labels should be two different answers"),
        ({"labels": "yes,"}, "--labels should be two different answers"),
        ({"template": "no-such-file"}, "judge template no-such-file does not exist"),
    ],
)
def test_judge_config_refuses(tmp_path, settings, message):
    (tmp_path / "t.txt").write_text("{input} {output_1} {output_2}")
    good = {"judge": "J", "template": str(tmp_path / "t.txt"), "labels": "yes,no"}
    JudgeConfig(**good)
    with pytest.raises(StageError, match=message):
        JudgeConfig(**good | settings)


# ---- The judge, with a stand-in for the engine ----


class FakeEngine:
    """Answers every prompt with the given log-probabilities and keeps the prompts."""

    def __init__(self, logprobs):
        self.logprobs, self.prompts = logprobs, []

    def enqueue(self, prompts, params):
        self.waiting = list(range(len(self.prompts), len(self.prompts) + len(prompts)))
        self.prompts += prompts
        return list(self.waiting)

    def step(self):
        """One request a step, the last one first."""
        return [self.output(self.waiting.pop())]

    def output(self, number):
        values = {token: SimpleNamespace(logprob=value) for token, value in self.logprobs.items()}
        return SimpleNamespace(request_id=number, outputs=[SimpleNamespace(logprobs=[values])])


@pytest.fixture
def judge(tokenizers, monkeypatch):
    """A judge whose two deciding tokens are 7 and 8, after the label's beginning [5, 6]."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    judge = object.__new__(GenerativeJudge)  # __init__ would load a model
    EngineWork.__init__(judge)
    judge.tokenizer, judge.template, judge.max_prompt_tokens = tokenizers["judge"], "{input}|{output_1}|{output_2}", 200
    judge.label_prefix, judge.label_ids = [5, 6], (7, 8)
    judge.engine = FakeEngine({7: math.log(0.6), 8: math.log(0.2)})
    return judge


def record(prompt_id, *texts, prompt="Where?"):
    return {"prompt_id": prompt_id, "prompt": prompt, "samples": [{"text": text} for text in texts], "kept": True}


@pytest.mark.parametrize(
    "first, second, expected",
    [
        (math.log(0.6), math.log(0.2), (0.75, 0.8)),  # 0.6/(0.6 + 0.2), 0.6 + 0.2
        (0.0, -math.inf, (1.0, 1.0)),
        (-math.inf, 0.0, (0.0, 1.0)),
        (-1000.0, -1000.0, (0.5, 0.0)),
    ],
)
def test_judge_read_labels_normalises_the_two_labels(judge, first, second, expected):
    assert judge.read_labels([FakeEngine({7: first, 8: second}).output(0)]) == [pytest.approx(expected)]


def test_judge_asks_once_for_each_ordered_pair_of_different_texts(judge):
    judge([(0, record("a", "sea", "city", "sea"))])
    expected = [
        encode_prompt(judge.tokenizer, f"Where?|{first}|{second}") + [5, 6]
        for first, second in (("sea", "city"), ("city", "sea"))
    ]
    assert Counter(map(tuple, judge.engine.prompts)) == Counter(map(tuple, expected))


def test_judge_returns_each_record_with_its_own_answers(judge):
    tasks = [(0, record("a", "sea", "city", "sea")), (1, record("b", "sea", "sea")), (0, record("c", "x", "y"))]
    answered = judge(tasks)
    assert [r["prompt_id"] for r in answered] == ["a", "b", "c"]
    assert all(r["kept"] for r in answered)
    # The engine always says 3/4 for the first output: (3/4 + 1 - 3/4)/2 = 1/2, and the orders disagree by 1/2.
    assert answered[0]["win_probs"][0] == [None, pytest.approx(0.5), 0.5]
    assert answered[0]["order_gap"] == pytest.approx(0.5)
    assert answered[1]["order_gap"] is None
    assert answered[2]["label_mass"] == pytest.approx(0.8)


def test_judge_matches_answers_to_pairs_across_records(judge):
    # Each pair gets an answer of its own: 0.1, 0.2, ... in the order of asking.
    judge.read_labels = lambda outputs: [((output.request_id + 1) / 10, 1.0) for output in outputs]
    first, second = judge([(0, record("a", "x", "y")), (0, record("b", "z", "w"))])
    assert first["win_probs"][0][1] == pytest.approx((0.1 + 1 - 0.2) / 2)
    assert second["win_probs"][0][1] == pytest.approx((0.3 + 1 - 0.4) / 2)


def test_judge_skips_a_record_that_is_too_long_and_no_other(judge):
    long = record("b", "x", "y" * 300)
    first, second, third = judge([(0, record("a", "x", "y")), (0, long), (0, record("c", "x", "y"))])
    assert (first["prompt_id"], third["prompt_id"]) == ("a", "c") and "win_probs" in first and "win_probs" in third
    assert set(second) == {"prompt_id", "skipped"} and "limit is 200" in second["skipped"]
    assert len(judge.engine.prompts) == 4
    length = max(map(len, judge.engine.prompts))
    judge.max_prompt_tokens = length
    assert "win_probs" in judge([(0, record("a", "x", "y"))])[0]
    judge.max_prompt_tokens = length - 1
    assert "skipped" in judge([(0, record("a", "x", "y"))])[0]


def test_chunks_share_the_engine_and_end_in_any_order(judge):
    long, short = [(0, record("a", "u", "v", "w"))], [(0, record("b", "x", "y"))]
    judge.begin(0, long)
    early = judge.engine.waiting
    judge.begin(1, short)
    judge.engine.waiting = early + judge.engine.waiting
    ended = [number for _ in range(10) for number, _ in judge.step()]
    assert ended == [1, 0] and not judge.chunks and not judge.outputs
    judge.begin(2, [(0, record("c", "x", "x"))])  # nothing to ask
    assert [number for number, _ in judge.step()] == [2]


def test_judge_takes_a_verdict_inside_a_response_as_text(judge):
    judge([(0, record("a", "x<|eot_id|>", "y"))])
    end = judge.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert [ids.count(end) for ids in judge.engine.prompts] == [1, 1]  # the template's own
