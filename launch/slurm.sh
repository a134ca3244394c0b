#!/usr/bin/env bash
# The loop on N nodes of a SLURM cluster, from the project's folder on a file system that all nodes share:
#
#   sbatch --nodes=4 launch/slurm.sh
#   sbatch --nodes=1 launch/slurm.sh ROUNDS=3 NAME=small      settings as for comal.sh, also in the environment
#
# comal.sh runs on every node: on the first one the loop, on all of them log-probabilities and training. With Ray in
# .venv (pip install ray) sampling and judging use the GPUs of all nodes too, otherwise those of the first.
# Where the nodes have no network, fetch everything before, on a login node: SETUP_FOR=gpu RECIPE=full bash comal.sh
# --prepare; then export HF_HUB_OFFLINE=1.
# Submitted again, also after a time limit, it goes on where it stopped. Ten minutes before the limit SLURM sends SIGUSR1:
# training then writes a resume point and ends. REQUEUE=true sbatch ... submits the job again by itself.
# What it prints: exps/slurm-JOB.out.
# On nodes without GPUs: sbatch --gpus-per-node=0, with GPUS=none.
#SBATCH --job-name=comal
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=exps/slurm-%j.out
set -Eeuo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"

source launch/setup.sh || exit 1  # once, before all nodes use it
export PYTHON
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=${MASTER_ADDR:-$head}

if ((SLURM_JOB_NUM_NODES > 1)) && "$PYTHON" -c "import ray" 2>/dev/null; then
  port=${RAY_PORT:-6379}
  ray=("$PYTHON" -m ray.scripts.scripts start --block --disable-usage-stats)
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" "${ray[@]}" --head --port "$port" >"exps/ray-$SLURM_JOB_ID.log" 2>&1 &
  sleep 15
  srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" \
    "${ray[@]}" --address "$MASTER_ADDR:$port" >>"exps/ray-$SLURM_JOB_ID.log" 2>&1 &
  timeout 600 "$PYTHON" -c "import ray, time
ray.init('$MASTER_ADDR:$port', log_to_driver=False)
while sum(node['Alive'] for node in ray.nodes()) < $SLURM_JOB_NUM_NODES: time.sleep(1)" ||
    { echo "slurm.sh: Ray's nodes did not meet within 600 s; see exps/ray-$SLURM_JOB_ID.log" >&2; exit 1; }
  export ENGINE=ray RAY_ADDRESS=$MASTER_ADDR:$port
fi

# One node that fails ends the others; without that they would wait for it.
code=0
srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash comal.sh "$@" || code=$?
if ((code == 138)) && [[ ${REQUEUE-} == true ]]; then  # 128 + SIGUSR1
  echo "slurm.sh: stopped before the time limit; the job is queued again and will go on there"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
