# What happens around the stages of comal.sh: before the loop, before and after an iteration, at the end; and `stage`,
# which runs one, unless its outputs exist. Where there are processes it is here, the rest is Python: settings.py,
# experiment.py (run.json, forks, checkpoints, disk), stage.py (one running stage), summary.py, prepare.py (--prepare),
# trial.py (--try).

source launch/nodes.sh
source launch/plan.sh

# ------------------------------------------------------------------------------------------------ what comal.sh says

journal= unwritten=  # exps/NAME/logs/comal.log, once a stage has run; before, what will go there

say() { echo "$1"; note "$1"; }

note() { if [[ -n $journal ]]; then printf '%s\n' "$1" >>"$journal"; else unwritten+=$1$'\n'; fi; }

die() {
  echo "comal.sh: $1" >&2
  if [[ -n $journal ]]; then note "comal.sh: $1"; fi
  exit 1
}

open_journal() {  # a finished experiment that is started again changes no file
  [[ -z $journal ]] || return 0
  mkdir -p "$exp/logs"
  journal=$exp/logs/comal.log
  ((NODE_RANK == 0)) || journal=$exp/logs/comal.node$NODE_RANK.log
  printf '%s' "=== $(date -u +%FT%TZ)"$'\n'"$unwritten" >>"$journal"
}

# ------------------------------------------------------------------------------------------------ a stage

running=  # the process of stage.py
watched() {  # FLAG... -- COMMAND...: run a command under launch/stage.py, which ends when comal.sh does
  local code=0
  "$python" -S launch/stage.py --parent $$ "$@" &
  running=$!
  wait "$running" || code=$?
  running=
  return "$code"
}

# stage NAME OUTPUT... -- COMMAND...: run the command unless every output is there
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
  if [[ -n $plan ]]; then plan_stage "$name" "$@"; return; fi
  if ((NODE_RANK > 0)) && ! on_all_nodes "$@"; then wait_for_node_0 "${outputs[@]}"; return; fi
  open_journal
  if [[ -z $ran ]]; then say "=== $heading"; fi
  if [[ -z $ran && $i != none && $NODE_RANK -eq 0 ]]; then helper experiment disk || exit 1; fi
  ran=yes
  local node=
  ((NODE_RANK == 0)) || node=.node$NODE_RANK
  local log=$iter/logs/$name$node.log code=0
  watched --name "$name" --where "$heading" --log "$log" --times "$iter/logs/times$node.jsonl" --gpus "$GPUS" \
    --journal "$journal" -- "$@" || code=$?
  ((code != 1)) || exit 1  # stage.py has said why
  ((code == 0)) ||
    die "$heading, stage $name: what runs it was ended with exit code $code; the same command goes on here"
  if ((NODE_RANK > 0)); then wait_for_node_0 "${outputs[@]}"; return; fi
  local output
  for output in "${outputs[@]}"; do
    [[ -e $output ]] || die "$heading, stage $name ended without an error but did not write $output; see $log"
  done
  clean "${outputs[@]}"
}

clean() {  # OUTPUT...: a stage killed between its last rename and its end leaves the records that it kept
  local output
  [[ -n $plan || $NODE_RANK -gt 0 ]] || for output in "$@"; do rm -f "$output.partial" "$output".*.partial; done
}

stop() {  # SIGNAL EXIT_CODE: end the running stage with all its processes; on USR1 when training has a resume point
  local passed_on=TERM
  trap '' USR1
  if [[ $1 == SIGUSR1 ]]; then passed_on=USR1; else trap '' INT TERM HUP; fi
  if [[ -n $running ]]; then
    kill "-$passed_on" "$running" 2>/dev/null || true
    wait "$running" || true
  fi
  echo "comal.sh: $1 received, stopped; what is complete is kept, the same command goes on from there" >&2
  if [[ -n $journal ]]; then note "comal.sh: $1 received, stopped"; fi
  # Of several nodes the first one tells: srun kills it, which may still be writing, when another one ends with an error.
  if [[ $1 == SIGUSR1 && $NODE_RANK -gt 0 ]]; then exit 0; fi
  exit "$2"
}
trap 'stop SIGUSR1 138' USR1  # from a scheduler, before its time limit
trap 'stop SIGINT 130' INT
trap 'stop SIGTERM 143' TERM
trap 'stop SIGHUP 129' HUP
trap 'echo "comal.sh: line $LINENO failed: $BASH_COMMAND" >&2' ERR

# ------------------------------------------------------------------------------------------------ before the loop

i=none ran= first=$FIRST_ITERATION policy=$MODEL reference=$REFERENCE

begin() {
  local resolved
  resolved=$(helper settings resolve "${given[@]}") || exit 1
  eval "$resolved"  # assignments, quoted by Python's shlex
  exp=exps/$NAME${trial:+-try} whole=$ITERATIONS
  if [[ -n $FROM ]]; then
    resolved=$(helper experiment fork) || exit 1
    eval "$resolved"
  fi
  [[ -z $trial ]] || ITERATIONS=$((first + 1))
  describe
  if [[ -n $plan ]]; then PYTHON=${PYTHON:-.venv/bin/python}; else source launch/setup.sh || exit 1; fi
  find_machines
  heading=preparation iter=$exp uncompared=$first  # the first iteration that no stage of this run has compared
  if ((NODE_RANK == 0)); then prepare; else join_node_0; fi
  if [[ -n $plan ]]; then show_planned; return; fi
  helper experiment files || exit 1
  [[ -z $ENGINE_ARGS$JUDGE_ENGINE_ARGS ]] ||
    "$PYTHON" -m launch.prepare engine_args --policy "$ENGINE_ARGS" --judge "$JUDGE_ENGINE_ARGS" || exit 1
  if [[ -n $only_prepare ]]; then prepare_offline; exit; fi
  if ((NODE_RANK == 0)); then lock_experiment; fi
  if [[ -n $trial ]]; then begin_trial; fi
  helper experiment check || exit 1
  if ((NODES > 1 && NODE_RANK == 0)); then be_node_0; fi
}

begin_trial() {  # --try: the first prompts of each file; an earlier trial is replaced
  if ((NODE_RANK == 0)); then helper trial begin || exit 1; fi
  PROMPTS_DIR=$exp/prompts EVAL_PROMPTS=$exp/prompts/evaluation.jsonl
}

describe() {
  if [[ $RECIPE == demo ]]; then
    say "comal.sh: the demo (two tiny models, minutes on a CPU), because $reason; RECIPE=full runs Qwen2-1.5B on GPUs"
  else
    say "comal.sh: the full recipe with $MODEL (GPUS=$GPUS), because $reason; RECIPE=demo runs the small demo"
  fi
  local moves="the reference moves every $UPDATE_INTERVAL iterations" target="eta $ETA" plural=s
  ((ITERATIONS > 1)) || plural=
  ((UPDATE_INTERVAL != 1)) || moves="the reference moves after every iteration"
  ((UPDATE_INTERVAL)) || moves="the reference stays"
  [[ $ETA != - ]] || target="beta $BETA"
  say "comal.sh: $METHOD_TITLE, $ITERATIONS iteration$plural into $exp; $target, $moves"
  say "comal.sh: settings other than the recipe's: $changed"
  [[ -z $trial ]] || say "comal.sh: a trial: one iteration on the first prompts of each file, to see what the run will be"
}

prepare() {  # the demo's models and prompts, or the project's own prompt files; those of other paths are the user's
  if [[ $RECIPE == demo ]]; then
    one_builder "$DEMO_MODELS" "$DEMO_MODELS"/{policy,judge}/DONE
    stage demo_models "$DEMO_MODELS"/{policy,judge}/DONE -- \
      bash data/demo/build.sh "$DEMO_MODELS"
  fi
  if [[ $RECIPE == full && $PROMPTS_DIR == data/prompts ]]; then
    one_builder data/prompts data/prompts/{train,test}.jsonl
    stage make_prompts data/prompts/{train,test}.jsonl -- \
      "$PYTHON" data_processing.py make_prompts \
      --output_dir data/prompts \
      --num_splits "$SPLITS"
  fi
  if [[ $RECIPE == full && $EVAL_PROMPTS == data/prompts/alpaca_eval.jsonl ]]; then
    one_builder data/prompts "$EVAL_PROMPTS"
    stage eval_prompts "$EVAL_PROMPTS" -- \
      "$PYTHON" eval.py alpaca_eval \
      --output "$EVAL_PROMPTS"
  fi
  exec 9>&-
}

prepare_offline() {  # --prepare: fetch and check the rest, which the stages would do when they need it
  local prompts=() i
  for ((i = 0; i < SPLITS && i < ITERATIONS; i++)); do prompts+=("$PROMPTS_DIR/$(split).jsonl"); done
  watched --show -- "$PYTHON" -m launch.prepare fetch \
    --models "$(list "$policy" "$reference" "$MODEL")" \
    --tokenizer "$TOKENIZER" \
    --prompts "$(list "${prompts[@]}" "$PROMPTS_DIR/test.jsonl" "$EVAL_PROMPTS")" \
    "${judge[@]}" || exit 1
  say "everything that the run needs is here; with HF_HUB_OFFLINE=1 in the environment it uses no network"
}

# Locks are descriptors of comal.sh: 8 of the experiment, 9 of what is built. stage.py inherits them, the stages do not:
# after a kill the experiment is free again once stage.py has ended everything that it had started.
lock_experiment() {
  mkdir -p "$exp"
  exec 8>>"$exp/.lock"
  local code=0 owner
  flock -n -E 9 8 || code=$?
  if ((code == 9)); then
    owner=$(<"$exp/.lock")
    if ! kill -0 "${owner:-0}" 2>/dev/null; then  # it has just been killed
      code=0
      flock -w 30 -E 9 8 || code=$?
    fi
    ((code != 9)) || die "$exp is in use by another comal.sh (pid $owner); wait for it, or take another NAME"
  fi
  ((code == 0)) || echo "comal.sh: no lock on $exp (flock failed); take care to run it once at a time" >&2
  echo $$ >"$exp/.lock"
  touch -d @0 "$exp/.lock"  # so that a finished experiment, started again, changes no file
}

one_builder() {  # FOLDER OUTPUT...: wait while another comal.sh makes what is missing
  [[ -z $plan ]] || return 0
  local output missing= code=0
  for output in "${@:2}"; do [[ -e $output ]] || missing=yes; done
  [[ -n $missing ]] || return 0
  mkdir -p "$1"
  exec 9>>"$1/.lock"
  flock -n -E 9 9 || code=$?
  ((code != 9)) || say "waiting for the lock on $1, where another comal.sh builds"
  while ((code == 9)); do
    code=0
    flock -w 1 -E 9 9 || code=$?  # a second at a time: bash handles signals in between
  done
  ((code == 0)) || echo "comal.sh: no lock on $1 (flock failed); take care to build it once at a time" >&2
}

# ------------------------------------------------------------------------------------------------ around an iteration

begin_iteration() {
  iter=$exp/iter$i ran= heading="iteration $i of $ITERATIONS" began_with=$reference
  # A fork has no first iteration that would sample the initial policy's answers.
  if [[ -n $FROM ]] && ((i == first)); then answer start_responses "$MODEL" "$(responses -1)" $((SEED * 1000)); fi
}

end_iteration() {
  if [[ -n $plan ]]; then plan_iteration; return; fi
  ((NODE_RANK == 0)) || return 0
  rm -rf "$iter"/ckpt/{resume,best}-*
  if (((i + 1) % SPLITS == 0)); then ln -sfn "iter$i/ckpt" "$exp/round$(((i + 1) / SPLITS))"; fi
  [[ -e $iter/next.json ]] || helper experiment note
  # While the weights are there: the iteration's rows of the demo's table.
  if [[ $RECIPE == demo && -n $ran && -z $trial ]] && { [[ $KEEP_CKPTS != all ]] || (((i + 1) % EVAL_EVERY == 0)); }; then
    demo_table >/dev/null
  fi
  [[ $KEEP_CKPTS == all ]] || helper experiment prune
  if [[ -n $ran && -z $trial ]]; then
    report
    say "$(helper summary iteration)"
  fi
}

begin_evaluation() {
  if ((NODE_RANK > 0)); then
    say "node $NODE_RANK has no more to do"
    exit 0
  fi
  i=$((ITERATIONS - 1)) ran= heading="evaluation of the last policy, iter$i"
}

finish() {
  if [[ -n $plan ]]; then
    show_planned
    helper experiment cost
    return
  fi
  rm -f "$exp"/iter*/eval/*.partial
  if [[ -n $trial ]]; then
    finish_trial
    return
  fi
  if [[ $RECIPE == demo ]]; then demo_table; fi
  if [[ -n $ran ]]; then report; fi
  if [[ -n $ran && $RECIPE == full ]]; then say "$(helper summary evaluation)"; fi
  echo
  say "done after $(helper summary duration "$SECONDS"): $ITERATIONS iterations in $exp; the last policy is \
$policy/model"
}

finish_trial() {
  local text
  report
  text=$(helper trial report) || exit 1
  rm -rf "$iter"/ckpt/{model,last}  # gigabytes; the figures stay
  say "$text"
  say "done after $(helper summary duration "$SECONDS"); the trial's files are in $exp"
}

demo_table() {
  watched --show -- "$PYTHON" data/demo/game.py table --experiment "$exp" --start "$MODEL" --tokenizer "$TOKENIZER" ||
    die "the demo's table failed"
}

report() {  # exps/NAME/report/index.html; a run does not fail for its report
  watched --quiet --log "$exp/report/log" -- "$PYTHON" -m analysis.report "$exp" ||
    echo "comal.sh: WARNING: no report was written; see $exp/report/log" >&2
}

# ------------------------------------------------------------------------------------------------ names used by stages

list() { local IFS=,; echo "$*"; }

seed() { echo $((SEED * 1000 + i)); }

split() { if [[ $ONE_ITERATION == true ]]; then echo train; else echo "train_$((i % SPLITS))"; fi; }

responses() {  # ITERATION: the answers of its policy. Those of MODEL came before all; only a fork has others before it
  if (($1 < 0)) || { [[ -z $FROM ]] && (($1 < first)); }; then
    echo "$exp/start/responses.jsonl"
  else
    echo "$exp/iter$1/eval/responses.jsonl"
  fi
}

eta() {  # this round's value of ETA; the last one holds for the rounds after it
  local values round=$((i / SPLITS))
  IFS=, read -ra values <<<"$ETA"
  echo "${values[round < ${#values[@]} ? round : ${#values[@]} - 1]}"
}

to_compare() {  # LAST: the arrays ours, theirs, compared (outputs) of the iterations up to LAST, as far as not compared
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

to_play() {  # the arrays files and names: responses of the initial policy and of the last one of each round
  local j
  files=("$(responses -1)") names=(start)
  for ((j = first; j <= i; j++)); do
    if (((j + 1) % SPLITS == 0 || j == i)); then files+=("$(responses "$j")") names+=("iter$j"); fi
  done
}
