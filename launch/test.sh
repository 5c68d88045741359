#!/usr/bin/env bash
# The README's second command: sets up, checks style and types, runs the tests. People and CI use this one script.
#
#   bash launch/test.sh                      # everything but tests marked slow or all: under 20 minutes on 2 cores
#   bash launch/test.sh --slow               # only tests marked slow: about 35 minutes
#   bash launch/test.sh --all                # tests marked all, which CI has no time for, and alone: the README's support matrix anew
#   bash launch/test.sh tests/data -k sst    # further arguments go to pytest; -n 0 for one process, as a debugger needs
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

# What the tests need from Debian: "command that succeeds where it is there | package".
readonly needs=(
  "command -v python3|python3"
  "command -v python3-config|python3-dev"
  "python3 -c 'import venv, ensurepip'|python3-venv"
  "command -v c++|g++"
)

install_missing_packages() {
  local need missing=()
  for need in "${needs[@]}"; do
    bash -c "${need%|*}" >/dev/null 2>&1 || missing+=("${need##*|}")
  done
  if ((${#missing[@]} == 0)); then return; fi
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    printf 'samestep test: missing: %s. On Debian or Ubuntu: sudo apt-get install %s\n' "${missing[*]}" "${missing[*]}" >&2
    exit 2
  fi
  printf 'samestep test: installing %s\n' "${missing[*]}"
  if ! { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "${missing[@]}"; } >/dev/null; then
    printf 'samestep test: apt-get could not install %s (see above); check the network and install them.\n' "${missing[*]}" >&2
    exit 2
  fi
}

selection="not slow and not all"
two=(--numprocesses=2 --dist=loadfile --no-loadscope-reorder) # most of a test's time it waits for ranks to start
workers=("${two[@]}")
case ${1-} in
  --slow) selection="slow and not all" workers=() && shift ;;
  --all) selection="all" workers=() && shift ;;
esac

install_missing_packages
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff format --check .
ruff check --quiet .
mypy
if [[ $selection == slow* && $# == 0 ]]; then
  python -m pytest "${two[@]}" -m "$selection" --ignore=tests/slurm
  exec python -m pytest -m "$selection" tests/slurm # one cluster at a time, and its limit is one of time
fi
if [[ $selection != all || $# != 0 ]]; then exec python -m pytest "${workers[@]}" -m "$selection" "$@"; fi
python -m pytest -m all --ignore=tests/distributed/test_methods.py
rm -f tests/distributed/support.json # so that a cell that fails now does not stay "tested"
SAMESTEP_RECORD=1 python -m pytest -m "" tests/distributed/test_methods.py
python tests/support_matrix.py
