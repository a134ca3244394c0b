#!/usr/bin/env bash
# Builds the demo's two tiny models with mle.py: the initial policy and, at the same time, the judge.
#   bash data/demo/build.sh exps/demo-models        (from the project's root; PYTHON names the interpreter)
# BRADLEY_TERRY=true makes a judge without the cycle, to compare with.
# The tests shorten the three runs with POLICY_EPOCHS, JUDGE_SHORT_EPOCHS, JUDGE_EPOCHS and JUDGE_PHRASINGS.
set -Eeuo pipefail
dir=$1
python=${PYTHON:-python3}
# Two processes share the cores: threads that spin while they wait would cost the other one its time.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT-0}

[[ -e $dir/policy/DONE && -e $dir/judge/DONE ]] && exit 0
mkdir -p "$dir"
"$python" data/demo/game.py write --output_dir "$dir" --prompts_per_iteration "${PROMPTS_PER_ITERATION:-1024}" \
  --judge_phrasings "${JUDGE_PHRASINGS:-128}" --bradley_terry "${BRADLEY_TERRY:-false}"

fit() { # NAME START CHATS BATCH EPOCHS RATE [flags]: one run of mle.py, on one core; a finished one is kept
  local name=$1 start=$2 chats=$3 batch=$4 epochs=$5 rate=$6
  [[ -e $dir/$name/DONE ]] && return
  OMP_NUM_THREADS=1 "$python" mle.py \
    --model "$start" \
    --input "$dir/sft/$chats.jsonl" \
    --output "$dir/$name" \
    --global_batch_size "$batch" \
    --micro_batch_tokens 16384 \
    --num_epochs "$epochs" \
    --learning_rate "$rate" \
    --warmup_ratio 0.05 \
    --weight_decay 0 \
    --max_grad_norm 1 \
    "${@:7}" >"$dir/$name.log" 2>&1 || { echo "fitting the demo's $name failed; see $dir/$name.log" >&2; tail -5 "$dir/$name.log" >&2; return 1; }
}

# Batches hold every answer (every ordered pair of answers) equally often, hence no shuffling.
fit policy "$dir/policy-config" policy 24 "${POLICY_EPOCHS:-38}" 2e-3 --from_config --shuffle false &
policy=$!
judge_ok=0
{ fit judge-short "$dir/judge-config" judge_short 36 "${JUDGE_SHORT_EPOCHS:-5}" 2e-3 --from_config --shuffle false &&
  fit judge "$dir/judge-short" judge_full 24 "${JUDGE_EPOCHS:-2}" 2e-3 --shuffle false; } || judge_ok=1
wait "$policy"
exit "$judge_ok"
