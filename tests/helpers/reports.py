"""An experiment made by hand, as the tests of the report read it, and how they read it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis import page, plots, report
from analysis.experiment import read_responses
from analysis.figures import Files, read_json

MODEL = "models/start"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_jsonl(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def sample(text, num_tokens, finish_reason="stop"):
    return {"text": text, "token_ids": [0] * num_tokens, "finish_reason": finish_reason}


def score(prompt_id, order_gap, label_mass):
    return {"prompt_id": prompt_id, "order_gap": order_gap, "label_mass": label_mass}


def pair(prompt_id, last, ref):
    return {
        "prompt_id": prompt_id,
        "last_chosen_logp": last[0],
        "last_rejected_logp": last[1],
        "ref_chosen_logp": ref[0],
        "ref_rejected_logp": ref[1],
    }


def step(number, kl_last, margin=0.0):
    return {
        "step": number,
        "loss": 1.0,
        "normalised_loss": 1 - number / 20,
        "margin": margin,
        "accuracy": 0.5,
        "kl_last": kl_last,
        "tokens_per_s": 100.0 * number,
    }


def comparison(prompt_id, prompt, response, baseline, win_prob):
    return {
        "prompt_id": prompt_id,
        "prompt": prompt,
        "samples": [sample(response, 3), sample(baseline, 2)],
        "win_probs": [[None, win_prob], [1 - win_prob, None]],
        "order_gap": 0.1,
        "label_mass": 1.0,
    }


def comparison_summary(win_rate, tokens):
    return {
        "win_rate": win_rate,
        "win_rate_interval": [win_rate - 0.1, win_rate + 0.1],
        "mean_win_prob": 0.55,
        "mean_win_prob_interval": [0.5, 0.6],
        "mean_tokens": tokens,
    }


def make_experiment(path):
    """Two iterations, a round each; the reference moves after the first, the second is complete too."""
    write_json(
        path / "run.json",
        {"METHOD": "comal", "MODEL": MODEL, "JUDGE": "judge", "SPLITS": "1", "ROUNDS": "3", "ETA": "0.002", "FROM": ""},
    )
    for number in (0, 1):
        folder = path / f"iter{number}"
        write_jsonl(
            folder / "train.samples.jsonl",
            {"prompt_id": "a", "samples": [sample("x", 10), sample("y", 20, "length")]},
            {"prompt_id": "b", "samples": [sample("x", 30), sample("x", 30)]},
        )
        write_jsonl(folder / "test.samples.jsonl", {"prompt_id": "c", "samples": [sample("x", 5), sample("y", 1)]})
        write_jsonl(folder / "train.scores.jsonl", score("a", 0.2, 0.9), score("b", None, None))
        write_jsonl(folder / "test.scores.jsonl", score("c", 0.4, 1.0))
        write_jsonl(folder / "train.pairs.jsonl", {"prompt_id": "a"})
        write_jsonl(folder / "test.pairs.jsonl", {"prompt_id": "c"})
        write_jsonl(folder / "data" / "test.jsonl", pair("c", (-4.0, -8.0), (-5.0, -8.5)))
        write_jsonl(
            folder / "ckpt" / "metrics.jsonl",
            *(step(number, kl_last=number / 10) for number in range(1, 21)),
            {
                "step": 20,
                "validation_loss": 1.0,
                "validation_normalised_loss": 0.7,
                "validation_margin": 2.0,
                "validation_accuracy": 0.8,
            },
        )
        write_json(folder / "ckpt" / "DONE", {})
        write_jsonl(
            folder / "logs" / "times.jsonl",
            {"stage": "sampling", "seconds": 30},
            {"stage": "training", "seconds": 60},
            {"stage": "sampling", "seconds": 90},
        )
        write_json(folder / "eval" / "vs_start.json", comparison_summary(0.6 + number / 10, [12, 10]))
        write_json(folder / "eval" / "vs_previous.json", comparison_summary(0.55, [12, 11]))
        write_jsonl(
            folder / "eval" / "vs_start.jsonl",
            comparison("e1", "<script>alert(1)</script>", "<b>new</b> & more", "old", 0.75),
            comparison("e2", "second", "two", "one", 0.5),
        )
        write_jsonl(
            folder / "eval" / "vs_previous.jsonl",
            comparison("e1", "<script>alert(1)</script>", "<b>new</b> & more", "before", 0.25),
            comparison("e2", "second", "two", "one", 0.5),
        )
        write_json(folder / "next.json", {"policy": f"{path}/iter{number}/ckpt", "reference": f"{path}/iter0/ckpt"})
    write_jsonl(path / "iter1" / "train.scores.skipped.jsonl", {"prompt_id": "z", "skipped": "too long"})
    # Under the initial policy the pair's log-probabilities are -7 and -10: (-4 + 7 - 8 + 10)/2 = 2.5.
    write_jsonl(path / "iter1" / "eval" / "start_logps.jsonl", pair("c", (-7.0, -10.0), (0.0, 0.0)))
    write_json(
        path / "game.json",
        [
            {"iteration": "start", "duality_gap": 0.5, "other": 0.1},
            {"iteration": 0, "duality_gap": 0.3, "other": 0.2},
            {"iteration": 1, "duality_gap": 0.4, "other": 0.05},
        ],
    )
    return path


def write_report(experiments, output=""):
    """The path of the report's page."""
    report.main(list(map(str, experiments)), str(output))
    return Path(output or experiments[0] / "report") / "index.html"


def summary_of(index):
    return json.loads(index.with_name("summary.json").read_text())["experiments"]


def read(paths):
    """The experiments as they go into the pages."""
    kept = read_json(paths[0] / "report" / "cache.json")
    found = report.read_apart(paths, [Files(kept) for _ in paths])
    for experiment in found:
        experiment["colour"] = plots.COLOURS[0]
    return found


def write_data_only(paths):
    """All of a report but its plots, which take most of the time."""
    found = read(paths)
    write_pages_without_plots(found)
    return found


def write_pages_without_plots(experiments):
    """(the report's page, the page of responses)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "sections", lambda experiments: [])
        index = page.index_html(experiments)
    return index, page.responses_html(experiments, [read_responses(experiment, 40) for experiment in experiments])


class Page(HTMLParser):
    """Collects the text, the links and what a page would load, and checks that elements are closed."""

    VOID = {"meta", "br", "path", "use", "rect"}

    def __init__(self, source):
        super().__init__()
        self.text, self.links, self.open, self.tags = [], [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(path):
    return " ".join("".join(Page(Path(path).read_text()).text).split())


@pytest.fixture(name="experiment")
def experiment_fixture(tmp_path):
    return make_experiment(tmp_path / "exps" / "first")
