#!/usr/bin/env bash
# COMAL: align a language model with general preferences, down to the Nash policy.
#
#   bash comal.sh                            run: with a GPU the full recipe (Qwen2-1.5B), without one the small demo
#   bash comal.sh METHOD=inpo-small SEED=1   with other settings; they can also be in the environment
#   bash comal.sh --try                      try one iteration on 64 prompts: what looks wrong, what the run will take
#   bash comal.sh --plan                     print the commands that would run, and what they will cost
#   bash comal.sh --prepare                  fetch and check all that the run needs; after it no network is needed
#   bash comal.sh --help                     explain every setting, also the rarer ones of launch/settings.sh
#
# Each stage reads files and writes files, in exps/NAME. Started again, the loop goes on where it stopped: a stage whose
# outputs exist is not run again. What checks, locks, logs and cleans up is in launch/.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch/start.sh "$@"

# The experiment
METHOD=${METHOD:-comal}  # comal, inpo-small, inpo-large, iter-ipo, iter-dpo, ipo or dpo; see the table below
NAME=${NAME:-$METHOD}  # results go to exps/NAME
ROUNDS=${ROUNDS:-7}  # passes over the prompts; a round is SPLITS iterations
SPLITS=${SPLITS:-6}  # parts of the prompts, one for each iteration of a round: train_0 .. train_5 in PROMPTS_DIR
SEED=${SEED:-0}  # the same seed gives the same samples, pairs and order of the data

# Models (local directories or Hub ids) and prompts
MODEL=${MODEL:-yale-nlp/comal-qwen2-1.5b-mle}  # the initial policy
REFERENCE=${REFERENCE:-$MODEL}  # the first reference; another one where a run goes on from a checkpoint
JUDGE=${JUDGE:-NCSOFT/Llama-3-OffsetBias-8B}  # decides which of two responses is better; several, by comma: a panel
PROMPTS_DIR=${PROMPTS_DIR:-data/prompts}  # folder of train_<i>.jsonl, train.jsonl and test.jsonl
EVAL_PROMPTS=${EVAL_PROMPTS:-data/prompts/alpaca_eval.jsonl}  # file of prompts for the win rates

# The game
ETA=${ETA:-}  # the target of h is 1/(2 ETA); one value, or one a round, by comma; empty: the method's (table below)
TAU_ETA_RATIO=${TAU_ETA_RATIO:-0.333333}  # weight of the reference, tau/eta
UPDATE_INTERVAL=${UPDATE_INTERVAL:-12}  # iterations between moves of COMAL's reference; 0: it never moves
BETA=${BETA:-0.1}  # regularisation of DPO, which does not use ETA
PAIR_RULE=${PAIR_RULE:-top_two}  # two of the samples: top_two (released recipe), best_worst or random (unbiased)
SOFT_LABELS=${SOFT_LABELS:-false}  # true: learn the judge's probability of each pair, not its verdict

# Sampling and training
NUM_SAMPLES=${NUM_SAMPLES:-5}  # responses to each prompt
TEMPERATURE=${TEMPERATURE:-0.8}  # sampling temperature
TOP_P=${TOP_P:-0.95}  # nucleus sampling; 1: off
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}  # a response ends here at the latest
LEARNING_RATE=${LEARNING_RATE:-5e-7}  # peak of the learning rate, after the warm-up
NUM_EPOCHS=${NUM_EPOCHS:-3}  # passes over the pairs of an iteration
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-32}  # pairs an update, whatever the number of GPUs
MAX_LENGTH=${MAX_LENGTH:-2048}  # tokens of prompt and response; longer pairs are dropped and counted
SELECT=${SELECT:-best}  # checkpoint: best (the lowest validation loss) or last
EVAL_EVERY=${EVAL_EVERY:-1}  # iterations between comparisons of all new policies, when the judge is loaded anyway

# The methods: the reference moves to the newest policy after so many iterations, or stays the initial policy (0).
# A method that takes one iteration trains on all prompts at once.
# name        trainer  ETA    reference moves   iterations  title
METHODS="
  comal       inpo     0.002  $UPDATE_INTERVAL  all         COMAL
  inpo-small  inpo     0.002  0                 all         INPO, fixed reference
  inpo-large  inpo     0.1    0                 all         INPO, larger eta
  iter-ipo    ipo      0.002  1                 all         Iter-IPO
  iter-dpo    dpo      -      1                 all         Iter-DPO
  ipo         ipo      0.002  0                 one         IPO
  dpo         dpo      -      0                 one         DPO"

# ------------------------------------------------------------------------------------------------ the stages

sample() {  # the policy answers train and test prompts; and each evaluation prompt once, for the win rates
  local answers
  answers=$(responses $((i - 1)))
  local inputs=$PROMPTS_DIR/$(split).jsonl,$PROMPTS_DIR/test.jsonl
  local outputs=$iter/train.samples.jsonl,$iter/test.samples.jsonl
  local counts=$NUM_SAMPLES,$NUM_SAMPLES temperatures=$TEMPERATURE,$TEMPERATURE masses=$TOP_P,$TOP_P
  if [[ ! -e $answers ]]; then
    inputs+=,$EVAL_PROMPTS outputs+=,$answers counts+=,1 temperatures+=,$EVAL_TEMPERATURE masses+=,$EVAL_TOP_P
  fi
  stage sampling "$iter"/{train,test}.samples.jsonl "$answers" -- \
    "$PYTHON" sampling.py \
    --model "$policy" \
    --tokenizer "$TOKENIZER" \
    --input "$inputs" \
    --output "$outputs" \
    --num_samples "$counts" \
    --temperature "$temperatures" \
    --top_p "$masses" \
    --max_prompt_tokens "$MAX_PROMPT_TOKENS" \
    --max_new_tokens "$MAX_NEW_TOKENS" \
    --seed "$(seed)" \
    --engine_args "$ENGINE_ARGS" \
    "${engines[@]}"
}

score() {  # the judge compares the samples of each prompt and, while it is there, the policies up to now
  local comparisons=() compared=()
  if [[ ! -e $iter/train.scores.jsonl || ! -e $iter/test.scores.jsonl ]] && ((i % EVAL_EVERY == 0)); then
    to_compare $((i - 1))
    if ((${#compared[@]})); then
      comparisons=(
        --responses "$(list "${ours[@]}")"
        --baseline "$(list "${theirs[@]}")"
        --compared "$(list "${compared[@]}")"
      )
    fi
  fi
  stage scoring "$iter"/{train,test}.scores.jsonl "${compared[@]/%.jsonl/.json}" -- \
    "$PYTHON" scoring.py \
    "${judge[@]}" \
    --input "$iter/train.samples.jsonl,$iter/test.samples.jsonl" \
    --output "$iter/train.scores.jsonl,$iter/test.scores.jsonl" \
    "${comparisons[@]}" \
    "${engines[@]}"
}

make_pairs() {  # of each prompt's samples, two are paired
  stage pairs "$iter"/{train,test}.pairs.jsonl -- \
    "$PYTHON" data_processing.py make_pairs \
    --input "$iter/train.scores.jsonl,$iter/test.scores.jsonl" \
    --output "$iter/train.pairs.jsonl,$iter/test.pairs.jsonl" \
    --pair_rule "$PAIR_RULE" \
    --max_length "$MAX_LENGTH" \
    --seed "$(seed)"
}

logprobs() {  # log-probabilities of the pairs under the policy and the reference
  stage logprobs "$iter"/data/{train,test}.jsonl -- \
    "${launch[@]}" get_logprobs.py \
    --model "$policy" \
    --reference "$reference" \
    --tokenizer "$TOKENIZER" \
    --input "$iter/train.pairs.jsonl,$iter/test.pairs.jsonl" \
    --output "$iter/data/train.jsonl,$iter/data/test.jsonl" \
    --max_length "$MAX_LENGTH" \
    --micro_batch_tokens "$MICRO_BATCH_TOKENS" \
    --sharding "$SHARDING"
}

start_logprobs() {  # the same under the initial policy, at a round's end, to measure the KL from it
  [[ $reference != "$MODEL" && $KL_FROM_START == true ]] && (((i + 1) % SPLITS == 0)) || return 0
  stage start_logprobs "$iter/eval/start_logps.jsonl" -- \
    "${launch[@]}" get_logprobs.py \
    --model "$MODEL" \
    --reference "$MODEL" \
    --tokenizer "$TOKENIZER" \
    --input "$iter/test.pairs.jsonl" \
    --output "$iter/eval/start_logps.jsonl" \
    --max_length "$MAX_LENGTH" \
    --micro_batch_tokens "$MICRO_BATCH_TOKENS" \
    --sharding "$SHARDING"
}

train() {  # the next policy
  local loss=(--eta "$(eta)" --tau_eta_ratio "$TAU_ETA_RATIO")
  if [[ $TRAINER == ipo ]]; then loss=(--eta "$(eta)"); fi
  if [[ $TRAINER == dpo ]]; then loss=(--beta "$BETA"); fi
  stage training "$iter/ckpt/DONE" -- \
    "${launch[@]}" "$TRAINER.py" \
    --model "$policy" \
    --tokenizer "$TOKENIZER" \
    --input "$iter/data/train.jsonl" \
    --validation "$iter/data/test.jsonl" \
    --output "$iter/ckpt" \
    "${loss[@]}" \
    --soft_labels "$SOFT_LABELS" \
    --learning_rate "$LEARNING_RATE" \
    --warmup_ratio "$WARMUP_RATIO" \
    --num_epochs "$NUM_EPOCHS" \
    --global_batch_size "$GLOBAL_BATCH_SIZE" \
    --micro_batch_tokens "$MICRO_BATCH_TOKENS" \
    --sharding "$SHARDING" \
    --max_length "$MAX_LENGTH" \
    --weight_decay "$WEIGHT_DECAY" \
    --max_grad_norm "$MAX_GRAD_NORM" \
    --gradient_checkpointing "$GRADIENT_CHECKPOINTING" \
    --select "$SELECT" \
    --eval_steps "$EVAL_STEPS" \
    --save_minutes "$SAVE_MINUTES" \
    --report_to "$REPORT_TO" \
    --seed "$(seed)"
}

answer() {  # STAGE MODEL OUTPUT SEED: one answer to each evaluation prompt
  stage "$1" "$3" -- \
    "$PYTHON" eval.py generate \
    --model "$2" \
    --tokenizer "$TOKENIZER" \
    --input "$EVAL_PROMPTS" \
    --output "$3" \
    --temperature "$EVAL_TEMPERATURE" \
    --top_p "$EVAL_TOP_P" \
    --max_prompt_tokens "$MAX_PROMPT_TOKENS" \
    --max_new_tokens "$MAX_NEW_TOKENS" \
    --seed "$4" \
    --engine_args "$ENGINE_ARGS" \
    "${engines[@]}"
}

evaluate_last() {  # the last policy, which no further iteration samples from, and what was not compared before
  answer responses "$iter/ckpt" "$(responses "$i")" $((SEED * 1000 + i + 1))
  to_compare "$i"
  stage evaluation "$iter"/eval/vs_{start,previous}.json -- \
    "$PYTHON" eval.py compare \
    "${judge[@]}" \
    --responses "$(list "${ours[@]}")" \
    --baseline "$(list "${theirs[@]}")" \
    --output "$(list "${compared[@]}")" \
    "${engines[@]}"
}

matrix() {  # all against all: the initial policy and the last one of each round
  local files names
  to_play
  stage matrix "$exp/matrix/iter$i.json" -- \
    "$PYTHON" eval.py matrix \
    "${judge[@]}" \
    --responses "$(list "${files[@]}")" \
    --names "$(list "${names[@]}")" \
    --output "$exp/matrix/iter$i.json" \
    "${engines[@]}"
}

# ------------------------------------------------------------------------------------------------ the loop

source launch/run.sh

main() {
  begin  # check the settings, make .venv, the demo's models and the prompts where they are missing, lock exps/NAME

  for ((i = first; i < ITERATIONS; i++)); do
    begin_iteration
    sample
    score
    make_pairs
    logprobs
    start_logprobs
    train
    policy=$iter/ckpt
    if ((UPDATE_INTERVAL > 0 && (i + 1) % UPDATE_INTERVAL == 0)); then reference=$policy; fi
    end_iteration  # note both for a restart or a fork, delete what is not kept, print a summary
  done

  begin_evaluation
  evaluate_last
  matrix
  finish
}
main; exit  # on one line, so that bash has read all of this file before it begins: it can be edited meanwhile
