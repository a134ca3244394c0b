"""data_processing.py: the three pair rules on matrices made by hand, and pairs from elsewhere.

python -m pytest tests/test_pairs.py
"""

import random
from collections import Counter

import pytest

from data_processing import (
    PAIR_RULES,
    as_pair,
    import_pairs,
    make_pair,
    make_pairs,
    mean_win_probs,
)
from records import Record, read
from utils import StageError

# Row i, column j: P(i beats j). Scores (0.9 + 0.6)/2 = 0.75, (0.1 + 0.7)/2 = 0.4, (0.4 + 0.3)/2 = 0.35.
THREE = [[None, 0.9, 0.6], [0.1, None, 0.7], [0.4, 0.3, None]]


# Scores (1.0, 2.0, 1.4, 3.0, 2.6)/4 = 0.25, 0.5, 0.35, 0.75, 0.65: best 3, then 4, 1, 2, worst 0.
FIVE = [
    [None, 0.4, 0.3, 0.2, 0.1],
    [0.6, None, 0.7, 0.2, 0.5],
    [0.7, 0.3, None, 0.1, 0.3],
    [0.8, 0.8, 0.9, None, 0.5],
    [0.9, 0.5, 0.7, 0.5, None],
]


# Sample 0 has the best score, (0.45 + 0.95)/2 = 0.7 against (0.55 + 0.6)/2 = 0.575, and loses to 1 directly.
UPSET = [[None, 0.45, 0.95], [0.55, None, 0.6], [0.05, 0.4, None]]


EVEN = [[None, 0.5, 0.5], [0.5, None, 0.5], [0.5, 0.5, None]]


def scored(win_probs, prompt_id="a", texts=None, lengths=None):
    """A scores record of K samples, which are named s0, s1, ... and have 1, 2, ... tokens."""
    size = len(win_probs)
    texts, lengths = texts or [f"s{i}" for i in range(size)], lengths or range(1, size + 1)
    samples = [
        {"text": text, "token_ids": [i] * length, "finish_reason": "stop"}
        for i, (text, length) in enumerate(zip(texts, lengths))
    ]
    return {
        "prompt_id": prompt_id,
        "prompt": "Where?\u2028",
        "prompt_token_ids": [7, 7, 7],
        "samples": samples,
        "win_probs": win_probs,
    }


def indices(pair):
    """(chosen, rejected) of a pair that `scored` samples went into."""
    return tuple(int(pair[side][0]["content"][1:]) for side in ("chosen", "rejected"))


# ---- make_pair ----


@pytest.mark.parametrize(
    "win_probs, rule, expected, win_prob, scores",
    [
        (THREE, "top_two", (0, 1), 0.9, (0.75, 0.4)),
        (THREE, "best_worst", (0, 2), 0.6, (0.75, 0.35)),
        (FIVE, "top_two", (3, 4), 0.5, (0.75, 0.65)),
        (FIVE, "best_worst", (3, 0), 0.8, (0.75, 0.25)),
        (UPSET, "top_two", (0, 1), 0.45, (0.7, 0.575)),
        (UPSET, "best_worst", (0, 2), 0.95, (0.7, 0.225)),
    ],
)
def test_make_pair_by_rank(win_probs, rule, expected, win_prob, scores):
    assert mean_win_probs(win_probs)[expected[0]] == pytest.approx(scores[0])
    pair = make_pair(scored(win_probs), rule, 2048, 0)
    assert indices(pair) == expected
    assert pair["win_prob"] == win_prob
    assert (pair["score_chosen"], pair["score_rejected"]) == pytest.approx(scores)


def test_make_pair_has_every_field():
    pair = make_pair(scored(THREE), "top_two", 2048, 0)
    assert pair == {
        "prompt_id": "a",
        "prompt": [{"role": "user", "content": "Where?\u2028"}],
        "chosen": [{"role": "assistant", "content": "s0"}],
        "rejected": [{"role": "assistant", "content": "s1"}],
        "prompt_token_ids": [7, 7, 7],
        "chosen_token_ids": [0],
        "rejected_token_ids": [1, 1],
        "win_prob": 0.9,
        "score_chosen": pytest.approx(0.75),
        "score_rejected": pytest.approx(0.4),
    }


@pytest.mark.parametrize("win_probs", [THREE, UPSET])
def test_make_pair_random_draws_every_pair_alike_and_labels_by_the_judge(win_probs):
    pairs = [make_pair(scored(win_probs, f"p{i}"), "random", 2048, 0) for i in range(600)]
    assert all(pair["win_prob"] > 0.5 for pair in pairs)
    assert all(pair["win_prob"] == win_probs[indices(pair)[0]][indices(pair)[1]] for pair in pairs)
    # 600 draws of one of three pairs: 200 each, standard deviation sqrt(600 * 1/3 * 2/3) = 11.5.
    counts = Counter(frozenset(indices(pair)) for pair in pairs)
    assert len(counts) == 3 and all(abs(count - 200) < 50 for count in counts.values())


def test_make_pair_random_depends_on_seed_and_prompt_alone():
    def drawn(seed):
        return [indices(make_pair(scored(THREE, f"p{i}"), "random", 2048, seed)) for i in range(40)]

    first = drawn(1)
    random.seed(5)
    assert drawn(1) == first != drawn(2)


@pytest.mark.parametrize("rule", PAIR_RULES)
def test_make_pair_keeps_ties(rule):
    pair = make_pair(scored(EVEN), rule, 2048, 0)
    assert pair["win_prob"] == 0.5 and pair["score_chosen"] == pair["score_rejected"]


@pytest.mark.parametrize("rule, expected", [("top_two", (0, 1)), ("best_worst", (0, 2))])
def test_make_pair_takes_the_samples_of_a_tie_in_their_order(rule, expected):
    # Samples 0 and 1 both score (0.5 + 0.75)/2 = 0.625, sample 2 scores 0.25.
    tie = [[None, 0.5, 0.75], [0.5, None, 0.75], [0.25, 0.25, None]]
    assert indices(make_pair(scored(tie), rule, 2048, 0)) == expected


@pytest.mark.parametrize("rule", PAIR_RULES)
def test_make_pair_finds_none_among_identical_responses(rule):
    assert make_pair(scored(THREE, texts=["same"] * 3), rule, 2048, 0) is None


def test_make_pair_random_leaves_out_a_pair_that_training_cannot_take():
    record = scored(THREE, texts=["s0", "s0", "s2"])
    pairs = [make_pair(record | {"prompt_id": str(i)}, "random", 2048, 0) for i in range(60)]
    # Of the three pairs one is of the same text; it is left out and no other is drawn instead.
    assert 8 < pairs.count(None) < 32
    assert make_pair(scored(THREE, lengths=(2, 0, 0)), "random", 2048, 0) is None


def test_make_pair_takes_exactly_max_length():
    # Three prompt tokens, responses of two, four and nine; sample 0 is the best, sample 1 the second best.
    record = scored(THREE, lengths=(2, 4, 9))
    assert indices(make_pair(record, "top_two", 7, 0)) == (0, 1)
    assert make_pair(record, "top_two", 6, 0) is None


# The released selection, derived by hand: distinct texts, those that fit, best two by the mean of all their verdicts.
# BEST beats everything with 0.9, GOOD the two others with 0.7, FAIR beats POOR with 0.6; equal texts have 0.5.
STRENGTH = {"best": {"good": 0.9, "fair": 0.9, "poor": 0.9}, "good": {"fair": 0.7, "poor": 0.7}, "fair": {"poor": 0.6}}


def five(*words, long=()):
    """A scores record of samples with these texts; those in `long` do not fit a limit of 20 tokens."""

    def win(a, b):
        return 0.5 if a == b else STRENGTH[a][b] if b in STRENGTH.get(a, {}) else 1 - STRENGTH[b][a]

    win_probs = [[None if i == j else win(a, b) for j, b in enumerate(words)] for i, a in enumerate(words)]
    return scored(win_probs, texts=list(words), lengths=[40 if word in long else 5 for word in words])


@pytest.mark.parametrize(
    "record, top_two, best_worst",
    [
        # 1. All different: by strength.
        (five("poor", "fair", "good", "best"), ("best", "good"), ("best", "poor")),
        # 2. The best was sampled twice: the prompt is not lost.
        (five("best", "best", "poor", "good"), ("best", "good"), ("best", "poor")),
        # 3. The best is too long: the best two of what remains.
        (five("best", "good", "fair", "poor", long=["best"]), ("good", "fair"), ("good", "poor")),
        # 4. The second best is too long.
        (five("best", "good", "fair", "poor", long=["good"]), ("best", "fair"), ("best", "poor")),
        # 5. Two of three texts are too long: one remains, the prompt is dropped.
        (five("best", "good", "fair", long=["best", "good"]), None, None),
        # 6. One text alone.
        (five("good", "good", "good"), None, None),
        # 7. Two texts, each twice: their order by mean verdict.
        (five("poor", "fair", "poor", "fair"), ("fair", "poor"), ("fair", "poor")),
        # 8. Verdicts against a text that is too long count: "good" has (0.1 + 0.1 + 0.7)/3 = 0.3 over its verdicts
        # against two "best" and one "fair", "fair" has (0.1 + 0.1 + 0.3)/3; the pair is these two.
        (five("best", "best", "good", "fair", long=["best"]), ("good", "fair"), ("good", "fair")),
        # 9. The worst is too long: best_worst takes the worst that fits.
        (five("best", "poor", "fair", "good", long=["poor"]), ("best", "good"), ("best", "fair")),
        # 10. Everything is too long.
        (five("best", "good", long=["best", "good"]), None, None),
    ],
)
def test_make_pair_selects_as_the_released_code(record, top_two, best_worst):
    for rule, expected in (("top_two", top_two), ("best_worst", best_worst)):
        pair = make_pair(record, rule, 20, 0)
        found = pair and tuple(pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert found == expected


def released_selection(record, max_length):
    """The released recipe once more, written down as plainly as possible: (chosen text, rejected text) or None."""
    texts = [sample["text"] for sample in record["samples"]]
    verdicts = {text: [] for text in texts}
    for i, row in enumerate(record["win_probs"]):
        verdicts[texts[i]] += [p for j, p in enumerate(row) if j != i]
    lengths = {
        text: len(record["prompt_token_ids"]) + len(record["samples"][texts.index(text)]["token_ids"]) for text in texts
    }
    ranking = [(sum(found) / len(found), text) for text, found in verdicts.items() if lengths[text] <= max_length]
    ranking.sort(key=lambda entry: -entry[0])
    return (ranking[0][1], ranking[1][1]) if len(ranking) > 1 else None


def test_make_pair_selects_as_the_released_code_on_200_records():
    """Records of five samples with duplicates, ties and over-long responses; pytest -s shows the first ten."""
    rng, counts = random.Random(0), Counter()
    for n in range(200):
        words = [rng.choice(["best", "good", "fair", "poor"]) for _ in range(5)]
        long = rng.sample(["best", "good", "fair", "poor"], rng.choice([0, 1, 1, 2]))
        record = five(*words, long=long)
        if n % 4 == 0:  # ties: every verdict is one half
            record["win_probs"] = [[None if i == j else 0.5 for j in range(5)] for i in range(5)]
        pair, expected = make_pair(record, "top_two", 20, 0), released_selection(record, 20)
        assert (pair and tuple(pair[side][0]["content"] for side in ("chosen", "rejected"))) == expected
        if n < 10:
            marked = [f"({word})" if word in long else word for word in words]  # too long
            print(f"{n}: {' '.join(marked)}{', all tied' * (n % 4 == 0)}: {' > '.join(expected or ['no pair'])}")
        counts["pair" if pair else "none"] += 1
        counts["duplicates"] += len(set(words)) < 5
    assert counts["pair"] > 100 and counts["none"] > 10 and counts["duplicates"] > 100


# ---- make_pairs ----


def test_make_pairs_writes_one_pair_a_prompt_and_counts_the_rest(jsonl, tmp_path, caplog):
    caplog.set_level("INFO")
    same = scored(THREE, "d", texts=["x"] * 3)
    scores = jsonl("scores", scored(THREE, "a"), scored(EVEN, "b"), scored(THREE, "c"), same)
    make_pairs(str(scores), str(tmp_path / "pairs"), pair_rule="best_worst")
    pairs = list(read(tmp_path / "pairs", Record))
    assert [(pair["prompt_id"], indices(pair)) for pair in pairs] == [("a", (0, 2)), ("b", (0, 2)), ("c", (0, 2))]
    (message,) = caplog.messages
    for words in ("4 records", "3 pairs", "1 without a pair"):
        assert words in message


def test_make_pairs_takes_several_files(jsonl, tmp_path):
    inputs = [jsonl("a", scored(THREE, "a")), jsonl("b", scored(FIVE, "b"))]
    make_pairs(",".join(map(str, inputs)), f"{tmp_path}/x,{tmp_path}/y")
    assert [indices(*read(tmp_path / name, Record)) for name in "xy"] == [(0, 1), (3, 4)]


def test_make_pairs_gives_the_same_file_for_the_same_seed(jsonl, tmp_path):
    scores = jsonl("scores", *(scored(FIVE, f"p{i}") for i in range(30)))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_pairs(str(scores), str(tmp_path / name), pair_rule="random", seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


# ---- import_pairs ----


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "p", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")], "score": 3},
    ],
)
def test_as_pair_reads_every_form(row):
    assert as_pair(row) == ({"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, None)


def test_as_pair_keeps_the_turns_before():
    turns = [user("p"), assistant("x"), user("q")]
    assert as_pair({"chosen": turns + [assistant("a")], "rejected": turns + [assistant("b")]})[0]["prompt"] == turns


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical responses"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "without a prompt and two answers"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "without a prompt and two answers"),
        ({"prompt": [assistant("p")], "chosen": "a", "rejected": "b"}, "without a prompt and two answers"),
        (
            {"chosen": [user("p"), assistant("a"), user("c")], "rejected": [user("p"), assistant("b")]},
            "without a prompt and two answers",
        ),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty or without text"),
    ],
)
def test_as_pair_leaves_out(row, reason):
    assert as_pair(row) == (None, reason)


def test_import_pairs_writes_what_get_logprobs_reads(jsonl, tmp_path, tokenizers):
    from training.datasets import UnscoredPairDataset

    source = jsonl(
        "rows.jsonl",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    import_pairs(str(tmp_path / "pairs.jsonl"), str(source))
    dataset = UnscoredPairDataset(tmp_path / "pairs.jsonl", tokenizers["policy"], 100, 664)
    assert dataset.ids == ["0", "2"] and dataset[1]["win_prob"] == 1.0
    with pytest.raises(StageError, match="has no column 'rejected'"):
        import_pairs(str(tmp_path / "none.jsonl"), str(jsonl("bad.jsonl", {"chosen": "a"})))
