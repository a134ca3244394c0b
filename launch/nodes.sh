# Machines: how training is launched on this one's GPUs and on several nodes, and how the nodes wait for each other.
#
# comal.sh is started on every node, in one shared folder. Node 0 runs the loop; the others run log-probabilities and
# training with it, and otherwise wait until node 0 has written a stage's outputs. exps/NAME/.node0 exists while node 0
# runs: without it, the others end.

find_machines() {  # the arrays `launch`, which starts training, and `judge` and `engines`, flags of the stages
  judge=(--judge "$JUDGE" --judge_type "$JUDGE_TYPE" --judge_weights "$JUDGE_WEIGHTS" --template "$TEMPLATE"
    --api_base "$API_BASE" --max_prompt_tokens "$MAX_JUDGE_TOKENS" --engine_args "$JUDGE_ENGINE_ARGS"
    "${judge_flags[@]}")
  engines=(--engine "$ENGINE" --gpus "$GPUS" --tensor_parallel_size "$TENSOR_PARALLEL_SIZE" --on_error "$ON_ERROR"
    --stall_timeout "$STALL_TIMEOUT")
  launch=("$PYTHON")
  [[ -z $only_prepare ]] || return 0  # also on a machine without the GPUs of the run
  local accelerate=("$PYTHON" -m accelerate.commands.launch --config_file fsdp_config.yaml)
  local several=() gpu_list=() numbers=$GPUS gpu listing listed uuids reason
  listing=$(nvidia-smi -L 2>/dev/null) || listing=
  listed=$(sed -nE 's/^GPU ([0-9]+):.*/\1/p' <<<"$listing" | paste -sd,)
  uuids=$(sed -nE 's/.*\(UUID: ([^)]*)\).*/\1/p' <<<"$listing" | paste -sd,)  # of GPUs, and of their MIG instances
  if [[ $GPUS != auto && $GPUS != none && -z $plan ]]; then
    for gpu in ${GPUS//,/ }; do
      [[ ,$listed,$uuids, == *,$gpu,* ]] ||
        die "GPUS=$GPUS names GPU $gpu, but nvidia-smi lists: ${listed:-none}; give numbers or UUIDs of nvidia-smi -L, \
auto or none"
    done
  fi
  if ((NODES > 1)); then
    [[ -n $MASTER_ADDR || -z ${SLURM_STEP_NODELIST-} ]] ||
      MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    [[ -n $MASTER_ADDR ]] || die "NODES=$NODES, but MASTER_ADDR, the address of node 0, is not set"
    several=(--num_machines "$NODES" --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR"
      --main_process_port "$MASTER_PORT")
  fi
  if gpus_present; then
    [[ $numbers != auto ]] || numbers=${CUDA_VISIBLE_DEVICES:-$listed}
    IFS=, read -ra gpu_list <<<"$numbers"
    if [[ $numbers == *MIG-* && ${#gpu_list[@]} -gt 1 ]]; then
      numbers=${gpu_list[0]} gpu_list=("${gpu_list[0]}")
      say "comal.sh: training uses $numbers alone, because CUDA gives a process one MIG instance at most"
    fi
    # nvidia-smi's numbers, where CUDA's own order is by speed; and less fragmentation by batches of many lengths, which
    # vLLM, whose stages this is not for, does not want everywhere.
    launch=(env "CUDA_VISIBLE_DEVICES=$numbers" CUDA_DEVICE_ORDER=PCI_BUS_ID
      "PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}"
      "${accelerate[@]}" --num_processes $((NODES * ${#gpu_list[@]})) "${several[@]}")
    return
  fi
  [[ $RECIPE == demo || -n $plan || $GPUS == none ]] ||
    die "RECIPE=full, but no usable GPU was found; GPUS=none runs it on the CPU, with a small MODEL and JUDGE"
  if [[ -z $plan ]]; then
    reason=$("$PYTHON" -c "from workers.pool import no_cpu_engine; print(no_cpu_engine())") || exit 1
    [[ -z $reason ]] || die "no GPU is used (GPUS=$GPUS), but $reason"
  fi
  ((NODES == 1)) || launch=(env ACCELERATE_USE_CPU=true "${accelerate[@]}" --mixed_precision no
    --num_processes "$NODES" "${several[@]}")
  # Threads that spin while they wait cost a stage beside another busy process a factor of eight.
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT-0}
}

on_all_nodes() { [[ "$*" == "${launch[*]} "* ]]; }  # COMMAND...: whether the nodes run it together

be_node_0() {  # .node0, until comal.sh has ended: a process of its own removes it, as SIGKILL may end comal.sh
  local id
  id=$$-$(date +%s%N)
  echo "$id" >"$exp/.node0"
  # Until its parent is another one: a process that was killed can still be found for a while.
  setsid bash -c 'trap "" USR1
    while read -r _ _ _ parent _ </proc/$$/stat && ((parent == $1)); do sleep 1; done
    if grep -qsx "$2" "$3"; then rm "$3"; fi' - $$ "$id" "$exp/.node0" </dev/null >/dev/null 2>&1 &
}

join_node_0() {  # on the other nodes: once node 0 has prepared everything
  [[ -z $plan ]] || return 0
  say "node $NODE_RANK waits for node 0 to begin (both need to share $PWD/$exp)"
  until [[ -e $exp/.node0 ]]; do sleep 1; done
}

wait_for_node_0() {  # FILE...: until node 0 has written them
  local file told=
  for file in "$@"; do
    until [[ -e $file ]]; do
      [[ -n $told ]] || say "node $NODE_RANK waits for $file of node 0"
      told=yes
      if [[ ! -e $exp/.node0 ]]; then
        sleep 5  # it may have ended just after it wrote the file
        [[ -e $file ]] || die "node 0 has stopped, or does not share this file system: $file is missing"
      fi
      sleep 1
    done
  done
}
