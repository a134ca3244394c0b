# The settings that are rarely changed. Like those in comal.sh, each can be an argument of comal.sh or stand in the
# environment, and `bash comal.sh --help` explains it.

# Models and judges
TOKENIZER=${TOKENIZER-Qwen/Qwen2-1.5B}  # of the policy; empty: the one that the policy's folder has
JUDGE_TYPE=${JUDGE_TYPE:-generative}  # generative (answers with a label), reward (a reward model), server; or one each
JUDGE_WEIGHTS=${JUDGE_WEIGHTS:-}  # of a panel's members, by comma; empty: equal
TEMPLATE=${TEMPLATE:-prompts/offsetbias.txt}  # the judge's prompt; of a panel one, or one each
API_BASE=${API_BASE:-}  # address of a server that judges, ending in /v1; its key is OPENAI_API_KEY in the environment
JUDGE_FLAGS=${JUDGE_FLAGS:-}  # more flags for scoring.py, quoted as in a shell: "--labels 'A,B' --reward_temperature 2"
FROM=${FROM:-}  # exps/OTHER/iterN: a fork, which goes on after that iteration with its policy and its reference
FIRST_ITERATION=${FIRST_ITERATION:-0}  # the number to begin with, where MODEL and REFERENCE are checkpoints of a run

# Sampling and judging
MAX_PROMPT_TOKENS=${MAX_PROMPT_TOKENS:-2048}  # longer prompts are skipped and listed
MAX_JUDGE_TOKENS=${MAX_JUDGE_TOKENS:-8191}  # longer judging prompts are skipped and listed
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-0.7}  # of the answers to the evaluation prompts
EVAL_TOP_P=${EVAL_TOP_P:-0.95}  # nucleus sampling of these answers; 1: off
ENGINE_ARGS=${ENGINE_ARGS:-}  # further arguments of the policy's vLLM engine, a JSON object (docs/machines.md)
JUDGE_ENGINE_ARGS=${JUDGE_ENGINE_ARGS:-}  # the same of the judge's, for instance quantization (docs/judges.md)
KL_FROM_START=${KL_FROM_START:-true}  # measure the KL from the initial policy at each round's end

# Training
WARMUP_RATIO=${WARMUP_RATIO:-0.1}  # share of the updates in which the learning rate rises
MICRO_BATCH_TOKENS=${MICRO_BATCH_TOKENS:-auto}  # tokens of a forward pass on one GPU; 0: one pair; auto: what fits
SHARDING=${SHARDING:-auto}  # what GPUs divide: full (all), or optimizer (faster, more memory); auto: by the memory
WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}  # of AdamW; at a learning rate of 5e-7 it has no effect
MAX_GRAD_NORM=${MAX_GRAD_NORM:-0}  # gradients are clipped to this norm; 0: not at all
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false}  # true: less memory, a third more time
EVAL_STEPS=${EVAL_STEPS:-500}  # updates between validations, besides those at each epoch's end
SAVE_MINUTES=${SAVE_MINUTES:-10}  # minutes of training between points where it can go on; 0: none
KEEP_CKPTS=${KEEP_CKPTS:-all}  # which checkpoints stay: all, rounds (the last of each) or last (what is still needed)
REPORT_TO=${REPORT_TO:-tensorboard}  # training curves: tensorboard, wandb, both by comma, or none

# Machines
RECIPE=${RECIPE:-demo}  # full, or demo (data/demo/settings.sh); without it comal.sh takes full where it finds a GPU
GPUS=${GPUS:-auto}  # auto, none, or numbers (0,2,3) or UUIDs as nvidia-smi -L shows them
TENSOR_PARALLEL_SIZE=${TENSOR_PARALLEL_SIZE:-1}  # GPUs that share one vLLM engine
ENGINE=${ENGINE:-local}  # of sampling and judging: local, or ray on a Ray cluster
ON_ERROR=${ON_ERROR:-fail}  # a record that ends its workers: fail, or skip it and list it
STALL_TIMEOUT=${STALL_TIMEOUT:-1800}  # seconds without progress after which a worker is replaced; 0: never
NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}}  # machines; start comal.sh on each, in one shared folder (launch/slurm.sh)
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}  # of this machine; 0 runs the loop, the others join in
MASTER_ADDR=${MASTER_ADDR:-}  # address of node 0
MASTER_PORT=${MASTER_PORT:-29500}  # a free port there
