"""What leaves the pipeline for other tools: `python -m analysis.export --format alpaca_eval | hf | hub`.

alpaca_eval  responses file(s) -> one JSON file of model outputs, `[{instruction, output, generator}]`
hf           pairs file(s) -> a folder that `datasets.load_dataset` reads and TRL trains on, one split a file
hub          checkpoint -> a folder with the model and its card, ready for `hf upload`
"""

import contextlib
import json
import shutil
from pathlib import Path

from data_utils import check_weights, resolve_model
from utils import StageError, check_input, log, read_jsonl, run, split_list, write_text


def export_files(format, inputs, output, name):
    """Write `inputs` (paths) in a format of FORMATS to `output`; `name` is the model's or data set's, may be empty.

    Raises StageError for an unknown format, an output that exists, or an input that is not what the format needs.
    """
    if format not in FORMATS:
        raise StageError(f"--format should be one of {', '.join(FORMATS)}, got {format}")
    if Path(output).exists():
        raise StageError(f"--output {output} exists; remove it or give another name")
    FORMATS[format](inputs, Path(output), name)


def _one(inputs, format):
    if len(inputs) != 1:
        raise StageError(f"--format {format} takes one --input, got {len(inputs)}")
    return Path(inputs[0])


def alpaca_eval(inputs, output, name):
    """AlpacaEval's model outputs, which it joins with the reference's on the instruction."""
    source = _one(inputs, "alpaca_eval")
    check_input(source)
    name = name or source.parent.parent.name
    rows = [
        {"instruction": record["prompt"], "output": record["samples"][0]["text"], "generator": name}
        for record in read_jsonl(source, {"prompt": str, "samples": list})
    ]
    write_text(output, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def hf(inputs, output, name):
    """Parquet files under data/ and a card; the split is the beginning of the file's name (train.pairs.jsonl:
    train)."""
    from datasets import load_dataset

    splits = {}
    for source in map(Path, inputs):
        check_input(source)
        splits.setdefault(source.name.partition(".")[0], []).append(str(source))
        for _ in read_jsonl(source, {"prompt": list, "chosen": list, "rejected": list}, unique=None):
            pass
    with _folder(output) as folder:
        for split, files in splits.items():
            (folder / "data").mkdir(exist_ok=True)
            load_dataset("json", data_files=files, split="train").to_parquet(
                folder / f"data/{split}-00000-of-00001.parquet"
            )
        (folder / "README.md").write_text(
            "---\ntags: [preference, trl, comal]\nconfigs:\n- config_name: default\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in splits)
            + f"---\n\n# {name or 'Preference pairs'}\n\nPairs in TRL's conversational preference format. `win_prob` "
            "is the judge's probability that "
            "`chosen` beats `rejected`; the `*_token_ids` are those that were sampled.\n",
            encoding="utf-8",
        )


def hub(inputs, output, name):
    """The checkpoint's files and a model card with its method, settings and results, as far as its experiment has
    them."""
    source = _one(inputs, "hub")
    directory = Path(resolve_model(str(source)))
    check_weights(directory)
    checkpoint = directory.parent if directory.name == "model" else directory
    with _folder(output) as folder:
        shutil.copytree(directory, folder, dirs_exist_ok=True)
        for file in folder.iterdir():
            file.chmod(0o644)
        (folder / "README.md").write_text(model_card(checkpoint, name), encoding="utf-8")


def model_card(checkpoint, name=""):
    """Markdown with the Hub's YAML header, from training.json, run.json and the evaluations beside the checkpoint."""
    iteration = checkpoint.resolve().parent
    training, run = _json(checkpoint / "training.json"), _json(iteration.parent / "run.json")
    base = run.get("MODEL") or training.get("model", "")
    title = name or f"{iteration.parent.name} {iteration.name}"
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [comal, preference-optimisation]"]
    if base.count("/") == 1 and not Path(base).exists():
        header.append(f"base_model: {base}")
    lines = ["---", *header, "---", "", f"# {title}", ""]
    if run:
        lines += [
            f"A policy aligned with general preferences by `METHOD={run['METHOD']}` of COMAL "
            "([paper](https://arxiv.org/abs/2410.23223)): "
            f"{iteration.name} of a run that started from `{base}` and was judged by `{run['JUDGE']}`.",
            "",
        ]
    results = [(against, _json(iteration / f"eval/vs_{against}.json")) for against in ("start", "previous")]
    if any(found for _, found in results):
        lines += [
            "| against | win rate, 95 % interval | mean win probability | prompts | mean tokens, ours and theirs |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {against} | {100 * r['win_rate']:.1f} % [{100 * r['win_rate_interval'][0]:.1f}, "
            f"{100 * r['win_rate_interval'][1]:.1f}] | {r['mean_win_prob']:.3f} | {r['num_prompts']} | "
            f"{r['mean_tokens'][0]:.0f}, {r['mean_tokens'][1]:.0f} |"
            for against, r in results
            if r
        ]
        lines += ["", "Judged by the training's own judge, in both orders.", ""]
    for heading, settings in (("Training", training), ("Run", run)):
        if settings:
            lines += [f"## {heading}", "", "| | |", "|---|---|"]
            lines += [f"| `{key}` | `{value}` |" for key, value in settings.items() if value != ""] + [""]
    return "\n".join(lines)


def _json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextlib.contextmanager
def _folder(path):
    """A directory that takes its name when the block ends without an error."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


FORMATS = {"alpaca_eval": alpaca_eval, "hf": hf, "hub": hub}


def main(format: str, input: str, output: str, name: str = ""):
    """Write responses, pairs or a checkpoint in another tool's format.

    Args:
        format: alpaca_eval (responses -> model outputs), hf (pairs -> a data set folder) or hub (checkpoint -> a folder
            with a model card, ready for `hf upload`)
        input: file(s), comma-separated, or the checkpoint
        output: file (alpaca_eval) or new folder
        name: of the model or data set; default: from the path
    """
    export_files(format, split_list(input), output, name)
    log.info("%s: written", output)


if __name__ == "__main__":
    run(main)
