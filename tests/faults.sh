#!/usr/bin/env bash
# Runs the demo loop, kills it at random moments, resumes it each time, and compares every file with an undisturbed run:
#
#   bash tests/faults.sh                    40 kills, some 15 minutes on two cores
#   bash tests/faults.sh --kills 6 --iterations 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh || exit 1
exec "$PYTHON" tests/faults.py "$@"
