#!/usr/bin/env bash
# Sets up what is missing and runs the tests; pytest's own flags may follow:
#
#   bash tests/run.sh
#   bash tests/run.sh -k losses -x

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh || exit 1

# Two files at a time, but on GPUs, where each engine wants all of the memory.
parallel=(-n 2 --dist loadfile)
if [[ -n $(nvidia-smi -L 2>/dev/null) ]]; then parallel=(); fi

# -ra names each skipped test with its reason: what is skipped has not been tested.
status=0
"$PYTHON" -m pytest tests -q -ra --durations=10 "${parallel[@]}" "$@" || status=$?
echo "tests/run.sh took $((SECONDS / 60)) min $((SECONDS % 60)) s, setup included"
exit "$status"
