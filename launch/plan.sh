# What --plan prints: each stage's command, once. An iteration whose commands are those of an earlier one, but for the
# numbers in them and the reference, is one line.

planned=  # commands that are not printed yet
declare -A printed=()  # [an iteration's commands without what differs by its number]: that iteration
repeats=() repeated=  # iterations that are not printed, and what they repeat

quote() { [[ $1 =~ ^[A-Za-z0-9_./,=:-]+$ ]] && REPLY=$1 || printf -v REPLY %q "$1"; }  # as a shell reads it

plan_stage() {  # NAME COMMAND...
  local word
  planned+=$'\n'"# $heading, stage $1"$'\n'
  for word in "${@:2}"; do
    quote "$word"
    planned+="$REPLY "
  done
  planned=${planned% }$'\n'
}

plan_iteration() {  # its commands, or the iteration before that has the same ones, but for its number and the reference
  [[ -n $planned ]] || return 0
  local alike=${planned//"# iteration $i of"/} uses=$began_with ago
  alike=${alike//"/$(split).jsonl"/} alike=${alike//"--seed $(seed)"/}
  quote "$began_with"
  alike=${alike//"--reference $REPLY "/}
  quote "$exp"
  for ((ago = 0; ago <= EVAL_EVERY + 1; ago++)); do alike=${alike//"$REPLY/iter$((i - ago))/"/"-$ago/"}; done
  if [[ -z ${printed["$alike"]-} ]]; then
    printed["$alike"]=$i
    show_planned
    return
  fi
  planned=
  ((UPDATE_INTERVAL != 1)) || uses="the last policy"
  local repeat="as iteration ${printed["$alike"]} but for the numbers, with $uses as the reference"
  [[ $repeat == "$repeated" ]] || show_planned
  repeats+=("$i") repeated=$repeat
}

show_planned() {
  if ((${#repeats[@]} == 1)); then echo "# iteration ${repeats[0]}: $repeated"; fi
  if ((${#repeats[@]} > 1)); then echo "# iterations ${repeats[0]} to ${repeats[-1]}: $repeated"; fi
  printf %s "$planned"
  planned= repeats=() repeated=
}
