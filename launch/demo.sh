#!/usr/bin/env bash
# The README's first command: from a fresh machine to a trained adapter, its metrics and its run directory.
#
#   bash launch/demo.sh
#   bash launch/demo.sh train.seed=1 name=seed1   # arguments go to the recipe
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" # DeepSpeed looks for ninja there
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"   # accelerate launch would use one core
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # spinning threads are up to 15 x slower on a machine shared with others
accelerate launch recipes/lora_sst2.py "$@"
