"""Log-probabilities of pairs under the last policy and the reference: pairs -> training data.

    accelerate launch --config_file fsdp_config.yaml get_logprobs.py --model LAST --reference REF \\
        --input train.pairs.jsonl,test.pairs.jsonl --output data/train.jsonl,data/test.jsonl

Input: pairs files of data_processing.py, or any file in TRL's conversational preference format (`prompt`, `chosen`,
`rejected` message lists); text that comes without token ids is tokenised here, and ends with the end token.
Output, in input order: the input's fields and
    last_chosen_logp, last_rejected_logp   float, log-probability under --model, summed over response tokens
    ref_chosen_logp, ref_rejected_logp     float, the same under --reference
    chosen_num_tokens, rejected_num_tokens int

Natural logarithms; the end token counts where it was sampled. They come from the forward path and precision of
training (launch both the same way), so that training can check that it starts from the last policy. Each model is
loaded once, and only one when both are the same. Exit code 0 means that every pair of the input is in the output.
"""

import math

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from data_utils import UnscoredPairDataset, load_tokenizer, resolve_model
from train_utils import batch_logps, load_model, local_batches, on_device, start_accelerator
from utils import StageError, file_lists, jsonl_writer, log, run

GATHER_EVERY = 64  # micro-batches between two exchanges among processes


def model_logps(name, datasets, batch_size, accelerator):
    """[(chosen, rejected) summed log-probabilities of every record, one list a data set] under one model."""
    model = load_model(name)
    # Under FSDP 2 accelerate shards a model only together with an optimiser; this one keeps no state and never steps.
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    model.eval()
    results = []
    for dataset in datasets:
        logps = [(math.nan, math.nan)] * len(dataset)
        batches = list(local_batches(list(range(len(dataset))), batch_size, accelerator))
        bar = tqdm(total=len(dataset), desc=f"log-probabilities {name}", unit="pair",
                   disable=not accelerator.is_main_process)
        for first in range(0, len(batches), GATHER_EVERY):
            found = []
            for indices, counts in batches[first:first + GATHER_EVERY]:
                batch = on_device(dataset.collate([dataset[i] for i in indices]), accelerator.device)
                with torch.no_grad():
                    chosen, rejected = batch_logps(model, batch).chunk(2)
                found += list(zip(indices, chosen.tolist(), rejected.tolist())) if counts else []
                bar.update(min(len(indices) * accelerator.num_processes, bar.total - bar.n))
            for index, *values in gather_object(found):
                logps[index] = tuple(values)
        bar.close()
        results.append(logps)
    accelerator.free_memory(model)
    return results


def write(dataset, path, last, ref):
    """Write the records with their log-probabilities; raises StageError if one is missing or not finite."""
    bad = [i for i in range(len(dataset)) if not all(map(math.isfinite, last[i] + ref[i]))]
    if bad:
        raise StageError(f"{dataset.path}: no finite log-probability for {len(bad)} of {len(dataset)} pairs, first "
                         + ", ".join(dataset[i]["prompt_id"] for i in bad[:10]))
    with jsonl_writer(path) as write_record:
        for index in range(len(dataset)):
            record = dataset[index]
            names = ("last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
            lengths = {f"{side}_num_tokens": len(record[f"{side}_token_ids"]) for side in ("chosen", "rejected")}
            write_record(record | dict(zip(names, last[index] + ref[index])) | lengths)
    log.info("%s: %d pairs", path, len(dataset))


def main(model: str, reference: str, input: str, output: str, tokenizer: str = "", batch_size: int = 1,
         max_length: int = 2048):
    """Add the log-probabilities under the last policy and the reference to pairs.

    Args:
        model: the last policy, that the responses were sampled from: checkpoint directory or Hub id
        reference: likewise
        input: pairs file(s), comma-separated
        output: data file(s), as many
        tokenizer: directory or Hub id; default: the model's
        batch_size: pairs a forward pass on one process; 1 makes the values independent of their neighbours
        max_length: prompt and response tokens together, at most
    """
    inputs, outputs = file_lists(input=input, output=output)
    loaded = load_tokenizer(model, tokenizer)
    accelerator = start_accelerator(seed=0)
    names = list(dict.fromkeys(map(resolve_model, (model, reference))))
    vocab_size = vocabulary(names)
    datasets = [UnscoredPairDataset(path, loaded, max_length, vocab_size) for path in inputs]
    logps = {name: model_logps(name, datasets, batch_size, accelerator) for name in names}
    if accelerator.is_main_process:
        for i, (dataset, path) in enumerate(zip(datasets, outputs)):
            write(dataset, path, logps[names[0]][i], logps[names[-1]][i])
    accelerator.wait_for_everyone()
    accelerator.end_training()


def vocabulary(names):
    """The smaller of the models' vocabulary sizes."""
    from transformers import AutoConfig
    return min(AutoConfig.from_pretrained(name).get_text_config().vocab_size for name in names)


if __name__ == "__main__":
    run(main)
