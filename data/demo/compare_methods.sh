#!/usr/bin/env bash
# Compares the methods on the demo's game: COMAL, INPO with a fixed reference, Iter-IPO and Iter-DPO, 18 iterations each
# through the whole pipeline, from several seeds.
#
#   bash data/demo/compare_methods.sh            some two hours on two cores; started again, it goes on where it stopped
#   SEEDS="0 1" JOBS=4 bash data/demo/compare_methods.sh
#
# Each run is bash comal.sh METHOD=... SEED=...; it goes to exps/compare/METHOD-SEED, what it prints to METHOD-SEED.log.
# The table and compare.svg show the duality gap by iteration: compare.py.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

METHODS=${METHODS:-comal inpo-small iter-ipo iter-dpo}
SEEDS=${SEEDS:-0 1 2}
JOBS=${JOBS:-$(nproc)}              # runs at a time; they share the cores
folder=exps/compare

die() { echo "compare_methods.sh: $1" >&2; exit 1; }

source launch/setup.sh || exit 1
mkdir -p "$folder"
cores=$(nproc)
threads=$((cores > JOBS ? cores / JOBS : 1))
runs=() failed=
for seed in $SEEDS; do for method in $METHODS; do runs+=("$method-$seed"); done; done

play() {  # METHOD-SEED: one run, without what the picture does not need
  # vLLM would bind the threads of all runs to the same cores; threads that spin would cost the other runs their time.
  exec env -u METHODS -u SEEDS OMP_NUM_THREADS="$threads" VLLM_CPU_OMP_THREADS_BIND=nobind \
    OMP_WAIT_POLICY="${OMP_WAIT_POLICY-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT-0}" \
    bash comal.sh RECIPE=demo GPUS=none METHOD="${1%-*}" SEED="${1##*-}" NAME="compare/$1" ROUNDS=3 EVAL_EVERY=18 \
    >"$folder/$1.log" 2>&1
}

trap 'trap "" TERM; kill -TERM $(jobs -p) 2>/dev/null; wait; exit 143' INT TERM HUP
count=0
for run in "${runs[@]}"; do
  ((count < JOBS)) || { wait -n || failed=yes; }
  [[ -z $failed ]] || break
  count=$((count + 1))
  echo "=== $run ($count of ${#runs[@]}; $((SECONDS / 60)) min so far; log: $folder/$run.log)"
  play "$run" &
done
while [[ -n $(jobs -rp) ]]; do wait -n || failed=yes; done
[[ -z $failed ]] || die "a run failed; see the end of $(cd "$folder" && grep -L "^done after" -- *.log | paste -sd' ') in $folder.
Once the cause is mended, the same command goes on here."
"$PYTHON" data/demo/compare.py "${runs[@]/#/$folder/}" --output "$folder/compare.svg"
echo "$folder/compare.svg, and the figures in compare.json, after $((SECONDS / 60)) min"
