"""A reward model as a judge: Bradley-Terry probabilities from the rewards of single responses."""

import math

from data_utils import encode_chat, load_tokenizer
from judges.base import Judge, JudgeConfig, different_texts, orders, sigmoid, too_long, win_matrix
from utils import StageError
from vllm_model import Engine, EngineWork, load_config


def temperature(config: JudgeConfig) -> float:
    """T of the sigmoid. Raises StageError unless it is a number greater than 0."""
    try:
        value = float(config.reward_temperature)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise StageError(f"--reward_temperature should be a number greater than 0, got {config.reward_temperature}")
    return value


class RewardJudge(EngineWork, Judge):
    """A reward model, r(prompt, response): P(first beats second) = sigmoid((r(first) - r(second)) / T), Bradley-Terry.

    Each different response is scored once, through vLLM's pooling; `rewards` has the raw scores of the K responses.
    Several such judges are the mixture of the paper's second version: the mean of their probabilities, not of their
    scores.

    Raises StageError for a model that is no sequence classifier with one output.
    """

    has_labels = False
    settings = ("dtype", "engine_args", "judge_tokenizer", "reward_temperature", "max_prompt_tokens")

    check = staticmethod(temperature)

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.temperature, self.max_prompt_tokens = temperature(config), config.max_prompt_tokens
        model = load_config(config.judge_path)
        kind = (model.architectures or ["unknown"])[0]
        if ("SequenceClassification" not in kind and "Reward" not in kind) or model.num_labels != 1:
            raise StageError(
                f"{config.judge} is a {kind} with {model.num_labels} outputs; a reward model is a sequence "
                "classifier with one"
            )
        self.tokenizer = load_tokenizer(config.judge_path, config.tokenizer_path)
        self.engine = Engine(config.judge_path, config.tokenizer_path, self.max_prompt_tokens, config, "reward")

    def requests(self, job: int, record: dict) -> list[tuple] | str:
        from vllm import PoolingParams

        asked = {"role": "user", "content": record["prompt"]}
        chats = [
            encode_chat(self.tokenizer, [asked, {"role": "assistant", "content": text}], add_generation_prompt=False)
            for text in different_texts(record)
        ]
        params = dict(task="classify", use_activation=False)
        return too_long(chats, self.max_prompt_tokens) or [(chat, PoolingParams(**params)) for chat in chats]

    def read(self, record: dict, outputs: list) -> dict:
        rewards = dict(zip(different_texts(record), (output.outputs.data.item() for output in outputs)))
        if not all(map(math.isfinite, rewards.values())):
            raise StageError(
                f"{self.engine.model} gives no finite reward to the responses of prompt_id {record['prompt_id']}"
            )
        judgements = {
            (first, second): (sigmoid((rewards[first] - rewards[second]) / self.temperature), 1.0)
            for first, second in orders(record)
        }
        texts = [sample["text"] for sample in record["samples"]]
        return record | win_matrix(texts, judgements) | {"rewards": [rewards[text] for text in texts]}
