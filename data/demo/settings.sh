# What the demo sets differently; comal.sh reads it where no GPU is found, or with RECIPE=demo. Arguments and the
# environment come first. The models are made by build.sh; the game, and why these numbers: game.py and docs/demo.md.

# The demo
DEMO_MODELS=${DEMO_MODELS:-exps/demo-models}  # folder of its two models and its prompts, made when it is missing

NAME=${NAME:-demo-${METHOD:-comal}}
ROUNDS=${ROUNDS:-2}
MODEL=${MODEL:-$DEMO_MODELS/policy}
JUDGE=${JUDGE:-$DEMO_MODELS/judge}
TOKENIZER=${TOKENIZER-}
PROMPTS_DIR=${PROMPTS_DIR:-$DEMO_MODELS/prompts}
EVAL_PROMPTS=${EVAL_PROMPTS:-$DEMO_MODELS/prompts/eval.jsonl}

ETA=${ETA:-0.333333}  # a target that a tiny model reaches: 1/(2 ETA) = 1.5 nats. At 0.002 its loss would hardly move
BETA=${BETA:-2}  # likewise: with soft labels DPO aims at log(p/(1 - p))/2, at most 1.1 nats
UPDATE_INTERVAL=${UPDATE_INTERVAL:-6}  # one of the two rounds
PAIR_RULE=${PAIR_RULE:-random}  # with soft labels the unbiased rule: its fixed point is the Nash policy
SOFT_LABELS=${SOFT_LABELS:-true}

NUM_SAMPLES=${NUM_SAMPLES:-2}  # the random rule needs no more than two
TEMPERATURE=${TEMPERATURE:-1}  # other values, or top_p below 1, move the fixed point
TOP_P=${TOP_P:-1}
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-1}
EVAL_TOP_P=${EVAL_TOP_P:-1}
MAX_PROMPT_TOKENS=${MAX_PROMPT_TOKENS:-64}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-32}
MAX_JUDGE_TOKENS=${MAX_JUDGE_TOKENS:-1023}

LEARNING_RATE=${LEARNING_RATE:-2e-4}
MICRO_BATCH_TOKENS=${MICRO_BATCH_TOKENS:-4096}
MAX_LENGTH=${MAX_LENGTH:-128}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
MAX_GRAD_NORM=${MAX_GRAD_NORM:-1}
SELECT=${SELECT:-last}  # some 50 test pairs are too few to choose by
EVAL_EVERY=${EVAL_EVERY:-6}
KL_FROM_START=${KL_FROM_START:-false}  # spares a start of PyTorch an iteration
