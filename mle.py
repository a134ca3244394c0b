"""Supervised fine-tuning (maximum likelihood), which gives every method its initial policy: chats -> checkpoint.

    accelerate launch --config_file fsdp_config.yaml mle.py --model BASE --input data/sft.jsonl \\
        --validation data/sft_test.jsonl --output ckpt --learning_rate 2e-5 --warmup_ratio 0.03 --num_epochs 2

Only the assistant's last answer in `messages` and its end token are learnt. The loss is the mean negative
log-likelihood per response token over the global batch, each chat with its `weight` (default 1). With --from_config
training starts from random weights.

Assumes: the chat template of --model, or of --tokenizer, is the one that the chats should be written in. Input: see
records.py.
"""

from losses import mle_loss
from training.datasets import ChatDataset
from training.trainer import TrainingConfig, train
from utils import run


def main(**training: TrainingConfig):
    """Fine-tune on chats."""
    compute_loss = lambda logps, batch: mle_loss(logps, batch["num_tokens"])
    train(compute_loss, TrainingConfig(**training), ChatDataset, loss="mle")


if __name__ == "__main__":
    run(main)
