"""What leaves the pipeline for other tools.

    python -m analysis.export --format alpaca_eval --input responses.jsonl --output outputs.json
    python -m analysis.export --format hub --input exps/COMAL/iter41/ckpt --output COMAL

alpaca_eval  responses file -> one JSON file of model outputs, `[{instruction, output, generator}]`
hub          checkpoint -> a folder with the model and its card, ready for `hf upload`

Files of pairs and of data need no export: `datasets.load_dataset("json", data_files=...)` reads them, and they are in
TRL's conversational preference format.
"""

import json
import shutil
from pathlib import Path

from data_utils import check_weights, resolve_model
from records import Responses, read
from utils import StageError, check_input, log, run, write_text


def alpaca_eval(source: Path, output: Path, name: str):
    """AlpacaEval's model outputs, which it joins with the reference's on the instruction."""
    check_input(source)
    folder = source.resolve().parent  # of a run's responses it is exps/NAME/iterN/eval
    name = name or (folder.parent.name if folder.name == "eval" and source.stem == "responses" else source.stem)
    rows = [
        {"instruction": record["prompt"], "output": record["samples"][0]["text"], "generator": name}
        for record in read(source, Responses)
    ]
    write_text(output, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def hub(source: Path, output: Path, name: str):
    """The checkpoint's files and a model card with its method, settings and results, as far as its experiment has
    them."""
    directory = Path(resolve_model(str(source)))
    check_weights(directory)
    checkpoint = directory.parent if directory.name == "model" else directory
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(directory, temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
        model_card(checkpoint, name).save(temporary / "README.md")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(checkpoint: Path, name: str = ""):
    """The Hub's ModelCard, from training.json, run.json and the evaluations beside the checkpoint."""
    from huggingface_hub import ModelCard, ModelCardData

    iteration = checkpoint.resolve().parent
    training, run = read_object(checkpoint / "training.json"), read_object(iteration.parent / "run.json")
    base = run.get("MODEL") or training.get("model", "")
    on_hub = base.count("/") == 1 and not Path(base).exists()
    found = {
        policy: read_object(iteration / f"eval/vs_{field}.json")
        for policy, field in (("the initial policy", "start"), ("the previous iteration", "previous"))
    }
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["comal", "preference-optimisation"],
            base_model=base if on_hub else None,
        ),
        template_path=str(Path(__file__).with_name("templates") / "model_card.md.j2"),
        title=name or f"{iteration.parent.name} {iteration.name}",
        iteration=iteration.name,
        base=base,
        training=training,
        run=run,
        results=[(policy, result) for policy, result in found.items() if result],
    )


def read_object(path: Path) -> dict:
    """The object in a JSON file, or an empty one where there is no file; a damaged one is an error."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


FORMATS = {"alpaca_eval": alpaca_eval, "hub": hub}


def main(format: str, input: str, output: str, name: str = ""):
    """Write responses or a checkpoint in another tool's format.

    Args:
        format: alpaca_eval (responses -> model outputs) or hub (checkpoint -> a folder with a model card, ready for
            `hf upload`)
        input: responses file, or the checkpoint
        output: file (alpaca_eval) or new folder (hub)
        name: of the model; default: from the path
    """
    if format not in FORMATS:
        raise StageError(f"--format should be one of {', '.join(FORMATS)}, got {format}")
    if Path(output).exists():
        raise StageError(f"--output {output} exists; remove it or give another name")
    FORMATS[format](Path(input), Path(output), name)
    log.info("%s: written", output)


if __name__ == "__main__":
    run(main)
