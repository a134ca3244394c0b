#!/usr/bin/env bash
# Sets up what is missing, checks the code's style, and runs the tests; pytest's own flags may follow:
#
#   bash tests/run.sh
#   bash tests/run.sh -m "not slow"      in two minutes, without engines and whole loops
#   bash tests/run.sh -k losses -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh || exit 1

# Style and types; an environment of the user's own may lack these tools.
for check in "ruff check ." "ruff format --check ." mypy; do
  if "$PYTHON" -c "import ${check%% *}" 2>/dev/null; then
    # shellcheck disable=SC2086
    "$PYTHON" -m $check
  else
    echo "tests/run.sh: not checked with ${check%% *}, which is not installed"
  fi
done

# Three files at a time, in the order of conftest.py: on two cores, as tests often wait for a process. On GPUs one, where
# each engine wants all of the memory.
parallel=(-n 3 --dist loadfile --no-loadscope-reorder)
if [[ -n $(nvidia-smi -L 2>/dev/null) ]]; then parallel=(); fi

# Threads that wait should not spin: beside another busy process that costs a factor of eight and more.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}

# -ra names each skipped test with its reason: what is skipped has not been tested.
status=0
"$PYTHON" -m pytest tests -q -ra --durations=10 "${parallel[@]}" "$@" || status=$?
echo "tests/run.sh took $((SECONDS / 60)) min $((SECONDS % 60)) s, setup included"
exit "$status"
