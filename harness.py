"""Academic benchmarks through lm-evaluation-harness (`pip install lm_eval`): `eval.py harness --tasks gsm8k,mmlu`."""

import importlib.metadata
import json
import os
from importlib.util import find_spec
from unittest import mock

from utils import StageError, check_weights, first_line, log, resolve_model, resolve_tokenizer, write_text

BACKENDS = ("vllm", "hf")


def run_tasks(
    model,
    tasks,
    output,
    tokenizer="",
    backend="vllm",
    include_path="",
    num_fewshot=None,
    limit=None,
    chat_template=True,
    max_model_len=4096,
    tensor_parallel_size=1,
    seed=0,
):
    """Run tasks of the harness on a checkpoint and write its results, {"results", "configs", "versions", "n-samples",
    ...}.

    Returns the harness's table as text. Raises StageError where lm_eval is not installed, or a task is unknown or
    fails.
    """
    if find_spec("lm_eval") is None:
        raise StageError("lm-evaluation-harness is not installed: pip install lm_eval")
    directory = resolve_model(model)
    check_weights(directory)
    import torch

    arguments = {
        "pretrained": directory,
        "tokenizer": resolve_tokenizer(model, tokenizer),
        "seed": seed,
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
    }
    if backend == "vllm":
        arguments |= {"max_model_len": max_model_len, "tensor_parallel_size": tensor_parallel_size}
        if not torch.cuda.is_available():
            _import_backend_on_cpu()
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len)}
    else:
        arguments["max_length"] = max_model_len
        arguments.pop("seed")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=include_path or None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise StageError(
            f"--tasks {', '.join(unknown)}: the harness has no such task; `lm_eval ls tasks` lists them, "
            "--include_path adds a folder of your own"
        )
    try:
        found = simple_evaluate(
            model=backend,
            model_args=arguments,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            device=None if torch.cuda.is_available() else "cpu",
            batch_size="auto" if backend == "vllm" else 1,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # tasks and backends raise many kinds
        log.exception("the harness failed")
        raise StageError(f"the harness failed on {', '.join(tasks)}: {first_line(error)}") from None
    write_text(output, json.dumps(found, indent=2, default=str) + "\n")
    return make_table(found)


def _import_backend_on_cpu():
    """The harness's vLLM backend asks for vLLM's version under the name of the GPU build, and is told that of the
    CPU's.

    vLLM itself, which goes by that name too, is not.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm.platforms import current_platform

    version, device = importlib.metadata.version, current_platform.device_type  # looked up now
    log.info("vLLM on %s", device)
    with mock.patch("importlib.metadata.version", lambda name: version("vllm-cpu" if name == "vllm" else name)):
        import lm_eval.models.vllm_causallms  # noqa: F401, binds the name
