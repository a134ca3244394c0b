"""The documents: links, settings and flags agree with the code, and the examples run as they stand.

python -m pytest tests/test_docs.py
"""

import inspect
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.pages import ROOT, table_rows, text
from helpers.training import LOGP_FIELDS, column, read, write

import data_processing
import judges.base
import losses
import scoring
import utils

DOCS = sorted(ROOT.glob("docs/*.md"))

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]


def page_name(path):
    return path.name


# ---------------------------------------------------------------------------------------------- all pages


def test_readme_has_at_most_170_lines():
    assert len(text("README.md").splitlines()) <= 170


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    body = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", body, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_document_is_reached_from_the_readme(page):
    assert page.name == "README.md" or f"{page.relative_to(ROOT)}" in text("README.md")


OLD_NAMES = (
    r"gpus_per_worker|offsetbias-lm|bt-mixture|api_price|made_with|start policy|the proof\b"
    r"|eval\.py (report|intransitivity|export|harness)|(?<!launch/)\bsetup\.sh|train_utils"
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_name)
def test_no_old_name_is_left(page):
    assert not re.search(OLD_NAMES, page.read_text(encoding="utf-8"), re.IGNORECASE)


# ---------------------------------------------------------------------------------------------- commands


def commands(page):
    """The words of each command in code that runs a Python script of the project."""
    body = re.sub("<!--.*?-->", "", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"^```(?:bash|)\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", body, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline
    found = []
    for line in lines:
        words = re.search(r"(?:^|\s)((?:-m analysis\.|data/demo/)?[a-z_]+(?:\.py)?) .*--", line)
        if re.search(r"\.py |-m analysis\.", line) and words and "pytest" not in line and "benchmarks/" not in line:
            found.append(shlex.split(line, comments=True))
    return found


def script_of(words):
    """(the script's path, the words after it) of a command."""
    for place, word in enumerate(words):
        if word == "-m" and words[place + 1].startswith("analysis."):
            return ROOT / (words[place + 1].replace(".", "/") + ".py"), words[place + 2 :]
        if word.endswith(".py"):
            return ROOT / word, words[place + 1 :]
    raise ValueError(words)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_have_flags_that_exist(page, monkeypatch):
    """Reads each command's flags as the script would; nothing runs. Placeholders count as values."""
    for words in commands(page):
        script, words = script_of(words)
        if script.name == "slic.py" or "..." in words:  # the example, which is tested below; the reader's own flags
            continue
        found = []
        monkeypatch.setattr(utils, "run", lambda *functions: found.extend(functions))
        monkeypatch.setattr(sys, "argv", [str(script)])
        runpy.run_path(str(script), run_name="__main__")
        named = {function.__name__: function for function in found}
        command = named[words.pop(0)] if len(named) > 1 else found[0]
        assert utils._read_flags(script.name, command, words), words


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("benchmarks/*.md"))], ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page):
    for file, words in re.findall(r"pytest (?:-s )?(tests/\w+\.py)(?: -k (\w+))?", text(page)):
        assert re.search(rf"^def test_\w*{words}", (ROOT / file).read_text(), re.MULTILINE), (file, words)


def test_recipes_page_has_every_setting_with_its_default_and_no_other():
    assignment = re.compile(r"^([A-Z_]+)=\$\{\1:?-(.*)\}(?:\s+#.*)?$", re.MULTILINE)
    defaults = {
        name: value
        for file in ("comal.sh", "launch/settings.sh")
        for name, value in assignment.findall(text(file))
        if name != "RECIPE"  # by hardware
    }
    part = text("docs/recipes.md").partition("## All settings")[2].partition("\n## ")[0]
    written = {row[0].strip("`"): row[1].strip("`") for row in table_rows(part)}
    assert written.pop("RECIPE") == "by hardware"
    nested = re.compile(r"\$\{\w+:-(\w+)\}|\$(\w+)")  # NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}}
    assert written == {name: nested.sub(r"\1\2", value) or "empty" for name, value in defaults.items()}


def test_every_pair_rule_is_explained_and_is_a_value_of_the_setting():
    choices = runpy.run_path(str(ROOT / "launch/settings.py"))["CHOICES"]
    assert set(choices["PAIR_RULE"]) == set(data_processing.PAIR_RULES)
    assert all(f"`{rule}`" in text("docs/recipes.md") for rule in data_processing.PAIR_RULES)


# ---------------------------------------------------------------------------------------------- examples


def example(name):
    """The code on docs/extending.md after the comment `<!-- test: NAME -->`."""
    return re.search(rf"<!-- test: {re.escape(name)} -->\n```\w+\n(.*?)```", text("docs/extending.md"), re.DOTALL)[1]


def run_example(name, module):
    """The names that an example defines when it stands at the end of a module; the module itself is left as it is."""
    namespace = dict(vars(module))
    exec(compile(example(name), f"docs/extending.md: {name}", "exec"), namespace)
    return namespace


@pytest.fixture
def slic_loss(monkeypatch):
    loss = run_example("losses.py", losses)["slic_loss"]
    monkeypatch.setattr(losses, "slic_loss", loss, raising=False)
    return loss


def test_example_loss_by_hand(slic_loss):
    # h = (-1 + 3) - (-2 + 2) = 2 and (-3 + 1) - (-1 + 4) = -5; with beta 0.1: 1 - 0.2 and 1 + 0.5.
    logps = [torch.tensor(values) for values in ([-1.0, -3.0], [-2.0, -1.0], [-3.0, -1.0], [-2.0, -4.0])]
    assert slic_loss(*logps, 0.1).tolist() == pytest.approx([0.8, 1.5])
    assert slic_loss(*logps, 1.0).tolist() == pytest.approx([0.0, 6.0])  # beyond the hinge there is no loss
    win_prob = torch.tensor([0.75, 0.5])
    expected = [0.75 * 0.8 + 0.25 * 1.2, 0.5 * 1.5 + 0.5 * 0.5]
    assert slic_loss(*logps, 0.1, win_prob).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("soft_labels", [False, True])
def test_example_trainer_trains(slic_loss, setting, train, tmp_path, soft_labels):
    (tmp_path / "slic.py").write_text(example("slic.py"))
    main = runpy.run_path(str(tmp_path / "slic.py"), run_name="slic")["main"]
    flags = dict(beta=0.1, soft_labels=soft_labels, num_epochs=2, global_batch_size=11, learning_rate=1e-4)
    output = train(main, **flags)
    values = [torch.tensor([record[name] for record in setting.records]) for name in LOGP_FIELDS]
    win_prob = torch.tensor([record["win_prob"] for record in setting.records]) if soft_labels else None
    untouched = slic_loss(*values, 0.1, win_prob).mean().item()  # the policy is the last one before the first update
    losses_found = column(output, "loss")
    assert losses_found[0] == pytest.approx(untouched, rel=5e-6)
    assert losses_found[1] < losses_found[0]
    assert column(output, "normalised_loss")[0] == pytest.approx(1, rel=5e-6)
    assert (output / "DONE").exists()
    assert json.loads((output / "training.json").read_text())["loss"] == "slic"


def test_example_trainer_documents_its_flags(slic_loss, tmp_path):
    (tmp_path / "slic.py").write_text(example("slic.py"))
    main = runpy.run_path(str(tmp_path / "slic.py"), run_name="slic")["main"]
    assert utils._read_flags("slic.py", main, shlex.split("--beta 0.2 --model M --input I --output O"))["beta"] == 0.2
    assert "beta:" in inspect.getdoc(main) and "soft_labels:" in inspect.getdoc(main)


@pytest.fixture
def copy(tmp_path):
    """A copy of what `comal.sh --plan` and `--help` need."""
    for name in ("launch", "data/demo", "prompts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "comal.sh", tmp_path)

    def insert(path, after, line):
        assert text(path).count(after) == 1
        (tmp_path / path).write_text((tmp_path / path).read_text().replace(after, after + line))

    def comal(*arguments):
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
        return subprocess.run(
            ["bash", tmp_path / "comal.sh", *arguments], env=environment, capture_output=True, text=True, timeout=60
        )

    return SimpleNamespace(insert=insert, comal=comal)


def test_example_method_is_planned(copy):
    (dpo,) = re.findall(r"^  iter-dpo .*\n", text("comal.sh"), re.MULTILINE)
    copy.insert("comal.sh", dpo, example("METHODS"))
    copy.insert("comal.sh", '  if [[ $TRAINER == dpo ]]; then loss=(--beta "$BETA"); fi\n', example("train"))
    plan = copy.comal("--plan", "METHOD=iter-slic", "RECIPE=demo", "GPUS=none")
    assert plan.returncode == 0, plan.stderr
    commands = re.findall(r"slic\.py .*", plan.stdout)
    assert len(commands) == 3 and "# iterations 7 to 11: as iteration 1 " in plan.stdout
    assert all("--beta 2 " in command and "--soft_labels true " in command for command in commands)
    assert "--model exps/demo-iter-slic/iter5/ckpt " in commands[-1]


def test_example_setting_is_explained(copy):
    copy.insert("launch/settings.sh", text("launch/settings.sh"), example("launch/settings.sh"))
    shown = copy.comal("--help")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"START_TOLERANCE=0 +nats by", shown.stdout)


# P(i beats j). The scores are 0.6, 0.5 and 0.4; the clearest verdict is that 1 beats 2.
CLEAR = [[None, 0.6, 0.6], [0.4, None, 0.9], [0.4, 0.1, None]]


@pytest.fixture
def most_certain(monkeypatch):
    rule = run_example("data_processing.py", data_processing)["most_certain"]
    monkeypatch.setitem(data_processing.PAIR_RULES, "most_certain", rule)
    return rule


def test_example_pair_rule_by_hand(most_certain):
    assert most_certain({"win_probs": CLEAR}, [True] * 3, None) == (1, 2)
    assert most_certain({"win_probs": CLEAR}, [True, True, False], None) == (0, 1)
    assert most_certain({"win_probs": CLEAR}, [True, False, False], None) is None


def test_example_pair_rule_makes_pairs(most_certain, tmp_path):
    samples = [{"text": letter, "token_ids": [number]} for number, letter in enumerate("abc")]
    record = {"prompt_id": "p", "prompt": "?", "prompt_token_ids": [7], "samples": samples, "win_probs": CLEAR}
    empty = [sample | {"token_ids": []} for sample in samples]
    source = write(tmp_path / "scores.jsonl", [record, record | {"prompt_id": "none", "samples": empty}])
    data_processing.make_pairs(source, str(tmp_path / "pairs.jsonl"), pair_rule="most_certain")
    (pair,) = read(tmp_path / "pairs.jsonl")
    assert (pair["prompt_id"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("p", "b", "c")
    assert pair["win_prob"] == 0.9


def test_example_judge_scores_files(monkeypatch, tmp_path):
    (tmp_path / "shorter.py").write_text(example("judges/shorter.py"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(judges.base.JUDGE_TYPES, "shorter", "shorter:ShorterJudge")
    samples = [{"text": text, "token_ids": [1]} for text in ("long", "s", "s")]
    record = {"prompt_id": "p", "prompt": "?", "prompt_token_ids": [7], "samples": samples}
    source, target = write(tmp_path / "samples.jsonl", [record]), tmp_path / "scores.jsonl"
    scoring.main(str(source), str(target), judge="none", judge_type="shorter", reward_temperature="3", gpus="none")
    (scored,) = read(target)
    p = 1 / (1 + math.exp(-1))  # one character is three less than four, and T is 3
    rows = [[None, 1 - p, 1 - p], [p, None, 0.5], [p, 0.5, None]]
    assert scored["win_probs"] == [[value and pytest.approx(value) for value in row] for row in rows]
