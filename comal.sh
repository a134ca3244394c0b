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
FROM=${FROM:-}               # exps/OTHER/iterN: a fork, which begins behind that iteration, with its policy and reference

# Models: local directories or Hub ids
MODEL=${MODEL:-yale-nlp/comal-qwen2-1.5b-mle}           # the start policy
TOKENIZER=${TOKENIZER-Qwen/Qwen2-1.5B}                  # empty: the policy's own
JUDGE=${JUDGE:-NCSOFT/Llama-3-OffsetBias-8B}
JUDGE_TYPE=${JUDGE_TYPE:-offsetbias-lm}                 # offsetbias-lm, bt-mixture (reward models), openai (a server)
JUDGE_WEIGHTS=${JUDGE_WEIGHTS:-}                        # of a panel, JUDGE=a,b; JUDGE_TYPE and TEMPLATE: one, or one each
TEMPLATE=${TEMPLATE:-prompts/offsetbias.txt}            # the judge's prompt
API_BASE=${API_BASE:-}                                  # of an openai judge; the key is OPENAI_API_KEY in the environment
JUDGE_FLAGS=${JUDGE_FLAGS:-}                            # more of scoring.py's: "--labels 'A,B' --reward_temperature 2"

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
SOFT_LABELS=${SOFT_LABELS:-false}                       # learn the judge's probability of each pair, not its verdict

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
MICRO_BATCH_TOKENS=${MICRO_BATCH_TOKENS:-0}             # tokens of a forward pass on one GPU; 0: one pair at a time
MAX_LENGTH=${MAX_LENGTH:-2048}                          # tokens; longer pairs are dropped and counted
MAX_GRAD_NORM=${MAX_GRAD_NORM:-0}                       # 0: no clipping
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false}
SELECT=${SELECT:-best}                                  # checkpoint with the lowest validation loss, or the last

# Evaluation: win rates against the start policy and the previous iteration
EVAL_EVERY=${EVAL_EVERY:-1}                             # iterations; all since the last time are compared at once, when
                                                        # the judge is there anyway: to score the next one's samples
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-0.7}
KL_FROM_START=${KL_FROM_START:-true}                    # also at each round's end where the start is not the reference

# Machines. On several, start comal.sh on each, with its NODE_RANK, in the same folder of a shared file system (launch/slurm.sh)
NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}              # 0 runs the loop, the others join in log-probabilities and training
MASTER_ADDR=${MASTER_ADDR:-}                            # of node 0
MASTER_PORT=${MASTER_PORT:-29500}
ENGINE=${ENGINE:-local}                                 # engines of sampling and judging: local, or ray: on a Ray cluster
GPUS=${GPUS:-auto}                                      # auto, none, or physical numbers: 0,2,3
GPUS_PER_WORKER=${GPUS_PER_WORKER:-1}                   # GPUs that share one vLLM engine (tensor parallel)
ON_ERROR=${ON_ERROR:-fail}                              # a record that kills its workers: fail, or skip and list it
STALL_TIMEOUT=${STALL_TIMEOUT:-1800}                    # seconds without progress until a worker is replaced; 0: never
SAVE_STEPS=${SAVE_STEPS:-200}                           # updates between points where training can go on; 0: none
KEEP_CKPTS=${KEEP_CKPTS:-all}                           # all, rounds (each round's last), last (what is still needed)
REPORT_TO=${REPORT_TO:-tensorboard}                     # training curves: tensorboard, wandb, both by comma, or none
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
PINNED=(METHOD SPLITS SEED MODEL TOKENIZER JUDGE JUDGE_TYPE JUDGE_WEIGHTS JUDGE_FLAGS TEMPLATE PROMPTS_DIR EVAL_PROMPTS ETA
  TAU_ETA_RATIO UPDATE_INTERVAL BETA PAIR_RULE SOFT_LABELS NUM_SAMPLES TEMPERATURE TOP_P MAX_PROMPT_TOKENS MAX_NEW_TOKENS MAX_JUDGE_TOKENS LEARNING_RATE
  WARMUP_RATIO NUM_EPOCHS GLOBAL_BATCH_SIZE MAX_LENGTH MAX_GRAD_NORM SELECT EVAL_TEMPERATURE FROM)

check_values() {  # everything that can be known to be wrong before hours of work
  one_of RECIPE demo full
  one_of METHOD comal inpo-small inpo-large iter-ipo iter-dpo ipo dpo
  one_of PAIR_RULE top_two best_worst random
  one_of SELECT best last
  one_of SOFT_LABELS true false
  one_of GRADIENT_CHECKPOINTING true false
  one_of KL_FROM_START true false
  one_of ON_ERROR fail skip
  one_of KEEP_CKPTS all rounds last
  one_of ENGINE local ray
  whole 1 ROUNDS SPLITS MAX_PROMPT_TOKENS MAX_NEW_TOKENS MAX_JUDGE_TOKENS NUM_EPOCHS GLOBAL_BATCH_SIZE \
    MAX_LENGTH EVAL_EVERY GPUS_PER_WORKER NODES MASTER_PORT
  whole 2 NUM_SAMPLES
  whole 0 NODE_RANK SEED MICRO_BATCH_TOKENS STALL_TIMEOUT SAVE_STEPS ${UPDATE_INTERVAL:+UPDATE_INTERVAL}
  number TAU_ETA_RATIO BETA TEMPERATURE TOP_P LEARNING_RATE WARMUP_RATIO MAX_GRAD_NORM EVAL_TEMPERATURE
  [[ -z $ETA || ,$ETA =~ ^(,$number)+$ ]] || die "ETA=$ETA should be a number, or one a round, comma-separated"
  local type
  for type in ${JUDGE_TYPE//,/ }; do
    [[ " offsetbias-lm bt-mixture openai " == *" $type "* ]] ||
      die "JUDGE_TYPE=$JUDGE_TYPE should be offsetbias-lm, bt-mixture or openai; of several judges one each, comma-separated"
  done
  [[ -z $JUDGE_WEIGHTS || ,$JUDGE_WEIGHTS =~ ^(,$number)+$ ]] || die "JUDGE_WEIGHTS=$JUDGE_WEIGHTS should be numbers, comma-separated"
  [[ $JUDGE_TYPE != *openai* || -n $API_BASE$(printenv OPENAI_BASE_URL OPENAI_API_KEY) ]] ||
    die "OPENAI_API_KEY is not set; OpenAI wants one. For another server give API_BASE"
  [[ $ENGINE == local || $GPUS == auto || $GPUS == none ]] || die "GPUS=$GPUS: with ENGINE=ray, Ray hands out the GPUs; give auto or none"
  ((NODE_RANK < NODES)) || die "NODE_RANK=$NODE_RANK should be less than NODES=$NODES"
  positive LEARNING_RATE BETA TOP_P
  at_most_one TOP_P WARMUP_RATIO
  local value
  for value in ${ETA//,/ }; do
    [[ $METHOD == *dpo || ${value%%e*} =~ [1-9] ]] || die "ETA=$ETA should be greater than 0"
  done
}

number='[0-9]*\.?[0-9]+(e-?[0-9]+)?'
one_of() { [[ " ${*:2} " == *" ${!1} "* ]] || die "$1=${!1} is unknown; choose one of: ${*:2}"; }
whole() {  # LEAST NAME...
  local name
  for name in "${@:2}"; do
    [[ ${!name} =~ ^[0-9]+$ ]] && ((10#${!name} >= $1)) || die "$name=${!name} should be a whole number, at least $1"
  done
}
number() {
  local name
  for name in "$@"; do [[ ${!name} =~ ^$number$ ]] || die "$name=${!name} should be a number, 0 or more"; done
}
positive() {
  local name value
  for name in "$@"; do
    value=${!name}
    [[ ${value%%e*} =~ [1-9] ]] || die "$name=$value should be greater than 0"
  done
}
at_most_one() {
  local name
  for name in "$@"; do
    awk -v x="${!name}" 'BEGIN { exit !(x <= 1) }' || die "$name=${!name} should be at most 1"
  done
}

check_files() {  # the models' names and the prompts, once `prepare` has made what it makes
  local name names file
  files=("$PROMPTS_DIR/test.jsonl" "$EVAL_PROMPTS")
  IFS=, read -ra names <<<"$TEMPLATE"
  files+=("${names[@]}")
  IFS=, read -ra names <<<"$JUDGE"
  if [[ $JUDGE_TYPE == *openai* ]]; then names=(); fi  # names on a server; scoring.py checks the others
  for name in "$MODEL" "${names[@]}"; do
    [[ -e $name || $name =~ ^[^./][^/]*/[^/]+$ ]] || die "$name (MODEL or JUDGE): no such directory, and no Hub id (owner/name)"
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
    one_builder "$DEMO_MODELS" "$DEMO_MODELS"/{policy,judge}/DONE
    stage demo_models "$DEMO_MODELS"/{policy,judge}/DONE -- \
      bash data/demo/build.sh "$DEMO_MODELS"
    return
  fi
  # Only the project's own prompt files are made; those of other paths are the user's.
  if [[ $PROMPTS_DIR == data/prompts ]]; then
    one_builder data/prompts data/prompts/{train,test}.jsonl
    stage make_prompts data/prompts/{train,test}.jsonl -- \
      "$PYTHON" data_processing.py make_prompts \
      --output_dir data/prompts \
      --num_splits "$SPLITS"
  fi
  if [[ $EVAL_PROMPTS == data/prompts/alpaca_eval.jsonl ]]; then
    one_builder data/prompts "$EVAL_PROMPTS"
    stage eval_prompts "$EVAL_PROMPTS" -- \
      "$PYTHON" eval.py alpaca_eval \
      --output "$EVAL_PROMPTS"
  fi
}

sample() {  # the policy answers train and test prompts K times, and the evaluation prompts once: they tell how good it is
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

score() {  # the judge compares the K responses with each other; and, with the same start, the policies up to now
  local comparisons=() compared=()
  if [[ ! -e $iter/train.scores.jsonl || ! -e $iter/test.scores.jsonl ]] && ((i % EVAL_EVERY == 0)); then
    to_compare $((i - 1))
    if ((${#compared[@]})); then
      comparisons=(--responses "$(list "${ours[@]}")" --baseline "$(list "${theirs[@]}")" --compared "$(list "${compared[@]}")")
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
    --micro_batch_tokens "$MICRO_BATCH_TOKENS"
}

train() {
  local method=()
  case $trainer in
    inpo) method=(--eta "$(eta)" --tau_eta_ratio "$TAU_ETA_RATIO" --soft_labels "$SOFT_LABELS") ;;
    ipo) method=(--eta "$(eta)" --soft_labels "$SOFT_LABELS") ;;
    dpo) method=(--beta "$BETA" --soft_labels "$SOFT_LABELS") ;;
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
    --micro_batch_tokens "$MICRO_BATCH_TOKENS" \
    --max_length "$MAX_LENGTH" \
    --max_grad_norm "$MAX_GRAD_NORM" \
    --gradient_checkpointing "$GRADIENT_CHECKPOINTING" \
    --select "$SELECT" \
    --save_steps "$SAVE_STEPS" \
    --report_to "$REPORT_TO" \
    --seed $((SEED * 1000 + i))
  [[ -n $plan || $NODE_RANK -gt 0 ]] || rm -rf "$iter"/ckpt/{resume,best}-*
}

start_logprobs() {  # once a round the start policy's log-probabilities of the test pairs, where it is not the reference
  [[ $reference != "$MODEL" && $KL_FROM_START == true ]] && (((i + 1) % SPLITS == 0)) || return 0
  stage start_logprobs "$iter/eval/start_logps.jsonl" -- \
    "${launch[@]}" get_logprobs.py \
    --model "$MODEL" \
    --reference "$MODEL" \
    --tokenizer "$TOKENIZER" \
    --input "$iter/test.pairs.jsonl" \
    --output "$iter/eval/start_logps.jsonl" \
    --max_length "$MAX_LENGTH" \
    --micro_batch_tokens "$MICRO_BATCH_TOKENS"
}

generate() {  # STAGE MODEL OUTPUT SEED: one answer to each evaluation prompt
  stage "$1" "$3" -- \
    "$PYTHON" eval.py generate \
    --model "$2" \
    --tokenizer "$TOKENIZER" \
    --input "$EVAL_PROMPTS" \
    --output "$3" \
    --temperature "$EVAL_TEMPERATURE" \
    --top_p "$TOP_P" \
    --max_prompt_tokens "$MAX_PROMPT_TOKENS" \
    --max_new_tokens "$MAX_NEW_TOKENS" \
    --seed "$4" \
    "${engines[@]}"
}

to_compare() {  # LAST: the arrays ours, theirs, compared (outputs) of the iterations up to LAST that are not compared yet
  local j
  ours=() theirs=() compared=()
  for ((j = uncompared; j <= $1; j++)); do
    if [[ -e $exp/iter$j/eval/vs_start.json && -e $exp/iter$j/eval/vs_previous.json ]]; then continue; fi
    ours+=("$(responses "$j")" "$(responses "$j")")
    theirs+=("$(responses -1)" "$(responses $((j - 1)))")
    compared+=("$exp/iter$j/eval/vs_start.jsonl" "$exp/iter$j/eval/vs_previous.jsonl")
  done
  uncompared=$(($1 + 1))
}

evaluate_last() {  # the last policy, which no further iteration samples from, and what was not compared before
  generate responses "$iter/ckpt" "$(responses "$i")" $((SEED * 1000 + i + 1))
  to_compare "$i"
  stage evaluation "$iter"/eval/vs_{start,previous}.json -- \
    "$PYTHON" eval.py compare \
    "${judge[@]}" \
    --responses "$(list "${ours[@]}")" \
    --baseline "$(list "${theirs[@]}")" \
    --output "$(list "${compared[@]}")" \
    "${engines[@]}"
  [[ -n $plan || $NODE_RANK -gt 0 ]] || rm -f "$exp"/iter*/eval/*.partial
}

matrix() {  # all against all: the start policy and each round's last one
  local files names=start j
  files=("$(responses -1)")
  for ((j = first; j <= i; j++)); do
    (((j + 1) % SPLITS == 0 || j == i)) || continue
    files+=("$(responses "$j")") names+=,iter$j
  done
  stage matrix "$exp/matrix/iter$i.json" -- \
    "$PYTHON" eval.py matrix \
    "${judge[@]}" \
    --responses "$(list "${files[@]}")" \
    --names "$names" \
    --output "$exp/matrix/iter$i.json" \
    "${engines[@]}"
}

report() {  # exps/NAME/report/index.html; a run does not fail for its report
  mkdir -p "$exp/report"
  "${marked[@]}" "$PYTHON" -m analysis.report "$exp" >"$exp/report/log" 2>&1 7>&- 8>&- 9>&- ||
    echo "comal.sh: WARNING: no report was written; see $exp/report/log" >&2
}

# ------------------------------------------------------------------------------------------------ the loop

main() {
  check_values
  method_settings
  find_gpus
  exp=exps/$NAME
  policy=$MODEL reference=$MODEL first=0
  if [[ -n $FROM ]]; then fork; fi
  describe
  if [[ -z $plan ]]; then start_guard; fi
  i=none iter=$exp
  if ((NODE_RANK == 0)); then prepare; else join_node_0; fi
  if [[ -z $plan ]]; then
    check_files
    ((NODE_RANK > 0)) || lock_experiment
    check_settings
    if ((NODES > 1 && NODE_RANK == 0)); then echo "$run_id" >"$exp/.node0"; fi
  fi
  uncompared=$first  # the first iteration that no stage of this run has compared
  for ((i = first; i < iterations; i++)); do
    iter=$exp/iter$i began=$SECONDS ran=
    # A fork has no first iteration that would sample the start policy's answers.
    if [[ -n $FROM ]] && ((i == first)); then generate start_responses "$MODEL" "$(responses -1)" $((SEED * 1000)); fi
    sample
    score
    make_pairs
    logprobs
    start_logprobs
    train
    policy=$iter/ckpt
    if ((UPDATE_INTERVAL && (i + 1) % UPDATE_INTERVAL == 0)); then reference=$policy; fi
    if ((NODE_RANK > 0)); then continue; fi
    if (((i + 1) % SPLITS == 0)) && [[ -z $plan ]]; then ln -sfn "iter$i/ckpt" "$exp/round$(((i + 1) / SPLITS))"; fi
    [[ -n $plan ]] || complete
    if [[ -n $ran ]]; then progress; report; fi
  done
  if ((NODE_RANK > 0)); then echo "node $NODE_RANK has no more to do"; return; fi
  i=$((iterations - 1)) ran=
  evaluate_last
  matrix
  [[ -z $plan ]] || return 0
  if [[ $RECIPE == demo ]]; then demo_table; fi
  [[ -z $ran ]] || report
  echo
  echo "done after $(duration "$SECONDS"): $iterations iterations in $exp; the last policy is $policy/model"
}

fork() {  # begin behind another experiment's iteration: with its policy, its reference and the number after it
  local role name
  FROM=${FROM%/}
  [[ $FROM =~ ^(.+)/iter([0-9]+)$ ]] || die "FROM=$FROM should be an iteration's folder: exps/OTHER/iterN"
  first=$((BASH_REMATCH[2] + 1))
  [[ ! ${BASH_REMATCH[1]} -ef $exp ]] || die "FROM=$FROM lies in $exp itself; give the fork another NAME"
  [[ -d $FROM ]] || die "FROM=$FROM: no such folder"
  [[ -e $FROM/next.json ]] || die "FROM=$FROM has no next.json: that iteration is not complete; finish it, or take an earlier one"
  ((first < iterations)) || die "FROM=$FROM goes on with iteration $first, but there are $iterations (numbered from 0); raise ROUNDS"
  for role in policy reference; do
    name=$(sed -nE "s/.*\"$role\": \"([^\"]*)\".*/\1/p" "$FROM/next.json")
    [[ -e $exp/iter$first/ckpt/DONE || (! -e $name && $name =~ ^[^./][^/]*/[^/]+$) || -n $(weights "$name") ]] ||
      die "FROM=$FROM: its $role $name has no weights any more (KEEP_CKPTS deletes them); take another iteration"
    printf -v "$role" %s "$name"
  done
}

complete() {  # the iteration is: note what the next one starts from, and delete the checkpoints that nothing needs
  if [[ ! -e $iter/next.json ]]; then
    echo "{\"policy\": \"$policy\", \"reference\": \"$reference\"}" >"$iter/next.json.tmp"
    mv "$iter/next.json.tmp" "$iter/next.json"
  fi
  # While the weights are there: its rows of the demo's table.
  if [[ $RECIPE == demo && -n $ran && ($KEEP_CKPTS != all || $(((i + 1) % EVAL_EVERY)) == 0) ]]; then demo_table >/dev/null; fi
  [[ $KEEP_CKPTS != all ]] || return 0
  local j
  for ((j = first; j < i; j++)); do
    [[ $exp/iter$j/ckpt == "$reference" ]] || { [[ $KEEP_CKPTS == rounds ]] && (((j + 1) % SPLITS == 0)); } ||
      rm -rf "$exp/iter$j/ckpt"/{model,last}
  done
}

measured=0 spent=0  # iterations that this run has computed, and their seconds
progress() {  # one line an iteration: what is done, what is left, when it will be finished
  local took=$((SECONDS - began)) left=$((iterations - i - 1)) rest
  measured=$((measured + 1)) spent=$((spent + took))
  rest=$((left * spent / measured))
  echo -n "=== iteration $i of $iterations is done after $(duration "$took")"
  ((left == 0)) || echo -n "; $left left, about $(duration "$rest"): until $(date -d "+$rest seconds" "+%a %H:%M")"
  echo
}

duration() { if (($1 < 3600)); then echo "$(($1 / 60)) min $(($1 % 60)) s"; else echo "$(($1 / 3600)) h $(($1 % 3600 / 60)) min"; fi; }

demo_table() { "${marked[@]}" "$PYTHON" data/demo/game.py table --experiment "$exp" --start "$MODEL" 7>&- 8>&- 9>&-; }

# ------------------------------------------------------------------------------------------------ how stages run

ran=  # whether this iteration has run a stage

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
  if [[ -z $missing ]]; then clean "${outputs[@]}"; return; fi
  if [[ -n $plan ]]; then
    printf '\n# %s\n' "$(where "$name")"
    local word
    for word in "$@"; do [[ $word =~ ^[A-Za-z0-9_./,=:-]+$ ]] && printf '%s ' "$word" || printf '%q ' "$word"; done
    echo
    return
  fi
  if ((NODE_RANK > 0)) && [[ "$*" != "${launch[*]} "* ]]; then wait_for_node_0 "${outputs[@]}"; return; fi
  ((NODE_RANK > 0)) || check_disk
  kill -0 "$guard" 2>/dev/null || start_guard
  local log=$iter/logs/$name.log start=$SECONDS code=0
  ((NODE_RANK == 0)) || log=$iter/logs/$name.node$NODE_RANK.log
  ran=yes
  mkdir -p "$iter/logs"
  echo "=== $(where "$name")  ($(duration "$SECONDS") so far; log: $log)"
  # In a session of its own, so that stopping it reaches every process that it started.
  setsid "${marked[@]}" "$@" > >(exec tee "$log" 7>&- 8>&- 9>&-) 2>&1 7>&- 8>&- 9>&- &
  running=$!
  wait "$running" || code=$?
  running=
  ((code == 0)) || sweep
  ((code == 0)) || die "$(where "$name") failed with exit code $code; its output is in $log.
Nothing after it was run. Once the cause is mended, the same command goes on here; where it is a setting, take another NAME."
  if ((NODE_RANK > 0)); then wait_for_node_0 "${outputs[@]}"; return; fi
  local output
  for output in "${outputs[@]}"; do
    [[ -e $output ]] || die "$(where "$name") ended without an error but did not write $output; see $log"
  done
  clean "${outputs[@]}"
  echo "=== $name took $((SECONDS - start)) s"
  echo "{\"stage\": \"$name\", \"seconds\": $((SECONDS - start)), \"ended\": \"$(date -u +%FT%TZ)\"}" >>"$iter/logs/times.jsonl"
}

join_node_0() {  # on the other nodes: once node 0 has prepared everything
  [[ -z $plan ]] || return 0
  echo "=== node $NODE_RANK waits for node 0 to begin (both need to share $PWD/$exp)"
  until [[ -e $exp/.node0 ]]; do sleep 1; done
}

wait_for_node_0() {  # FILE...: until node 0 has written them
  local file told=
  for file in "$@"; do
    until [[ -e $file ]]; do
      [[ -n $told ]] || echo "=== node $NODE_RANK waits for $file of node 0"
      told=yes
      if [[ ! -e $exp/.node0 ]]; then
        sleep 5  # it may have ended just after it wrote the file
        [[ -e $file ]] || die "node 0 has stopped, or does not share this file system: $file is missing"
      fi
      sleep 1
    done
  done
}

clean() {  # OUTPUT...: a stage killed between its last rename and its end leaves the records that it kept
  local output
  [[ -n $plan || $NODE_RANK -gt 0 ]] || for output in "$@"; do rm -f "$output.partial" "$output".*.partial; done
}

# Descriptors: 7 the guard's pipe, 8 the experiment's lock, 9 the lock for building. No stage inherits them.
run_id=$(</proc/sys/kernel/random/uuid)
# vLLM's process titles would overwrite the mark without SPT_NOENV.
marked=(env "COMAL_RUN=$run_id" SPT_NOENV=1)

sweep() {  # kill what carries this run's mark, whatever session it is in, until a second has passed without any
  local pid pids quiet=0
  for _ in {1..100}; do
    pids=$(cd /proc && grep -lzxs "COMAL_RUN=$run_id" [0-9]*/environ | cut -d/ -f1) || true
    # Python's resource trackers end by themselves, last, and remove shared memory on their way.
    for pid in $pids; do grep -qs resource_tracker "/proc/$pid/cmdline" || kill -KILL "$pid" 2>/dev/null || true; done
    if [[ -n $pids ]]; then quiet=0; else quiet=$((quiet + 1)); fi
    ((quiet < 5)) || return 0
    sleep 0.2
  done
}

start_guard() {  # it sees the end of its pipe when comal.sh has ended in whatever way, SIGKILL included
  exec 7> >(exec setsid bash -c "$(declare -f sweep); cat; run_id=$run_id; sweep
    if grep -qsx $run_id '$exp/.node0'; then rm '$exp/.node0'; fi" >/dev/null 2>&1 8>&- 9>&-)
  guard=$!
}

lock_experiment() {
  local code=0
  mkdir -p "$exp"
  exec 8>>"$exp/.lock"
  flock -n -E 9 8 || code=$?
  ((code != 9)) || die "$exp is in use by another comal.sh (pid $(<"$exp/.lock")); wait for it, or take another NAME"
  ((code == 0)) || echo "comal.sh: no lock on $exp (flock failed); take care to run it once at a time" >&2
  echo "$$" >"$exp/.lock"
  touch -d @0 "$exp/.lock"  # so that a finished experiment, started again, changes no file
}

one_builder() {  # FOLDER OUTPUT...: wait while another comal.sh makes what is missing
  [[ -z $plan ]] || return 0
  local output missing=
  for output in "${@:2}"; do [[ -e $output ]] || missing=yes; done
  [[ -n $missing ]] || return 0
  mkdir -p "$1"
  exec 9>>"$1/.lock"
  flock -n 9 && return
  echo "comal.sh: waiting for the lock on $1, where another comal.sh builds"
  setsid "${marked[@]}" flock 9 7>&- 8>&- &
  running=$!
  wait "$running" || echo "comal.sh: no lock on $1 (flock failed); take care to build it once at a time" >&2
  running=
}

weights() {  # MODEL: the weight files of a local directory
  compgen -G "$1/*.safetensors" || compgen -G "$1/*.bin" || compgen -G "$1/model/*.safetensors" || compgen -G "$1/model/*.bin" || true
}

disk_checked=
check_disk() {  # once an iteration, before its first missing stage
  [[ $i != none && $disk_checked != "$i" ]] || return 0
  disk_checked=$i
  local size=0 file config need free mib=$((1024 * 1024))
  while read -r file; do
    if [[ -n $file ]]; then size=$((size + $(stat -Lc %s "$file"))) config=$(dirname "$file")/config.json; fi
  done <<<"$(weights "$policy")"
  # Checkpoints are float32.
  if ((size)) && grep -Eqs '"(torch_)?dtype": *"b?float16"' "$config"; then size=$((2 * size)); fi
  need=$((size > 0 && size < 1024 * mib ? 100 * mib : 1024 * mib))  # the records
  # The checkpoint and the best one; two resume points while one replaces the other: weights and two moments each.
  if [[ ! -e $iter/ckpt/DONE ]]; then need=$((need + 2 * size + (SAVE_STEPS > 0 ? 6 * size : 0))); fi
  free=$(df -Pk "$exp" | sed -nE 's/.* ([0-9]+) +[0-9]+% .*/\1/p') || free=
  [[ -z $free ]] || ((free * 1024 >= need)) || die "iteration $i needs about $((need / mib)) MiB on the disk of $exp, which has \
$((free / 1024)) MiB free. Free some; KEEP_CKPTS=last and SAVE_STEPS=0 need less; or make exps a link to a larger disk."
}

running=
stop() {  # SIGNAL EXIT_CODE: end the running stage with all its processes
  trap '' INT TERM HUP
  echo "comal.sh: $1 received, stopping" >&2
  if [[ -n $running ]]; then
    kill -TERM -- "-$running" 2>/dev/null || true
    for _ in {1..50}; do kill -0 -- "-$running" 2>/dev/null || break; sleep 0.1; done
  fi
  if [[ -z $plan ]]; then sweep; fi
  echo "comal.sh: stopped; what is complete is kept, the same command goes on from there" >&2
  exit "$2"
}
trap 'stop SIGINT 130' INT
trap 'stop SIGTERM 143' TERM
trap 'stop SIGHUP 129' HUP
trap 'echo "comal.sh: line $LINENO failed: $BASH_COMMAND" >&2' ERR

find_gpus() {
  judge=(--judge "$JUDGE" --judge_type "$JUDGE_TYPE" --judge_weights "$JUDGE_WEIGHTS" --template "$TEMPLATE"
    --api_base "$API_BASE" --max_prompt_tokens "$MAX_JUDGE_TOKENS")
  eval "judge+=($JUDGE_FLAGS)"  # with its quotes
  engines=(--engine "$ENGINE" --gpus "$GPUS" --gpus_per_worker "$GPUS_PER_WORKER" --on_error "$ON_ERROR" --stall_timeout "$STALL_TIMEOUT")
  if [[ $GPUS != auto && $GPUS != none && -z $plan ]]; then
    local gpu listed
    listed=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd' ') || true
    for gpu in ${GPUS//,/ }; do
      [[ " $listed " == *" $gpu "* ]] || die "GPUS=$GPUS names GPU $gpu, but nvidia-smi lists: ${listed:-none}; give numbers from there, auto or none"
    done
  fi
  launch=("$PYTHON")
  local several=()
  if ((NODES > 1)); then
    [[ -n $MASTER_ADDR || -z ${SLURM_STEP_NODELIST-} ]] || MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    [[ -n $MASTER_ADDR ]] || die "NODES=$NODES, but MASTER_ADDR, the address of node 0, is not set"
    several=(--num_machines "$NODES" --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
  fi
  if ! gpus_present; then
    [[ $RECIPE == demo || -n $plan || $GPUS == none ]] ||
      die "RECIPE=full, but no usable GPU was found; GPUS=none runs it on the CPU all the same, with a small MODEL and JUDGE"
    ((NODES == 1)) || launch=(env ACCELERATE_USE_CPU=true "$PYTHON" -m accelerate.commands.launch --config_file fsdp_config.yaml
      --mixed_precision no --num_processes "$NODES" "${several[@]}")
    return
  fi
  local numbers=$GPUS
  [[ $numbers != auto ]] || numbers=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
  IFS=, read -ra gpu_list <<<"$numbers"
  launch=(env "CUDA_VISIBLE_DEVICES=$numbers" "$PYTHON" -m accelerate.commands.launch --config_file fsdp_config.yaml
    --num_processes $((NODES * ${#gpu_list[@]})) "${several[@]}")
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
  local name lines=() versions=() changed file=$exp/run.json
  for name in "${PINNED[@]}"; do lines+=("  \"$name\": \"${!name}\","); done
  for name in "${files[@]}"; do lines+=("  \"sha256 $name\": \"$(sha256sum <"$name" | cut -c1-64)\","); done
  versions=("  \"code\": \"$(sha256sum *.py */*.py comal.sh launch/* prompts/* | sha256sum | cut -c1-64)\",")
  packages=$("$PYTHON" -c 'from importlib.metadata import distributions
for found in distributions(): print(found.metadata["Name"], found.version)')
  for name in torch transformers vllm accelerate; do versions+=("  \"$name\": \"$(package "$name")\","); done
  if [[ -e $file ]] && { ((NODE_RANK > 0)) || compgen -G "$exp/iter*/*.samples.jsonl" ||
    compgen -G "$exp/iter*/*.samples.jsonl.partial"; } >/dev/null; then
    changed=$(differences "$(IFS='|'; echo "${PINNED[*]}")|sha256 [^\"]*" "${lines[@]}")
    [[ -z $changed ]] || die "$exp was begun with other settings or files (<: now, >: $file):
$changed
Give the experiment another NAME, or the settings it was begun with;
or fork: FROM=$exp/iterN NAME=another bash comal.sh"
    changed=$(differences "code|torch|transformers|vllm|accelerate" "${versions[@]}")
    [[ -z $changed ]] || echo "comal.sh: WARNING: $exp was begun with other code or packages (<: now, >: $file), and
goes on with these:
$changed" >&2
    if ((NODE_RANK == 0)) && ! grep -qx "  \"ROUNDS\": \"$ROUNDS\"," "$file"; then  # more rounds may follow
      sed "s/^  \"ROUNDS\": .*/  \"ROUNDS\": \"$ROUNDS\",/" "$file" >"$file.tmp"
      mv "$file.tmp" "$file"
    fi
    return
  fi
  {
    echo "{"
    printf '%s\n' "${lines[@]}" "${versions[@]}"
    echo "  \"ROUNDS\": \"$ROUNDS\","
    echo "  \"commit\": \"$(git describe --always --dirty 2>/dev/null || echo unknown)\","
    echo "  \"started\": \"$(date -u +%FT%TZ)\""
    echo "}"
  } >"$file.tmp"
  mv "$file.tmp" "$file"
}

differences() {  # NAMES LINE...: what differs between these lines and those of run.json with such names
  diff <(printf '%s\n' "${@:2}") <(grep -E "^  \"($1)\": " "$exp/run.json") | grep '^[<>]' || true
}

package() {  # NAME: its version; vLLM's build for the CPU has a name of its own
  sed -n "s/^$1\(-cpu\)\? //p" <<<"$packages"
}

plan=
case ${1-} in
  "") ;;
  --plan) plan=yes ;;
  --help | -h) sed -n '2,/^# -* end of settings/p' comal.sh | grep -v -e '^set -' -e '^cd ' -e '^gpus_present' -e '^\[\['; exit 0 ;;
  *) die "unknown argument $1; settings are variables: METHOD=comal bash comal.sh, see --help" ;;
esac
if [[ -n $plan ]]; then PYTHON=${PYTHON:-.venv/bin/python}; else source launch/setup.sh || exit 1; fi
main
