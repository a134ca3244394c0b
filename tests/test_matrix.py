"""The matrix of all against all: models and files in any order, the cells that are kept, and the best worst case.

python -m pytest tests/test_matrix.py
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.work import TinySampler

import eval
from analysis import matrix
from analysis.matrix import best_worst_case, play
from judges import base as judges
from utils import StageError


@pytest.fixture
def play_all(some_model, tmp_path, monkeypatch):
    """A function that runs `eval.py matrix` with the stand-ins; it returns the matrix, the pairs of texts that were
    judged, and what each model was started with."""
    monkeypatch.setitem(judges.JUDGE_TYPES, "generative", "helpers.work:CountingJudge")
    monkeypatch.setattr(eval, "Sampler", TinySampler)
    (tmp_path / "t.txt").write_text("{input} {output_1} {output_2}")
    logs = {name: tmp_path / f"{name}.log" for name in ("JUDGED", "SAMPLED")}

    def run(output="m.json", **flags):
        for name, path in logs.items():
            path.write_text("")
            monkeypatch.setenv(name, str(path))
        flags = {"judge": some_model, "template": str(tmp_path / "t.txt"), "gpus": "none"} | flags
        eval.matrix(str(tmp_path / output), **flags)
        judged = [tuple(json.loads(line)) for line in logs["JUDGED"].read_text().splitlines()]
        return json.loads((tmp_path / output).read_text()), judged, logs["SAMPLED"].read_text().splitlines()

    return run


@pytest.fixture
def files(jsonl):
    """Paths of responses to three prompts; file n has responses of n letters."""

    def response(prompt_id, length):
        return {"prompt_id": prompt_id, "prompt": prompt_id, "samples": [{"text": prompt_id * length}]}

    return [str(jsonl(f"{n}.jsonl", *(response(p, n) for p in "pqr"))) for n in (1, 2, 3, 4)]


def pairs(judged):
    """{(lengths of the two texts): number of prompts}, the shorter one first."""
    return Counter(tuple(sorted(map(len, texts))) for texts in judged)


# ---- the cells ----


def test_a_matrix_does_not_depend_on_the_order_and_judges_each_pair_once(play_all, files):
    first, judged, _ = play_all(responses=",".join(files[:3]))
    assert pairs(judged) == {(1, 2): 3, (1, 3): 3, (2, 3): 3}
    for order in itertools.permutations(range(3)):
        found, judged, _ = play_all("other.json", responses=",".join(files[i] for i in order))
        assert not judged
        assert found["names"] == [first["names"][i] for i in order]
        for field in ("win", "win_interval"):
            assert found[field] == [[first[field][i][j] for j in order] for i in order]
        assert [worst["win"] for worst in found["worst_case"]] == [first["worst_case"][i]["win"] for i in order]
        assert order[found["best"]["player"]] == first["best"]["player"] == 2


@pytest.mark.parametrize("place", [0, 3])
def test_adding_a_player_judges_only_its_pairs(play_all, files, place):
    play_all(responses=",".join(files[:3]))
    several = [*files[:place], files[3], *files[place:3]]  # first, or last
    found, judged, _ = play_all(responses=",".join(several))
    assert pairs(judged) == {(1, 4): 3, (2, 4): 3, (3, 4): 3}
    lengths = [int(name) for name in found["names"]]
    assert found["win"] == [[None if i == j else 0.75 if i > j else 0.25 for j in lengths] for i in lengths]


# ---- models ----


@pytest.fixture
def models(tmp_path, some_model):
    """Folders 1, 2, ... with a model in each, all different and without a tokenizer; the even ones in `model/`."""

    def make(number):
        folder = tmp_path / "models" / str(number)
        folder.mkdir(parents=True)
        for file in Path(some_model).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "number": number}))
        return str(folder)

    return [make(number) for number in (1, 2, 3)]


@pytest.fixture
def prompts(jsonl):
    return str(jsonl("prompts.jsonl", *({"prompt_id": p, "prompt": p} for p in "pqr")))


def test_models_are_sampled_once_and_mix_with_files(play_all, files, models, prompts, model_dirs, tmp_path, caplog):
    caplog.set_level("INFO")
    flags = {"input": prompts, "tokenizer": model_dirs["policy"], "max_input_tokens": 7, "seed": 3}
    found, judged, sampled = play_all(models=",".join(models[:2]), **flags)
    assert found["names"] == ["1", "2"] and found["win"][0][1] == 0.25 and pairs(judged) == {(1, 2): 3}
    assert sampled == [f"{number} {model_dirs['policy']} [0.7] 7 3" for number in (1, 2)]
    found, judged, sampled = play_all(models=",".join(models[::-1]), **flags)
    assert [line[0] for line in sampled] == ["3"] and pairs(judged) == {(1, 3): 3, (2, 3): 3}
    assert found["responses"][2] in [str(path) for path in (tmp_path / "responses").iterdir()]
    found, judged, sampled = play_all(responses=files[3], models=models[0], names="theirs,ours", **flags)
    assert found["names"] == ["theirs", "ours"] and not sampled and pairs(judged) == {(1, 4): 3}
    _, _, sampled = play_all(models=",".join(models[:2]), temperature=0, **flags)
    assert len(sampled) == 2  # other settings, other responses


def test_a_model_keeps_its_own_tokenizer(play_all, models, prompts, model_dirs):
    for file in Path(model_dirs["policy"]).glob("tokenizer*"):
        (Path(models[0]) / file.name).write_bytes(file.read_bytes())
    _, _, sampled = play_all(models=",".join(models[:2]), input=prompts, tokenizer=model_dirs["policy"])
    assert sampled[0] == "1  [0.7] 2048 0" and model_dirs["policy"] in sampled[1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: {"models": m[0]}, "two or more different files and models, got 1"),
        (lambda m: {"models": f"{m[0]},{m[0]}"}, "two or more different files and models, got .* twice"),
        (lambda m: {"models": f"{m[0]},{m[0]}/", "names": "a,b"}, "are the same model; name one of them"),
        (lambda m: {"tokenizer": ""}, "there is no tokenizer beside .*1; name the one it was trained with"),
        (lambda m: {"models": f"{m[0]},no/such", "names": "a,b"}, "model no/such: no such directory, and the Hub"),
        (lambda m: {"input": "none.jsonl"}, "input file none.jsonl does not exist"),
        (lambda m: {"temperature": -1}, "--temperature should be at least 0"),
    ],
)
def test_matrix_refuses_models(play_all, models, prompts, model_dirs, tmp_path, change, message):
    flags = {"models": ",".join(models), "input": prompts, "tokenizer": model_dirs["policy"]} | change(models)
    with pytest.raises(StageError, match=message):
        play_all(**flags)
    assert not (tmp_path / "responses").exists()


def test_matrix_refuses_model_outputs(play_all, files, tmp_path):
    (tmp_path / "outputs.json").write_text('[{"instruction": "x", "output": "y"}]')
    with pytest.raises(StageError, match="outputs.json is a list of model outputs, which only compare takes"):
        play_all(responses=f"{files[0]},{tmp_path}/outputs.json")


# ---- the best worst case ----


def test_best_worst_case_by_hand():
    # Player 1 leads player 0 by 0.2, 0.1, 0.3, 0.2 in the four draws, and player 2 by -0.1, 0.1, 0.1, 0.2.
    drawn = np.array([[0.3, 0.4, 0.2, 0.3], [0.5, 0.5, 0.5, 0.5], [0.6, 0.4, 0.4, 0.3]])
    found = best_worst_case([0.3, 0.5, 0.4], drawn)
    assert found["player"] == 1 and found["not_distinguishable"] == [2]
    assert found["lead"] == [pytest.approx(0.2), None, pytest.approx(0.1)]
    # Percentiles of four values, interpolated: 2.5 % lies 0.075 of the way from the first to the second.
    assert found["lead_interval"][0] == pytest.approx([0.1 + 0.075 * 0.1, 0.3 - 0.075 * 0.1])
    assert found["lead_interval"][1] is None
    assert found["lead_interval"][2] == pytest.approx([-0.1 + 0.075 * 0.2, 0.2 - 0.075 * 0.1])


def test_the_difference_of_worst_cases_is_paired():
    """Two players that differ by 0.01 on every prompt are told apart, although the prompts differ much more."""
    probs = np.full((4, 4, 40), 0.5)
    hard = np.linspace(0.05, 0.65, 40)  # P(player 0 beats 2) on each prompt
    for i, j, values in ((0, 2, hard), (1, 2, hard + 0.01), (3, 2, 0.9), (0, 3, 0.9), (1, 3, 0.9)):
        probs[i, j], probs[j, i] = values, 1 - values
    found = play(probs, 40, num_bootstrap=200)
    assert found["best"]["player"] == 1
    assert found["best"]["lead"][0] == pytest.approx(0.01)
    assert found["best"]["lead_interval"][0] == pytest.approx([0.01, 0.01])
    assert found["best"]["not_distinguishable"] == []  # 2 and 3 have 0.1 in their worst case
    low, high = found["worst_case"][1]["interval"]
    assert high - low > 0.05


def test_equal_players_are_not_distinguishable_and_the_first_is_best():
    found = play(np.full((3, 3, 5), 0.5), 5, num_bootstrap=20)["best"]
    assert found == {
        "player": 0,
        "lead": [None, 0, 0],
        "lead_interval": [None, [0, 0], [0, 0]],
        "not_distinguishable": [1, 2],
    }


def test_a_wide_matrix_has_numbered_columns(capsys):
    names = [f"comal-qwen2-1.5b-round{number}" for number in range(1, 13)]
    result = play(np.full((12, 12, 5), 0.5), 5, num_bootstrap=20) | {"measure": "win_rate"}
    matrix.print_matrix(result | {"names": names})
    header, first, *rest = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[3:17] == [*(str(number) for number in range(1, 13)), "worst", "Nash"]
    assert first.split()[:4] == ["1", names[0], "-", "50.0"] and rest[10].split()[:2] == ["12", names[11]]
    assert header.index("worst") + 5 == first.rindex("50.0") + 4 and len(first) < 130
    matrix.print_matrix(result | {"names": list("abcdefghijkl")})
    assert capsys.readouterr().out.splitlines()[1].split()[3:6] == ["a", "b", "c"]


def test_the_command_answers_from_the_file(play_all, files, tmp_path, capsys):
    play_all(responses=",".join(files[:3]))
    printed = capsys.readouterr().out
    matrix.main([str(tmp_path / "m.json")])
    answer = capsys.readouterr().out
    assert printed.endswith(answer) and answer == (
        "\nBest worst case: 3 with 75.0 % against 1 (95 % interval of the worst over all: 75.0 to 75.0).\n"
        "Not distinguishable from it: none\n"
        "Clearly below it:\n"
        "    1: 25.0 %, lower by 50.0 (95 % interval: 50.0 to 50.0)\n"
        "    2: 25.0 %, lower by 50.0 (95 % interval: 50.0 to 50.0)\n"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "is not a result of eval.py matrix"),
        ("{", "is not a result of eval.py matrix"),
        ('{"names": [], "worst_case": []}', "run eval.py matrix again, which keeps the judgements"),
    ],
)
def test_the_command_refuses(tmp_path, text, message):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(StageError, match=message):
        matrix.main([str(tmp_path / "m.json")])
    with pytest.raises(StageError, match="name one file"):
        matrix.main([])
