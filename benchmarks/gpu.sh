#!/usr/bin/env bash
# What one GPU makes of this project: exactness, speed, memory and kernels beside their goals, in under ten minutes.
#
#   bash benchmarks/gpu.sh                                   a table, which is also written to benchmarks/GPU.md
#   bash benchmarks/gpu.sh --only exactness,attention        some of its sections; --help names them
#   bash benchmarks/gpu.sh --device cpu --shape tiny         the same code without a GPU
#
# It takes the first GPU and the packages that it finds: those of PYTHON=..., of the active environment, or of .venv. It
# installs nothing and needs no network. Exit code 1: a result is not exact.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} || ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
command=("$PYTHON")
if [[ " $* " != *" --device cpu "* && " $* " != *" --help "* ]]; then  # launched as training is
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
  command+=(-m accelerate.commands.launch --config_file fsdp_config.yaml --num_processes 1)
fi
exec "${command[@]}" benchmarks/gpu.py "$@"
