"""Log-probabilities of pairs under the last policy and the reference: pairs -> training data.

    accelerate launch --config_file fsdp_config.yaml get_logprobs.py --model LAST --reference REF \\
        --input train.pairs.jsonl,test.pairs.jsonl --output data/train.jsonl,data/test.jsonl

Input: pairs files of data_processing.py, or any file in TRL's conversational preference format (`prompt`, `chosen`,
`rejected` message lists); text that comes without token ids is tokenised here, and ends with the end token.
Output: the input's records in their order, with `last_chosen_logp`, `last_rejected_logp`, `ref_chosen_logp`,
`ref_rejected_logp`, `chosen_num_tokens` and `rejected_num_tokens` (see records.py).

The log-probabilities are natural logarithms, summed over the response tokens, the end token among them where it was
sampled. They come from the forward path and the precision of training, so that training can check that it starts from
the last policy. Each model is loaded once, and only one when both are the same. What is finished is kept in
`<output>.last.partial` and `<output>.ref.partial`: a run that was killed goes on there. Exit code 0 means that every
pair of the input is in the output.

Assumes: --model is the policy that the responses were sampled from; nothing here can see it, but training will. Both
models have the same tokenizer (that is checked). This stage is launched as training will be: the same accelerate
configuration, above all the same precision.
"""

import itertools
import json
import math
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from data_utils import (
    check_vocabulary,
    check_weights,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
    resolve_tokenizer,
)
from records import Data, writer
from training.datasets import LOGP_FIELDS, UnscoredPairDataset
from training.logps import response_logps
from training.memory import check_choices, plan
from training.models import copy_for_logps, load_model, local_batches, micro_batches, start_accelerator, vocabulary_size
from utils import StageError, check_at_least, file_lists, fingerprint, log, run
from workers.journal import Journal

GATHER_EVERY = 64  # forward passes between two exchanges among processes


def load_pairs(paths, model_dirs, tokenizer_dir, max_length):
    """The data sets of the files, which all models can take. Raises StageError where one lacks weights or has another
    tokenizer than the first."""
    for model_dir in model_dirs:
        check_weights(model_dir)
    tokenizer = load_tokenizer(model_dirs[0], tokenizer_dir)
    for other in model_dirs[1:]:
        check_vocabulary(tokenizer, tokenizer_dir or model_dirs[0], other)
    vocab_size = min(map(vocabulary_size, model_dirs))
    return [UnscoredPairDataset(path, tokenizer, max_length, vocab_size) for path in paths]


def open_journals(label, model_dir, tokenizer, inputs, outputs, accelerator):
    """What was already computed under one model: a Journal for each file, held by the first process.

    Raises StageError where it was computed from other files, with another model, or in another precision.
    """
    if not accelerator.is_main_process:
        return []
    made = {"model": model_fingerprint(model_dir), "tokenizer": tokenizer, "precision": accelerator.mixed_precision}
    return [
        Journal(f"{target}.{label}", made | {"contents of --input": fingerprint(Path(source))})
        for source, target in zip(inputs, outputs)
    ]


def prepare(model, datasets, tokens, sharding, accelerator):
    """(the model, ready for `response_logps`; positions of a forward pass): under FSDP 2 sharded, or a whole copy on
    each process."""
    longest = max(length for dataset in datasets for length in dataset.lengths)
    tokens, sharding = plan(model, accelerator, tokens, sharding, longest, training=False)
    if accelerator.is_fsdp2 and sharding == "optimizer":
        model = copy_for_logps(model, accelerator)
    else:
        # Under FSDP 2 accelerate shards a model only with an optimiser; this one keeps no state and never steps.
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return model.eval(), tokens


def model_logps(model_dir, datasets, journals, tokens, sharding, accelerator):
    """[[(chosen, rejected) summed log-probabilities of each pair] of each data set] under one model.

    Batches are the same wherever an earlier run was stopped; those that `journals` (the main process's, one a data set)
    holds are not computed again.
    """
    (finished,) = broadcast_object_list([[set(journal.offsets) for journal in journals]])
    if not all(ids.issuperset(dataset.ids) for ids, dataset in zip(finished, datasets)):
        began = time.monotonic()
        model, tokens = prepare(load_model(model_dir), datasets, tokens, sharding, accelerator)
        log.info("loaded in %.2f s", time.monotonic() - began)
        for number, dataset in enumerate(datasets):
            batches = micro_batches(range(len(dataset)), dataset.lengths, tokens, accelerator.num_processes)
            left = [batch for batch in batches if not finished[number].issuperset(dataset.ids[i] for i in batch)]
            began = time.monotonic()
            count = sum(map(len, left))
            bar = tqdm(
                total=len(dataset),
                initial=len(dataset) - count,
                unit="pair",
                desc="log-probabilities",
                disable=not accelerator.is_main_process,
            )
            for found in compute(model, dataset, local_batches(left, dataset.lengths, accelerator), accelerator):
                if accelerator.is_main_process:
                    journals[number].append(
                        [{"prompt_id": dataset.ids[index], "logps": logps} for index, *logps in found]
                    )
                bar.update(len(found))
            bar.close()
            log.info("%d pairs in %.2f s", count, time.monotonic() - began)
        accelerator.free_memory(model)
    return [
        [json.loads(line)["logps"] for line in journal.lines(dataset.ids)]
        for journal, dataset in zip(journals, datasets)
    ]


def compute(model, dataset, batches, accelerator):
    """Yield [(index, chosen, rejected), ...] of all processes, on each of them, GATHER_EVERY batches at a time.

    Raises StageError for a value that is not finite.
    """
    for first in range(0, len(batches), GATHER_EVERY):
        owners, logps = [], []
        for indices, counts in batches[first : first + GATHER_EVERY]:
            rows = [dataset.row(dataset[i]) for i in indices]
            with torch.no_grad():
                logps.append(response_logps(model, rows, accelerator.device).reshape(2, -1))
            owners += [(index, counts) for index in indices]
        values = torch.cat(logps, dim=1).tolist()  # read once: a GPU would wait for the program each time
        found = gather_object([(index, *pair) for (index, counts), *pair in zip(owners, *values) if counts])
        bad = [dataset.ids[index] for index, *values in sorted(found) if not all(map(math.isfinite, values))]
        if bad:
            raise StageError(f"{dataset.path}: no finite log-probability for prompt_id {', '.join(bad[:10])}")
        yield found


def write(dataset, path, last, ref):
    """Write the records with their log-probabilities."""
    with writer(path, Data) as write_record:
        for index in range(len(dataset)):
            record = dataset[index]
            lengths = {f"{side}_num_tokens": len(record[f"{side}_token_ids"]) for side in ("chosen", "rejected")}
            write_record(record | dict(zip(LOGP_FIELDS, [*last[index], *ref[index]])) | lengths)
    log.info("%s: %d pairs", path, len(dataset))


def main(
    model: str,
    reference: str,
    input: str,
    output: str,
    tokenizer: str = "",
    micro_batch_tokens: str = "auto",
    sharding: str = "auto",
    max_length: int = 2048,
):
    """Add the log-probabilities under the last policy and the reference to pairs.

    Args:
        model: the last policy, which the responses were sampled from: a checkpoint directory or Hub id
        reference: the reference policy: a checkpoint directory or Hub id
        input: one pairs file, or several separated by commas
        output: the data files, one for each input
        tokenizer: directory or Hub id; default: the model's
        micro_batch_tokens: positions of a forward pass on one process, padding included; at 0 each pair goes alone, as
            longer ones always do: no padding, and values that do not depend on neighbours; auto is what fits into the
            GPUs' memory, and 0 on a CPU
        sharding: full, or optimizer, where FSDP divides the model among the GPUs only in training and here each has a
            copy with the same values; auto is optimizer where that fits into the GPUs' memory. On a CPU it is full
        max_length: prompt and response tokens together, at most
    """
    check_choices(micro_batch_tokens, sharding)
    check_at_least(1, max_length=max_length)
    inputs, outputs = file_lists(input=input, output=output)
    accelerator = start_accelerator(seed=0)
    model_dirs = list(dict.fromkeys(resolve_model(name) for name in (model, reference)))  # one where both are the same
    tokenizer_dir = resolve_tokenizer(tokenizer)
    datasets = load_pairs(inputs, model_dirs, tokenizer_dir, max_length)
    journals = [
        open_journals(label, model_dir, tokenizer, inputs, outputs, accelerator)
        for label, model_dir in zip(("last", "ref"), model_dirs)
    ]
    logps = [
        model_logps(model_dir, datasets, own, micro_batch_tokens, sharding, accelerator)
        for model_dir, own in zip(model_dirs, journals)
    ]
    if accelerator.is_main_process:
        for dataset, path, last, ref in zip(datasets, outputs, logps[0], logps[-1]):
            write(dataset, path, last, ref)
        for journal in itertools.chain(*journals):  # only when all outputs are in place
            journal.remove()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
