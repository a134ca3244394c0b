"""judges/ without an engine: templates, labels, settings, and what the judges make of their answers.

python -m pytest tests/test_judges.py
"""

import math
import pickle
import random
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest

from data_utils import encode_prompt
from judges.base import JudgeConfig, fill_template, judge_class, read_template, win_matrix
from judges.generative import GenerativeJudge, split_labels
from judges.panel import mean
from utils import StageError
from vllm_model import EngineWork
from workers.journal import Skipped
from workers.worker import Worker, run_here

# ---- Win probabilities ----


def test_win_matrix_averages_both_orders():
    # P(x beats y) = (0.9 + 1 - 0.3)/2 = 0.8, gap |0.9 - 0.7| = 0.2; P(x beats z) = (0.6 + 1 - 0.4)/2 = 0.6, gap 0;
    # P(y beats z) = (0.5 + 1 - 0.9)/2 = 0.3, gap |0.5 - 0.1| = 0.4. Mean gap 0.2, mean mass (5 * 1 + 0.4)/6 = 0.9.
    judgements = {("x", "y"): (0.9, 1.0), ("y", "x"): (0.3, 1.0), ("x", "z"): (0.6, 1.0), ("z", "x"): (0.4, 1.0)}
    judgements |= {("y", "z"): (0.5, 1.0), ("z", "y"): (0.9, 0.4)}
    found = win_matrix(["x", "y", "z"], judgements)
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


def test_win_matrix_gives_ties_exactly_a_half_and_pairs_that_sum_to_exactly_one():
    generator = random.Random(0)
    for _ in range(20_000):
        p, q = generator.random(), generator.random() ** generator.choice([1, 8])
        tied, other = (
            win_matrix(["x", "y"], {("x", "y"): (p, 1.0), ("y", "x"): (second, 1.0)})["win_probs"] for second in (p, q)
        )
        assert tied == [[None, 0.5], [0.5, None]]
        assert other[0][1] + other[1][0] == 1 and other[0][1] == pytest.approx((p + 1 - q) / 2, abs=1e-15)
        assert (other[0][1] > 0.5) == (p > q + 1e-16) or abs(p - q) < 1e-15


def test_mean_of_a_panel_keeps_exact_ties():
    for weights in ([1 / 3] * 3, [0.1] * 10, [0.7, 0.2, 0.1]):
        assert mean([0.5] * len(weights), weights, centre=0.5) == 0.5
    assert mean([0.25, 0.75], [0.25, 0.75], centre=0.5) == mean([0.25, 0.75], [0.25, 0.75]) == 0.625
    assert mean([1.0] * 10, [0.1] * 10, centre=0.5) == 1 and mean([0.5, None], [0.5, 0.5]) is None


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
        ({"judge_type": "bt"}, "--judge_type should be one of generative, reward, server, got bt$"),
        ({"judge_type": "offsetbias-lm"}, "got offsetbias-lm; offsetbias-lm is now called generative"),
        ({"judge_type": "bt-mixture"}, "bt-mixture is now called reward"),
        ({"judge_type": "openai"}, "openai is now called server"),
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

    model = "the judge"

    def __init__(self, logprobs):
        self.logprobs, self.prompts, self.waiting = logprobs, [], []

    def enqueue(self, requests):
        names = list(range(len(self.prompts), len(self.prompts) + len(requests)))
        self.prompts += [prompt for prompt, _ in requests]
        self.waiting += names
        return names

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
    judge = object.__new__(GenerativeJudge)  # its own __init__ would load a model
    EngineWork.__init__(judge)
    judge.tokenizer, judge.template, judge.max_prompt_tokens = tokenizers["judge"], "{input}|{output_1}|{output_2}", 200
    judge.label_prefix, judge.label_ids = [5, 6], (7, 8)
    judge.records, judge.answers, judge.mass = 0, 0, 0.0
    judge.engine = FakeEngine({7: math.log(0.6), 8: math.log(0.2)})
    return judge


def judged(judge, *records):
    """What becomes of the records in a worker."""
    return run_here(judge, [(0, record) for record in records])


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
    assert judge.read_labels(FakeEngine({7: first, 8: second}).output(0)) == pytest.approx(expected)


def test_judge_asks_once_for_each_ordered_pair_of_different_texts(judge):
    judged(judge, record("a", "sea", "city", "sea"))
    expected = [
        encode_prompt(judge.tokenizer, f"Where?|{first}|{second}") + [5, 6]
        for first, second in (("sea", "city"), ("city", "sea"))
    ]
    assert Counter(map(tuple, judge.engine.prompts)) == Counter(map(tuple, expected))


def test_judge_returns_each_record_with_its_own_answers(judge):
    answered = judged(judge, record("a", "sea", "city", "sea"), record("b", "sea", "sea"), record("c", "x", "y"))
    assert [r["prompt_id"] for r in answered] == ["a", "b", "c"]
    assert all(r["kept"] for r in answered)
    # The engine always says 3/4 for the first output: (3/4 + 1 - 3/4)/2 = 1/2, and the orders disagree by 1/2.
    assert answered[0]["win_probs"][0] == [None, pytest.approx(0.5), 0.5]
    assert answered[0]["order_gap"] == pytest.approx(0.5)
    assert answered[1]["order_gap"] is None
    assert answered[2]["label_mass"] == pytest.approx(0.8)


def test_judge_matches_answers_to_pairs_across_records(judge):
    # Each pair gets an answer of its own: 0.1, 0.2, ... in the order of asking.
    judge.read_labels = lambda output: ((output.request_id + 1) / 10, 1.0)
    first, second = judged(judge, record("a", "x", "y"), record("b", "z", "w"))
    assert first["win_probs"][0][1] == pytest.approx((0.1 + 1 - 0.2) / 2)
    assert second["win_probs"][0][1] == pytest.approx((0.3 + 1 - 0.4) / 2)


def test_judge_skips_a_record_that_is_too_long_and_no_other(judge):
    long = record("b", "x", "y" * 300)
    first, second, third = judged(judge, record("a", "x", "y"), long, record("c", "x", "y"))
    assert (first["prompt_id"], third["prompt_id"]) == ("a", "c") and "win_probs" in first and "win_probs" in third
    assert isinstance(second, Skipped) and second.prompt_id == "b" and "limit is 200" in second.reason
    assert len(judge.engine.prompts) == 4
    length = max(map(len, judge.engine.prompts))
    judge.max_prompt_tokens = length
    assert "win_probs" in judged(judge, record("a", "x", "y"))[0]
    judge.max_prompt_tokens = length - 1
    assert isinstance(judged(judge, record("a", "x", "y"))[0], Skipped)


def test_records_share_the_engine_and_end_in_any_order(judge):
    judge.begin("short", (0, record("b", "x", "y")))
    judge.begin("long", (0, record("a", "u", "v", "w")))
    judge.engine.step = lambda: [judge.engine.output(judge.engine.waiting.pop(0))]
    ended = [(key, judge.result(key)["prompt_id"]) for _ in range(8) for key in judge.step()]
    assert ended == [("short", "b"), ("long", "a")] and not judge.begun and not judge.owners
    judge.begin("same", (0, record("c", "x", "x")))  # nothing to ask
    assert judge.step() == ["same"] and judge.result("same")["order_gap"] is None


def test_on_a_gpu_what_is_begun_is_encoded_while_the_engine_steps_and_reaches_it_in_order(judge, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    EngineWork.__init__(judge)
    gate, asked = threading.Event(), judge.requests
    judge.begin("a", (0, record("a", "x", "y")))
    assert judge.step() == [] and len(judge.engine.prompts) == 2  # nothing else to do: it waited for the requests
    judge.requests = lambda job, one: gate.wait(10) and asked(job, one)
    for key in "bc":
        judge.begin(key, (0, record(key, "x", "y", prompt=key)))
    assert judge.step() == ["a"] and len(judge.engine.prompts) == 2  # it did not wait for those of b and c
    gate.set()
    assert [key for _ in range(4) for key in judge.step()] == ["c", "b"]  # the last request is answered first
    texts = [judge.tokenizer.decode(prompt) for prompt in judge.engine.prompts[2:]]
    assert ["b|" in text for text in texts] == [True, True, False, False]


def test_on_a_cpu_what_is_begun_reaches_the_engine_with_the_next_step(judge):
    """So that what the engine computes together does not depend on the time that anything takes."""
    for count, key in enumerate("abc", 1):
        judge.begin(key, (0, record(key, "x", "y")))
        judge.step()
        assert len(judge.engine.prompts) == 2 * count


def test_an_exception_while_a_record_is_encoded_or_handed_on_is_its_own(judge):
    asked, taken = judge.requests, judge.engine.enqueue

    def refuse(requests):
        if not requests:
            raise ValueError("nothing to ask")
        return taken(requests)

    judge.requests = lambda job, one: 1 / 0 if one["prompt_id"] == "bad" else asked(job, one)
    judge.engine.enqueue = refuse
    records = [record("a", "x", "y"), record("bad", "x", "y"), record("same", "x", "x"), record("d", "x", "y")]
    worker = Worker(judge)
    events = worker.begin(7, {n: (0, one) for n, one in enumerate(records)})
    while worker.left:
        events += worker.step()
    assert [(kind, number) for kind, number, _ in events] == [("failed", 7), ("failed", 7), ("done", 7)]
    assert [value[:2] for kind, _, value in events if kind == "failed"] == [
        (1, "ZeroDivisionError: division by zero"),
        (2, "ValueError: nothing to ask"),
    ]
    found = events[-1][2]
    assert {n: pickle.loads(one)["prompt_id"] for n, one in found.items()} == {0: "a", 3: "d"}
    judge.requests = lambda job, one: (_ for _ in ()).throw(StageError("the template is gone"))
    with pytest.raises(StageError, match="the template is gone"):
        worker.begin(8, {0: (0, records[0])})
        worker.step()


def test_requests_of_a_record_that_could_not_be_added_are_forgotten(judge):
    judge.begin("a", (0, record("a", "x", "y")))
    assert judge.step() == []
    judge.engine.waiting.append(99)  # of a record whose other requests were refused
    assert [key for _ in range(2) for key in judge.step()] == ["a"]


def test_a_model_that_does_not_answer_with_its_labels_is_no_judge(judge):
    judge.engine = FakeEngine({7: math.log(0.01), 8: math.log(0.01)})
    assert len(judged(judge, *(record(str(n), "x", "y", "z") for n in range(7)))) == 7  # 42 answers, too few records
    with pytest.raises(StageError, match="the judge puts 0.02 of its probability on the two labels"):
        judged(judge, record("8", "x", "y"))


def test_kinds_of_judges_say_what_they_need():
    kinds = {name: judge_class(name) for name in ("generative", "reward", "server")}
    assert [kind.needs_engine for kind in kinds.values()] == [True, True, False]
    assert [kind.has_labels for kind in kinds.values()] == [True, False, True]


def test_judge_takes_a_verdict_inside_a_response_as_text(judge):
    judged(judge, record("a", "x<|eot_id|>", "y"))
    end = judge.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert [ids.count(end) for ids in judge.engine.prompts] == [1, 1]  # the template's own
