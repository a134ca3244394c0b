"""Judges: P(first response beats second), from a generative judge, reward models, a server, or a panel of them.

A judge compares the responses of one record with `prompt` and `samples`, and adds fields to the record:
    win_probs   K x K, [i][j] = P(sample i beats sample j), null on the diagonal, 1/2 between identical texts
    order_gap   mean absolute disagreement of the two presentation orders; null when all K texts are identical; 0 where
                a judge sees no order
    label_mass  mean probability of the judge's two labels together, null likewise; 1 where it is not asked for labels
and what else it has to tell: `rewards`, `usage`, `panel`. `JUDGE_TYPES` names the kinds of judges, each a class in a
file of its own; panel.py judges files.
"""

import importlib
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from data_utils import model_fingerprint, resolve_tokenizer
from utils import StageError, check_at_least, fingerprint, split_list
from vllm_model import usable_model
from workers.engine_settings import EngineConfig

# Imported only when they are asked for.
JUDGE_TYPES = {
    "generative": "judges.generative:GenerativeJudge",
    "reward": "judges.reward:RewardJudge",
    "server": "judges.server:ServerJudge",
}
RENAMED = {"offsetbias-lm": "generative", "bt-mixture": "reward", "openai": "server"}


def judge_class(judge_type: str) -> type["Judge"]:
    """The class of a kind of judges. Raises StageError for one that does not exist."""
    if judge_type not in JUDGE_TYPES:
        renamed = f"; {judge_type} is now called {RENAMED[judge_type]}" if judge_type in RENAMED else ""
        raise StageError(f"--judge_type should be one of {', '.join(JUDGE_TYPES)}, got {judge_type}{renamed}")
    module, _, name = JUDGE_TYPES[judge_type].partition(":")
    return getattr(importlib.import_module(module), name)


class Judge:
    """What every kind of judges says of itself. A worker process calls the class with a JudgeConfig; the object is its
    work, with the methods of workers.worker.Work, which a judge with a model has from vllm_model.EngineWork.

    needs_engine: it is a model's directory or Hub id and runs on this machine; otherwise it is only a name.
    has_labels: its `label_mass` says how much of its probability it puts on the two labels.
    settings: the fields of JudgeConfig that its results depend on, besides the judge itself.
    """

    needs_engine = True
    has_labels = True
    settings: tuple[str, ...] = ()

    @staticmethod
    def check(config: "JudgeConfig") -> None:
        """Raise StageError for settings that it cannot work with; set those of the pool that it decides itself."""

    @staticmethod
    def report(paths: list[Path]) -> None:
        """Log what there is to say about finished outputs."""


@dataclass(kw_only=True)
class JudgeConfig(EngineConfig):
    """The judge that compares, and the engines' settings.

    Several judges, comma-separated, are a panel: P is the weighted mean of theirs. The flags that describe a judge take
    one value for all or as many as there are judges.

    Args:
        judge: checkpoint directory or Hub id of the judge; the model's name on a server; several: a panel
        judge_type: generative, a model that answers with one of two labels; reward, a reward model (a sequence
            classifier with one output); server, a generative judge behind a server with OpenAI's chat completions
        judge_weights: of the members of a panel; default: equal
        judge_tokenizer: directory or Hub id; default: the judge's
        template: file with {input}, {output_1}, {output_2}
        labels: the two answers, comma-separated; the first says that the first output is better; of several judges
            separated by semicolons
        reward_temperature: T of sigmoid((r1 - r2) / T)
        max_prompt_tokens: records with a longer judging prompt are skipped and listed
        api_base: the server's address, ending in /v1; default: OPENAI_BASE_URL, else OpenAI's. The key is
            OPENAI_API_KEY
        api_concurrency: requests at once
        api_retries: of a request that the server refuses for the moment, or that does not reach it, up to 8 s apart
    """

    judge: str
    judge_type: str = "generative"
    judge_weights: str = ""
    judge_tokenizer: str = ""
    template: str = "prompts/offsetbias.txt"
    labels: str = "Output (a),Output (b)"
    reward_temperature: str = "1"
    max_prompt_tokens: int = 8191
    api_base: str = ""
    api_concurrency: int = 32
    api_retries: int = 30

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, max_prompt_tokens=self.max_prompt_tokens)
        self.weights()
        if len(self.members()) == 1:  # the members of a panel have checked themselves
            self.kind.check(self)

    @property
    def kind(self) -> type[Judge]:
        """The class of this judge, which is no panel."""
        return judge_class(self.judge_type)

    # Found once, in the stage, by `fingerprint`; the workers get the values with the rest.
    @cached_property
    def judge_path(self) -> str:
        """The judge's directory."""
        return usable_model(self.judge)

    @cached_property
    def tokenizer_path(self) -> str:
        """The tokenizer's directory; empty for the judge's."""
        return resolve_tokenizer(self.judge_tokenizer)

    def members(self) -> list["JudgeConfig"]:
        """One JudgeConfig a judge, this one itself where there is just one."""
        judges = split_list(self.judge)
        if len(judges) < 2:
            return [self]
        found = [{"judge": judge, "judge_weights": ""} for judge in judges]
        for name in ("judge_type", "judge_tokenizer", "template", "reward_temperature", "labels"):
            value = getattr(self, name)
            values = value.split(";") if name == "labels" else split_list(value)
            if len(values) not in (0, 1, len(judges)):
                raise StageError(f"--{name} has {len(values)} values for {len(judges)} judges; give one, or one each")
            for number, member in enumerate(found):
                member[name] = values[number % len(values)] if values else ""
        return [replace(self, **member) for member in found]

    def weights(self) -> list[float]:
        """A weight a judge, all together 1. Raises StageError for what are not weights."""
        judges, values = split_list(self.judge), split_list(self.judge_weights)
        try:
            weights = [float(value) for value in values] or [1.0] * max(1, len(judges))
        except ValueError:
            weights = []
        if len(weights) != max(1, len(judges)) or not all(0 < weight < math.inf for weight in weights):
            raise StageError(
                f"--judge_weights should be numbers greater than 0, as many as judges ({len(judges)}), "
                f"got {self.judge_weights}"
            )
        return [weight / sum(weights) for weight in weights]

    def fingerprint(self) -> dict:
        """{setting: value} of all that the results of a judge, which is no panel, depend on."""
        settings = {name: value for name, value in super().fingerprint().items() if name in self.kind.settings}
        if "dtype" in settings and self.dtype_on(self.finds_gpus()) != "float32":
            settings["head_dtype"] = "float32"  # judgements of earlier versions, whose output layer rounded, are others
        if "template" in settings:
            settings["template"] = fingerprint(read_template(self.template))
        judge = self.judge
        if self.kind.needs_engine:
            directory, _ = self.judge_path, self.tokenizer_path  # asked for here so that the workers get both
            judge = model_fingerprint(directory)
        return settings | {"judge_type": self.judge_type, "judge": judge}

    def judged_by(self) -> list:
        """All that judgements depend on besides the responses: the fingerprints of the judges, and their weights."""
        return [member.fingerprint() for member in self.members()] + self.weights()


# ---------------------------------------------------------------------------------------------- win probabilities


def different_texts(record: dict) -> list[str]:
    """Of a record's samples, each once, in their order."""
    return list(dict.fromkeys(sample["text"] for sample in record["samples"]))


def orders(record: dict) -> list[tuple[str, str]]:
    """All ordered pairs of different texts."""
    texts = different_texts(record)
    return [(first, second) for first in texts for second in texts if first != second]


def win_matrix(texts: list[str], judgements: dict[tuple[str, str], tuple[float, float]]) -> dict:
    """Win probabilities of K responses from judgements in both orders.

    Args:
        texts: the K responses.
        judgements: {(first, second): (P(first is better), probability on both labels)} of every ordered pair of
            different texts.

    Returns:
        `win_probs`: K x K, `[i][j]` = P(i beats j) = mean over the two orders, None on the diagonal, exactly 1/2 for a
        tie, and `[i][j] + [j][i]` is exactly 1;
        `order_gap`: mean absolute disagreement of the two orders over pairs of different texts, None if there are none;
        `label_mass`: mean probability that the judge gives to its two labels together, None likewise.
    """

    def beats(first, second):
        if first == second:
            return 0.5
        lead = (judgements[first, second][0] - judgements[second, first][0]) / 2  # (p + (1 - q)) / 2 - 1/2
        return 0.5 + lead if lead >= 0 else 1 - (0.5 - lead)

    gaps = [abs(p - (1 - judgements[second, first][0])) for (first, second), (p, _) in judgements.items()]
    masses = [mass for _, mass in judgements.values()]
    return {
        "win_probs": [[None if i == j else beats(a, b) for j, b in enumerate(texts)] for i, a in enumerate(texts)],
        "order_gap": sum(gaps) / len(gaps) if gaps else None,
        "label_mass": sum(masses) / len(masses) if masses else None,
    }


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(min(-x, 700.0)))


# ---------------------------------------------------------------------------------------------- templates, labels


def too_long(prompts: list[list[int]], limit: int) -> str:
    """Why a record is skipped one of whose judging prompts has too many tokens; empty where none has."""
    longest = max(map(len, prompts), default=0)
    return f"a judging prompt has {longest} tokens, the limit is {limit}" if longest > limit else ""


# Names of the three parts: ours, and those of published judge templates.
_PLACEHOLDERS = {"input": 0, "instruction": 0, "output_1": 1, "output_a": 1, "output_2": 2, "output_b": 2}


def read_template(path: str | Path) -> str:
    """The text of a judge template. Raises StageError unless it names the instruction and both outputs once."""
    if not Path(path).is_file():
        raise StageError(f"judge template {path} {'is not a file' if Path(path).exists() else 'does not exist'}")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise StageError(f"judge template {path} is not UTF-8 text") from None
    found = [_PLACEHOLDERS[name] for name in re.findall(r"\{(\w+)\}", text) if name in _PLACEHOLDERS]
    if sorted(found) != [0, 1, 2]:
        raise StageError(f"judge template {path} should contain {{input}}, {{output_1}} and {{output_2}} once each")
    return text


def fill_template(template: str, prompt: str, first: str, second: str) -> str:
    """The template with its three parts filled in, in one pass: braces inside the parts stay what they are."""
    parts = (prompt, first, second)
    return re.sub(
        r"\{(\w+)\}", lambda match: parts[_PLACEHOLDERS[match[1]]] if match[1] in _PLACEHOLDERS else match[0], template
    )


def check_labels(config: JudgeConfig) -> None:
    """Raise StageError unless the template is one and the labels are two different answers."""
    found = split_list(config.labels)
    if len(set(found)) != 2 or len(found) != 2:
        raise StageError(f"--labels should be two different answers, comma-separated, got {config.labels!r}")
    read_template(config.template)
