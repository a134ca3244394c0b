"""Check ENGINE_ARGS and JUDGE_ENGINE_ARGS against the vLLM that is installed, before anything is sampled.

    python -m launch.engine_args --policy '{"max_num_seqs": 512}' --judge '{"quantization": "fp8_per_channel"}'

The stages check their own; those of the judge come after hours of sampling.
"""

from utils import run
from workers.engine_settings import read_engine_args


def main(policy: str = "", judge: str = ""):
    """Refuse what is no JSON object, and arguments that vLLM's engine does not have.

    Args:
        policy: ENGINE_ARGS
        judge: JUDGE_ENGINE_ARGS
    """
    read_engine_args(policy, "ENGINE_ARGS")
    read_engine_args(judge, "JUDGE_ENGINE_ARGS")


if __name__ == "__main__":
    run(main)
