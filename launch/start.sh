# The first thing that comal.sh does, with its arguments: it takes settings from them, answers --help, chooses the
# recipe, and gives the rarer settings their values. comal.sh's own lines then give the others theirs: an argument comes
# before the environment, the environment before the demo's settings, and these before the defaults.

die() { echo "comal.sh: $1" >&2; exit 1; }

# launch/*.py run before anything is installed, with any Python from 3.9 on; the stages run with PYTHON. They need no
# installed package, and without looking for those (-S) Python starts in a fifth of the time.
python=
for candidate in .venv/bin/python python3 "${PYTHON:-}"; do
  python=$("$candidate" -c 'import sys; assert sys.version_info >= (3, 9); print(sys.executable)' 2>/dev/null) && break
done
[[ -n $python ]] || die "no Python 3.9 or newer was found; name one with PYTHON=/path/to/python"

# helper SCRIPT ARGUMENT...: a part of launch/ in Python. It finds the settings and the loop's state in its environment.
helper() { (export "${SETTINGS[@]}" "${STATE[@]}"; exec "$python" -S "launch/$1.py" "${@:2}"); }
files=(comal.sh launch/settings.sh data/demo/settings.sh)
mapfile -t SETTINGS < <(sed -nE 's/^([A-Z][A-Z0-9_]*)=\$\{\1.*/\1/p' "${files[@]}" | sort -u)
STATE=(METHODS METHOD_TITLE TRAINER ITERATIONS ONE_ITERATION PYTHON plan exp i iter first whole policy reference)

plan= only_prepare= trial= arguments=()
for argument in "$@"; do
  case $argument in
    --help | -h) "$python" -S launch/settings.py help; exit 0 ;;
    --plan) plan=yes ;;
    --prepare) only_prepare=yes ;;
    --try) trial=yes ;;
    *) arguments+=("$argument") ;;
  esac
done
[[ -z $trial || -z $plan$only_prepare ]] || die "--try runs a trial, --plan and --prepare do not: give one of them"
"$python" -S launch/settings.py arguments "${arguments[@]}" || exit 1
for argument in "${arguments[@]}"; do printf -v "${argument%%=*}" %s "${argument#*=}"; done
given=()  # names of the settings that the user has given
for name in "${SETTINGS[@]}"; do [[ -z ${!name:-} ]] || given+=("$name"); done

# Which recipe, and why
gpus_present() {
  [[ ${GPUS:-auto} != none && ! ${CUDA_VISIBLE_DEVICES-all} =~ ^(-1)?$ && -n $(nvidia-smi -L 2>/dev/null) ]]
}
if [[ ${SETUP_FOR:-} == cpu ]]; then GPUS=${GPUS:-none}; fi  # its packages see no GPU
if [[ -n ${RECIPE:-} ]]; then
  reason="RECIPE=$RECIPE says so"
elif [[ ${GPUS:-auto} == none ]]; then
  RECIPE=demo reason="GPUS=none says to use no GPU"
elif [[ -z $(nvidia-smi -L 2>/dev/null) ]]; then
  RECIPE=demo reason="nvidia-smi lists no GPU"
elif ! gpus_present; then
  RECIPE=demo reason="CUDA_VISIBLE_DEVICES names none"
else
  RECIPE=full reason="nvidia-smi lists a GPU"
fi
if [[ $RECIPE == demo ]]; then source data/demo/settings.sh; fi
DEMO_MODELS=${DEMO_MODELS:-}
source launch/settings.sh
