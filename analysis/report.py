"""Report of one or several experiments: a page to read while they run and to choose a checkpoint by.

    python -m analysis.report exps/A [exps/B ...] [--output DIR]

Input: folders of comal.sh, finished, still going or stopped anywhere. What is missing is left out and named; no model
is loaded. Output, in DIR (of one experiment: exps/NAME/report):
    index.html      headline figures, plots (inline SVG), a table by iteration, the settings; it loads nothing
    responses.html  answers to the first evaluation prompts side by side: initial policy, previous iteration, current
    summary.json    {"experiments": [...]}, what the plots and tables show: see experiment.py
    cache.json      figures of each file, by its size and modification time: see figures.py
"""

import itertools
import json
from collections import Counter
from pathlib import Path

from analysis.experiment import read_experiment, read_responses
from analysis.figures import Files, read_json
from analysis.page import index_html, responses_html
from analysis.plots import COLOURS
from utils import StageError, check_at_least, dump_json, log, run, write_text


def read_apart(paths: list, files: list) -> list:
    """The experiments in these folders; those of one name have their paths as names."""
    found = list(map(read_experiment, paths, files))
    names = Counter(experiment["name"] for experiment in found)
    for experiment in found:
        if names[experiment["name"]] > 1:
            experiment["name"] = experiment["path"]
    return found


def main(experiments: list, output: str = "", num_prompts: int = 40):
    """A page with all figures and plots of a run, finished or not, and its responses side by side.

    Args:
        experiments: folder(s) of comal.sh, exps/A [exps/B ...]; several are laid over each other
        output: folder for index.html, responses.html and summary.json; default for one experiment: its report/
        num_prompts: prompts on the page of responses
    """
    paths = [Path(path) for path in experiments]
    if not paths:
        raise StageError("give at least one experiment: exps/NAME")
    if len({path.resolve() for path in paths}) < len(paths):
        raise StageError(f"an experiment is given twice: {', '.join(map(str, paths))}")
    if not output and len(paths) > 1:
        raise StageError("a report on several experiments needs a folder of its own: --output DIR")
    check_at_least(1, num_prompts=num_prompts)
    folder = Path(output or paths[0] / "report")
    if folder.is_file():
        raise StageError(f"--output {folder} is a file; give a folder")
    kept = read_json(folder / "cache.json")
    files = [Files(kept) for _ in paths]
    found = read_apart(paths, files)
    summary = json.dumps({"experiments": found}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "summary.json", summary + "\n")
    for experiment, colour in zip(found, itertools.cycle(COLOURS)):
        experiment["colour"] = colour
    responses = [read_responses(experiment, num_prompts) for experiment in found]
    write_text(folder / "responses.html", responses_html(found, responses))
    write_text(folder / "index.html", index_html(found))
    used = {key: entry for own in files for key, entry in own.used.items()}
    write_text(folder / "cache.json", dump_json(used) + "\n")
    log.info("report on %s: %s", ", ".join(experiment["name"] for experiment in found), folder / "index.html")


if __name__ == "__main__":
    run(main)
