"""Supervised fine-tuning (maximum likelihood) on chats: the starting model of every method.

    accelerate launch --config_file fsdp_config.yaml mle.py --model BASE --input data/sft.jsonl \\
        --validation data/sft_test.jsonl --output ckpt --learning_rate 2e-5 --warmup_ratio 0.03 --num_epochs 2

Input, one JSON object a line: `messages`, a list of {role, content} that ends with the assistant's answer, and an
optional `weight` (default 1). Only the answer and its end token are learnt. The loss is the mean negative
log-likelihood per response token over the global batch. With --from_config training starts from random weights.
"""

from losses import mle_loss
from training.datasets import ChatDataset
from training.trainer import TrainingConfig, train
from utils import run


def main(**training: TrainingConfig):
    """Fine-tune on chats."""
    train(
        lambda logps, batch: mle_loss(logps, batch["num_tokens"]), TrainingConfig(**training), ChatDataset, loss="mle"
    )


if __name__ == "__main__":
    run(main)
