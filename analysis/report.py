"""Report of one or several experiments: a page to read while they run and to choose a checkpoint by.

    python -m analysis.report exps/A [exps/B ...] [--output DIR]

Input: folders of comal.sh, finished, still going or stopped anywhere. What is missing is left out and named; no model
is loaded. Output, in DIR (of one experiment: exps/NAME/report):
    index.html      headline figures, plots (inline SVG), a table by iteration, the settings; it loads nothing
    responses.html  answers to the first evaluation prompts side by side: initial policy, previous iteration, current
    summary.json    {"experiments": [...]}, what the plots and tables show: see experiment.py
    cache.json      figures of each file, by its size and modification time: see figures.py
"""

import json
from collections import Counter
from pathlib import Path

from analysis.experiment import read_experiment, read_responses
from analysis.figures import Files, read_cache, write_cache
from analysis.page import index_html, responses_html
from analysis.plots import COLOURS
from utils import StageError, check_at_least, log, run, write_text


def name_apart(experiments: list):
    """Give each its colour, and those of one name their paths as names."""
    names = Counter(experiment["name"] for experiment in experiments)
    for place, experiment in enumerate(experiments):
        experiment["colour"] = COLOURS[place % len(COLOURS)]
        if names[experiment["name"]] > 1:
            experiment["name"] = experiment["path"]


def write_report(experiments: list, output: Path | None = None, num_prompts: int = 40) -> Path:
    """Write index.html, responses.html and summary.json; returns the path of index.html.

    Args:
        experiments: folders of comal.sh; several are laid over each other
        output: folder; default: `report` in the experiment's, where there is one
        num_prompts: prompts in responses.html

    Raises StageError for a folder that is no experiment, and for several without an output folder.
    """
    paths = [Path(path) for path in experiments]
    if not paths:
        raise StageError("give at least one experiment: exps/NAME")
    if len({path.resolve() for path in paths}) < len(paths):
        raise StageError(f"an experiment is given twice: {', '.join(map(str, paths))}")
    if output is None and len(paths) > 1:
        raise StageError("a report on several experiments needs a folder of its own: --output DIR")
    check_at_least(1, num_prompts=num_prompts)
    output = paths[0] / "report" if output is None else Path(output)
    if output.is_file():
        raise StageError(f"--output {output} is a file; give a folder")
    kept = read_cache(output / "cache.json")
    files = [Files(kept) for _ in paths]
    found = list(map(read_experiment, paths, files))
    name_apart(found)
    responses = [read_responses(experiment, num_prompts) for experiment in found]
    summary = [{name: value for name, value in experiment.items() if name != "colour"} for experiment in found]
    write_text(
        output / "summary.json",
        json.dumps({"experiments": summary}, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    write_text(output / "responses.html", responses_html(found, responses))
    write_text(output / "index.html", index_html(found))
    write_cache(output / "cache.json", files)
    log.info("report on %s: %s", ", ".join(experiment["name"] for experiment in found), output / "index.html")
    return output / "index.html"


def main(experiments: list, output: str = "", num_prompts: int = 40):
    """A page with all figures and plots of a run, finished or not, and its responses side by side.

    Args:
        experiments: folder(s) of comal.sh, exps/A [exps/B ...]; several are laid over each other
        output: folder for index.html, responses.html and summary.json; default for one experiment: its report/
        num_prompts: prompts on the page of responses
    """
    write_report(list(map(Path, experiments)), Path(output) if output else None, num_prompts)


if __name__ == "__main__":
    run(main)
