#!/usr/bin/env bash
# COMAL: align a language model with general preferences, down to the Nash policy.
#
#   bash comal.sh            run; on a machine with GPUs the Qwen2-1.5B recipe, without one the demo
#   bash comal.sh --plan     print the commands that would run, and run nothing
#   bash comal.sh --help     this text and the settings
#
# Every setting below can be edited here or given in the environment:
#   METHOD=inpo-small ROUNDS=5 NAME=INPO bash comal.sh
# Started again, the loop goes on where it stopped: a stage whose output exists is not run again.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

gpus_present() { [[ -n $(nvidia-smi -L 2>/dev/null) && ${CUDA_VISIBLE_DEVICES-unset} != "" && ${GPUS:-auto} != none ]]; }
RECIPE=${RECIPE:-$(gpus_present && echo full || echo demo)}  # full, or demo (data/demo/settings.sh)
if [[ $RECIPE == demo ]]; then source data/demo/settings.sh; fi

# ------------------------------------------------------------------------------------------------ settings
METHOD=${METHOD:-comal}      # comal, inpo-small, inpo-large, iter-ipo, iter-dpo, ipo, dpo
NAME=${NAME:-$METHOD}        # results go to exps/NAME
ROUNDS=${ROUNDS:-7}          # passes over the prompts; one round is SPLITS iterations (ipo, dpo: one iteration)
SPLITS=${SPLITS:-6}          # train_0 .. train_5 in PROMPTS_DIR
SEED=${SEED:-0}

# Models: local directories or Hub ids
MODEL=${MODEL:-yale-nlp/comal-qwen2-1.5b-mle}           # the start policy
TOKENIZER=${TOKENIZER-Qwen/Qwen2-1.5B}                  # empty: the policy's own
JUDGE=${JUDGE:-NCSOFT/Llama-3-OffsetBias-8B}
TEMPLATE=${TEMPLATE:-prompts/offsetbias.txt}            # the judge's prompt

# Prompts: made by data_processing.py and eval.py when missing
PROMPTS_DIR=${PROMPTS_DIR:-data/prompts}                # train_<i>.jsonl, train.jsonl, test.jsonl
EVAL_PROMPTS=${EVAL_PROMPTS:-data/prompts/alpaca_eval.jsonl}

# The game: target of the margin 1/(2 ETA), weight of the reference r = tau/eta, and when the reference moves.
# Empty means the method's own: see `method_settings`. ETA may hold one value a round, comma-separated.
ETA=${ETA:-}
TAU_ETA_RATIO=${TAU_ETA_RATIO:-0.333333}
UPDATE_INTERVAL=${UPDATE_INTERVAL:-}                    # iterations between moves of the reference; 0: never
BETA=${BETA:-0.1}                                       # of DPO
PAIR_RULE=${PAIR_RULE:-top_two}                         # top_two (released recipe), best_worst, random (unbiased)
SOFT_LABELS=${SOFT_LABELS:-false}                       # regress on (2p - 1)/(2 ETA), p the judge's probability

# Sampling
NUM_SAMPLES=${NUM_SAMPLES:-5}                           # K
TEMPERATURE=${TEMPERATURE:-0.8}
TOP_P=${TOP_P:-0.95}
MAX_PROMPT_TOKENS=${MAX_PROMPT_TOKENS:-2048}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
MAX_JUDGE_TOKENS=${MAX_JUDGE_TOKENS:-8191}              # longer judging prompts are skipped and listed

# Training
LEARNING_RATE=${LEARNING_RATE:-5e-7}
WARMUP_RATIO=${WARMUP_RATIO:-0.1}
NUM_EPOCHS=${NUM_EPOCHS:-3}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-32}              # pairs an update, whatever the number of GPUs
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}                 # pairs a forward pass on one GPU
MAX_LENGTH=${MAX_LENGTH:-2048}                          # tokens; longer pairs are dropped and counted
MAX_GRAD_NORM=${MAX_GRAD_NORM:-0}                       # 0: no clipping
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false}
SELECT=${SELECT:-best}                                  # checkpoint with the lowest validation loss, or the last

# Evaluation: win rates against the start policy and the previous iteration
EVAL_EVERY=${EVAL_EVERY:-1}                             # iterations; all since the last time are compared at once
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-0.7}

# Machine
GPUS=${GPUS:-auto}                                      # auto, none, or physical numbers: 0,2,3
GPUS_PER_WORKER=${GPUS_PER_WORKER:-1}                   # GPUs that share one vLLM engine (tensor parallel)
# ------------------------------------------------------------------------------------------------ end of settings

method_settings() {
  case $METHOD in
    comal)      trainer=inpo default_eta=0.002 default_interval=12 ;;  # the reference moves every two rounds
    inpo-small) trainer=inpo default_eta=0.002 default_interval=0 ;;   # the reference stays
    inpo-large) trainer=inpo default_eta=0.1   default_interval=0 ;;
    iter-ipo)   trainer=ipo  default_eta=0.002 default_interval=1 ;;   # the reference is the last policy
    iter-dpo)   trainer=dpo  default_eta=-     default_interval=1 ;;
    ipo)        trainer=ipo  default_eta=0.002 default_interval=0 ;;   # one iteration over all prompts
    dpo)        trainer=dpo  default_eta=-     default_interval=0 ;;
  esac
  ETA=${ETA:-$default_eta}
  if [[ $trainer == dpo ]]; then ETA=-; fi
  UPDATE_INTERVAL=${UPDATE_INTERVAL:-$default_interval}
  iterations=$((ROUNDS * SPLITS))
  if [[ $METHOD == ipo || $METHOD == dpo ]]; then iterations=1; fi
}

# The settings that results depend on. exps/NAME/run.json keeps them, and a restart with others is refused.
PINNED=(METHOD SPLITS SEED MODEL TOKENIZER JUDGE TEMPLATE PROMPTS_DIR EVAL_PROMPTS ETA TAU_ETA_RATIO UPDATE_INTERVAL BETA
  PAIR_RULE SOFT_LABELS NUM_SAMPLES TEMPERATURE TOP_P MAX_PROMPT_TOKENS MAX_NEW_TOKENS MAX_JUDGE_TOKENS LEARNING_RATE
  WARMUP_RATIO NUM_EPOCHS GLOBAL_BATCH_SIZE MAX_LENGTH MAX_GRAD_NORM SELECT EVAL_TEMPERATURE)

check_values() {  # everything that can be known to be wrong before hours of work
  one_of RECIPE demo full
  one_of METHOD comal inpo-small inpo-large iter-ipo iter-dpo ipo dpo
  one_of PAIR_RULE top_two best_worst random
  one_of SELECT best last
  one_of SOFT_LABELS true false
  one_of GRADIENT_CHECKPOINTING true false
  whole 1 ROUNDS SPLITS MAX_PROMPT_TOKENS MAX_NEW_TOKENS MAX_JUDGE_TOKENS NUM_EPOCHS GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE \
    MAX_LENGTH EVAL_EVERY GPUS_PER_WORKER
  whole 2 NUM_SAMPLES
  whole 0 SEED ${UPDATE_INTERVAL:+UPDATE_INTERVAL}
  number TAU_ETA_RATIO BETA TEMPERATURE TOP_P LEARNING_RATE WARMUP_RATIO MAX_GRAD_NORM EVAL_TEMPERATURE
  [[ -z $ETA || ,$ETA =~ ^(,$number)+$ ]] || die "ETA=$ETA should be a number, or one a round, comma-separated"
}

number='[0-9]*\.?[0-9]+(e-?[0-9]+)?'
one_of() { [[ " ${*:2} " == *" ${!1} "* ]] || die "$1=${!1} is unknown; choose one of: ${*:2}"; }
whole() { local n; for n in "${@:2}"; do [[ ${!n} =~ ^[0-9]+$ ]] && ((10#${!n} >= $1)) || die "$n=${!n} should be a whole number, at least $1"; done; }
number() { local n; for n in "$@"; do [[ ${!n} =~ ^$number$ ]] || die "$n=${!n} should be a number, 0 or more"; done; }

check_files() {  # the models' names and the prompts, once `prepare` has made what it makes
  local name file files=("$PROMPTS_DIR/test.jsonl" "$EVAL_PROMPTS" "$TEMPLATE")
  for name in MODEL JUDGE; do
    [[ -e ${!name} || ${!name} =~ ^[^./][^/]*/[^/]+$ ]] || die "$name=${!name}: no such directory, and no Hub id (owner/name)"
  done
  if [[ $METHOD == ipo || $METHOD == dpo ]]; then
    files+=("$PROMPTS_DIR/train.jsonl")
  else
    for ((i = 0; i < SPLITS; i++)); do files+=("$PROMPTS_DIR/train_$i.jsonl"); done
    [[ $PROMPTS_DIR != data/prompts || ! -e data/prompts/train_$SPLITS.jsonl ]] ||
      die "data/prompts holds more than SPLITS=$SPLITS train splits; remove its files to have them made anew"
  fi
  for file in "${files[@]}"; do [[ -e $file ]] || die "$file does not exist"; done
}

# ------------------------------------------------------------------------------------------------ stages

prepare() {  # prompts and, in the demo, the two models
  if [[ $RECIPE == demo ]]; then
    stage demo_models "$DEMO_MODELS"/{policy,judge}/DONE -- \
      bash data/demo/build.sh "$DEMO_MODELS"
    return
  fi
  # Only the project's own prompt files are made; those of other paths are the user's.
  if [[ $PROMPTS_DIR == data/prompts ]]; then
    stage make_prompts data/prompts/{train,test}.jsonl -- \
      "$PYTHON" data_processing.py make_prompts \
      --output_dir data/prompts \
      --num_splits "$SPLITS"
  fi
  if [[ $EVAL_PROMPTS == data/prompts/alpaca_eval.jsonl ]]; then
    stage eval_prompts "$EVAL_PROMPTS" -- \
      "$PYTHON" eval.py alpaca_eval \
      --output "$EVAL_PROMPTS"
  fi
}

sample() {  # the policy answers train and test prompts K times, and the evaluation prompts once for `evaluate`
  local split=train_$((i % SPLITS))
  if [[ $METHOD == ipo || $METHOD == dpo ]]; then split=train; fi
  local inputs=$PROMPTS_DIR/$split.jsonl,$PROMPTS_DIR/test.jsonl
  local outputs=$iter/train.samples.jsonl,$iter/test.samples.jsonl
  local counts=$NUM_SAMPLES,$NUM_SAMPLES temperatures=$TEMPERATURE,$TEMPERATURE
  if [[ ! -e $(responses $((i - 1))) ]]; then
    inputs+=,$EVAL_PROMPTS outputs+=,$(responses $((i - 1))) counts+=,1 temperatures+=,$EVAL_TEMPERATURE
  fi
  stage sampling "$iter"/{train,test}.samples.jsonl "$(responses $((i - 1)))" -- \
    "$PYTHON" sampling.py \
    --model "$policy" \
    --tokenizer "$TOKENIZER" \
    --input "$inputs" \
    --output "$outputs" \
    --num_samples "$counts" \
    --temperature "$temperatures" \
    --top_p "$TOP_P" \
    --max_prompt_tokens "$MAX_PROMPT_TOKENS" \
    --max_new_tokens "$MAX_NEW_TOKENS" \
    --seed $((SEED * 1000 + i)) \
    "${engines[@]}"
}

score() {  # the judge compares the K responses with each other
  stage scoring "$iter"/{train,test}.scores.jsonl -- \
    "$PYTHON" scoring.py \
    --judge "$JUDGE" \
    --template "$TEMPLATE" \
    --input "$iter/train.samples.jsonl,$iter/test.samples.jsonl" \
    --output "$iter/train.scores.jsonl,$iter/test.scores.jsonl" \
    --max_prompt_tokens "$MAX_JUDGE_TOKENS" \
    "${engines[@]}"
}

make_pairs() {
  stage pairs "$iter"/{train,test}.pairs.jsonl -- \
    "$PYTHON" data_processing.py make_pairs \
    --input "$iter/train.scores.jsonl,$iter/test.scores.jsonl" \
    --output "$iter/train.pairs.jsonl,$iter/test.pairs.jsonl" \
    --pair_rule "$PAIR_RULE" \
    --max_length "$MAX_LENGTH" \
    --seed $((SEED * 1000 + i))
}

logprobs() {
  stage logprobs "$iter"/data/{train,test}.jsonl -- \
    "${launch[@]}" get_logprobs.py \
    --model "$policy" \
    --reference "$reference" \
    --tokenizer "$TOKENIZER" \
    --input "$iter/train.pairs.jsonl,$iter/test.pairs.jsonl" \
    --output "$iter/data/train.jsonl,$iter/data/test.jsonl" \
    --max_length "$MAX_LENGTH" \
    --batch_size "$MICRO_BATCH_SIZE"
}

train() {
  local method=()
  case $trainer in
    inpo) method=(--eta "$(eta)" --tau_eta_ratio "$TAU_ETA_RATIO" --soft_labels "$SOFT_LABELS") ;;
    ipo) method=(--eta "$(eta)" --soft_labels "$SOFT_LABELS") ;;
    dpo) method=(--beta "$BETA") ;;
  esac
  stage training "$iter/ckpt/DONE" -- \
    "${launch[@]}" "$trainer.py" \
    --model "$policy" \
    --tokenizer "$TOKENIZER" \
    --input "$iter/data/train.jsonl" \
    --validation "$iter/data/test.jsonl" \
    --output "$iter/ckpt" \
    "${method[@]}" \
    --learning_rate "$LEARNING_RATE" \
    --warmup_ratio "$WARMUP_RATIO" \
    --num_epochs "$NUM_EPOCHS" \
    --global_batch_size "$GLOBAL_BATCH_SIZE" \
    --micro_batch_size "$MICRO_BATCH_SIZE" \
    --max_length "$MAX_LENGTH" \
    --max_grad_norm "$MAX_GRAD_NORM" \
    --gradient_checkpointing "$GRADIENT_CHECKPOINTING" \
    --select "$SELECT" \
    --seed $((SEED * 1000 + i))
}

evaluate() {  # win rates of the iterations since the last evaluation, with one start of the judge
  (((i + 1) % EVAL_EVERY == 0 || i + 1 == iterations)) || return 0
  stage responses "$(responses "$i")" -- \
    "$PYTHON" eval.py generate \
    --model "$iter/ckpt" \
    --tokenizer "$TOKENIZER" \
    --input "$EVAL_PROMPTS" \
    --output "$(responses "$i")" \
    --temperature "$EVAL_TEMPERATURE" \
    --top_p "$TOP_P" \
    --max_prompt_tokens "$MAX_PROMPT_TOKENS" \
    --max_new_tokens "$MAX_NEW_TOKENS" \
    --seed $((SEED * 1000 + i + 1)) \
    "${engines[@]}"
  local ours=() theirs=() outputs=() j
  for ((j = 0; j <= i; j++)); do
    [[ -e $exp/iter$j/eval/vs_previous.json ]] && continue
    ours+=("$(responses "$j")" "$(responses "$j")")
    theirs+=("$(responses -1)" "$(responses $((j - 1)))")
    outputs+=("$exp/iter$j/eval/vs_start.jsonl" "$exp/iter$j/eval/vs_previous.jsonl")
  done
  stage evaluation "$iter"/eval/vs_{start,previous}.json -- \
    "$PYTHON" eval.py compare \
    --judge "$JUDGE" \
    --template "$TEMPLATE" \
    --responses "$(list "${ours[@]}")" \
    --baseline "$(list "${theirs[@]}")" \
    --output "$(list "${outputs[@]}")" \
    --max_prompt_tokens "$MAX_JUDGE_TOKENS" \
    "${engines[@]}"
}

# ------------------------------------------------------------------------------------------------ the loop

main() {
  check_values
  method_settings
  find_gpus
  exp=exps/$NAME
  describe
  i=none iter=$exp
  prepare
  if [[ -z $plan ]]; then
    check_files
    check_settings
  fi
  policy=$MODEL reference=$MODEL
  for ((i = 0; i < iterations; i++)); do
    iter=$exp/iter$i
    sample
    score
    make_pairs
    logprobs
    train
    policy=$iter/ckpt
    evaluate
    if ((UPDATE_INTERVAL && (i + 1) % UPDATE_INTERVAL == 0)); then reference=$policy; fi
    if (((i + 1) % SPLITS == 0)) && [[ -z $plan ]]; then ln -sfn "iter$i/ckpt" "$exp/round$(((i + 1) / SPLITS))"; fi
  done
  [[ -z $plan ]] || return 0
  if [[ $RECIPE == demo ]]; then "$PYTHON" data/demo/game.py table --experiment "$exp" --start "$MODEL"; fi
  echo
  echo "done after $((SECONDS / 60)) min $((SECONDS % 60)) s: $iterations iterations in $exp; the last policy is $policy/model"
}

# ------------------------------------------------------------------------------------------------ how stages run

die() { echo "comal.sh: $1" >&2; exit 1; }

eta() {  # this round's value of ETA; the last one holds for the rounds after it
  local values round=$((i / SPLITS))
  IFS=, read -ra values <<<"$ETA"
  echo "${values[round < ${#values[@]} ? round : ${#values[@]} - 1]}"
}

responses() { if (($1 < 0)); then echo "$exp/start/responses.jsonl"; else echo "$exp/iter$1/eval/responses.jsonl"; fi; }

list() { local IFS=,; echo "$*"; }

where() { if [[ $i == none ]]; then echo "preparation, stage $1"; else echo "iteration $i of $iterations, stage $1"; fi; }

# stage NAME OUTPUT... -- COMMAND...: run the command unless every output is there; show and keep what it prints
stage() {
  local name=$1 outputs=() missing=
  shift
  while [[ $1 != -- ]]; do
    outputs+=("$1")
    [[ -e $1 ]] || missing=yes
    shift
  done
  shift
  [[ -n $missing ]] || return 0
  if [[ -n $plan ]]; then
    printf '\n# %s\n' "$(where "$name")"
    local word
    for word in "$@"; do [[ $word =~ ^[A-Za-z0-9_./,=:-]+$ ]] && printf '%s ' "$word" || printf '%q ' "$word"; done
    echo
    return
  fi
  local log=$iter/logs/$name.log began=$SECONDS code=0
  mkdir -p "$iter/logs"
  echo "=== $(where "$name")  ($((SECONDS / 60)) min so far; log: $log)"
  # In a session of its own, so that stopping it reaches every process that it started.
  setsid "$@" > >(tee "$log") 2>&1 &
  running=$!
  wait "$running" || code=$?
  running=
  ((code == 0)) || die "$(where "$name") failed with exit code $code; its output is in $log.
Nothing after it was run. Once the cause is mended, the same command goes on here; where it is a setting, take another NAME."
  local output
  for output in "${outputs[@]}"; do
    [[ -e $output ]] || die "$(where "$name") ended without an error but did not write $output; see $log"
  done
  echo "=== $name took $((SECONDS - began)) s"
}

running=
stop() {  # SIGNAL EXIT_CODE: end the running stage with all its processes
  trap '' INT TERM HUP
  echo "comal.sh: $1 received, stopping" >&2
  if [[ -n $running ]]; then
    kill -TERM -- "-$running" 2>/dev/null || true
    for _ in {1..50}; do kill -0 -- "-$running" 2>/dev/null || break; sleep 0.1; done
    kill -KILL -- "-$running" 2>/dev/null || true
  fi
  echo "comal.sh: stopped; what is complete is kept, the same command goes on from there" >&2
  exit "$2"
}
trap 'stop SIGINT 130' INT
trap 'stop SIGTERM 143' TERM
trap 'stop SIGHUP 129' HUP
trap 'echo "comal.sh: line $LINENO failed: $BASH_COMMAND" >&2' ERR

find_gpus() {
  engines=(--gpus "$GPUS" --gpus_per_worker "$GPUS_PER_WORKER")
  launch=("$PYTHON")
  if ! gpus_present; then
    [[ $RECIPE == demo || -n $plan || $GPUS == none ]] ||
      die "RECIPE=full, but no usable GPU was found; GPUS=none runs it on the CPU all the same, with a small MODEL and JUDGE"
    return
  fi
  local numbers=$GPUS
  [[ $numbers != auto ]] || numbers=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
  IFS=, read -ra gpu_list <<<"$numbers"
  launch=(env "CUDA_VISIBLE_DEVICES=$numbers" "$PYTHON" -m accelerate.commands.launch --config_file fsdp_config.yaml
    --num_processes "${#gpu_list[@]}" --main_process_port 0)
}

describe() {
  if [[ $RECIPE == demo ]]; then
    echo "comal.sh: the demo (two tiny models, minutes on a CPU) into $exp; RECIPE=full runs the Qwen2-1.5B recipe, which needs GPUs"
  else
    echo "comal.sh: the full recipe with $MODEL on GPUs ${gpu_list[*]-none} into $exp; RECIPE=demo runs the small CPU demo"
  fi
  echo "comal.sh: $METHOD, $iterations iterations, eta $ETA, reference moves every $UPDATE_INTERVAL iterations (0: never)"
}

check_settings() {  # write run.json, or compare with the one that is there once samples exist
  local name lines=() file=$exp/run.json
  for name in "${PINNED[@]}"; do lines+=("  \"$name\": \"${!name}\","); done
  if [[ -e $file ]] && compgen -G "$exp/iter*/*.samples.jsonl" >/dev/null; then
    local changed
    changed=$(diff <(printf '%s\n' "${lines[@]}") <(grep -E "^  \"($(IFS='|'; echo "${PINNED[*]}"))\"" "$file")) || true
    [[ -z $changed ]] || die "$exp was begun with other settings (<: now, >: $file):
$(grep '^[<>]' <<<"$changed")
Give the experiment another NAME, or the settings it was begun with."
    return
  fi
  mkdir -p "$exp"
  {
    echo "{"
    printf '%s\n' "${lines[@]}"
    echo "  \"commit\": \"$(git describe --always --dirty 2>/dev/null || echo unknown)\","
    echo "  \"started\": \"$(date -u +%FT%TZ)\""
    echo "}"
  } >"$file.tmp"
  mv "$file.tmp" "$file"
}

plan=
case ${1-} in
  "") ;;
  --plan) plan=yes ;;
  --help | -h) sed -n '2,/^# -* end of settings/p' comal.sh | grep -v -e '^set -' -e '^cd ' -e '^gpus_present' -e '^\[\['; exit 0 ;;
  *) die "unknown argument $1; settings are variables: METHOD=comal bash comal.sh, see --help" ;;
esac
if [[ -n $plan ]]; then PYTHON=${PYTHON:-.venv/bin/python}; else source ./setup.sh || exit 1; fi
main
