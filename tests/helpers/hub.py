"""A cache of the Hub with tiny models, laid out as the published checkpoints are."""

import os
import shutil

from helpers.mirror import COMMIT

ON_HUB = {
    "MODEL": "our/policy-round5",
    "REFERENCE": "our/policy-round4",
    "TOKENIZER": "our/base",
    "JUDGE": "our/judge",
}
NAMES = ("config.json", "generation_config.json", "model.safetensors")


def in_cache(cache, name, files):
    """Put a repository into the cache: {path in the repository: file}."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    for number, (path, source) in enumerate(files.items()):
        blob, link = repository / "blobs" / f"{number:040x}", repository / "snapshots" / COMMIT / path
        shutil.copy(source, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def fill_cache(cache, models):
    """Fill a cache with our/policy-round5 and -round4, as the published checkpoints (files in model/, no tokenizer),
    their tokenizer our/base without weights, and our/judge with its files at the root; from the folders policy/model
    and judge/model. Returns the settings of a run that takes all from there."""
    policy, judge = models / "policy/model", models / "judge/model"
    model = {f"model/{name}": policy / name for name in NAMES if (policy / name).exists()}
    assert len(model) >= 2
    for number in (4, 5):
        in_cache(cache, f"our/policy-round{number}", model)
    in_cache(cache, "our/base", {path.name: path for path in policy.iterdir() if path.name not in NAMES})
    in_cache(cache, "our/judge", {path.name: path for path in judge.iterdir()})
    return ON_HUB | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
