#!/usr/bin/env bash
# Makes .venv in the repository root with everything samestep needs, and fetches the embedded model and data.
#
#   bash launch/setup.sh            # about a second when nothing changed
#   bash launch/setup.sh --bench    # also the pinned peers that benchmarks compare with
#
# PYTHON names the interpreter (default: python3). A killed run is repaired by the next one: the stamp is written last,
# and a .venv that holds the marker of unfinished work is made anew.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly unfinished=$venv/.samestep-unfinished
readonly log=$venv/setup.log
readonly needed_gb=4 # .venv takes 2.2 GB with a CPU build of torch; the rest is pip's downloads
# Peers and what they import; litdata declares a torchvision that does not match this torch, and streams without it.
readonly peers=(trl litdata datatrove boto3 botocore certifi charset-normalizer humanize jmespath lightning-utilities
  loguru orjson requests s3transfer urllib3)

die() {
  printf 'samestep setup: %s\n' "$@" >&2
  exit 2
}

say() {
  printf 'samestep setup: %s\n' "$*"
}

# Sets `python`: the interpreter itself, also where an activated environment (this one, even) comes first in PATH.
find_python() {
  local named=${PYTHON:-python3}
  command -v "$named" >/dev/null ||
    die "$named was not found; install Python 3.10 or newer (apt-get install python3 python3-venv python3-dev), or set PYTHON."
  "$named" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$named is $("$named" -V 2>&1); Python 3.10 or newer is needed. Set PYTHON to one, as in PYTHON=python3.11 bash launch/setup.sh"
  python=$("$named" -c 'import sys; print(sys._base_executable)')
}

check_compiler() {
  local compiler=${CXX:-c++}
  command -v "${compiler%% *}" >/dev/null ||
    die "no C++ compiler: $compiler was not found, and DeepSpeed compiles its CPU operations with it at first use." \
      "Install one (apt-get install g++), or set CXX to yours, as in CXX=clang++ bash launch/setup.sh"
}

check_python_parts() {
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python cannot make virtual environments; install the module (apt-get install python3-venv)."
  "$python" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
    die "$python has no C headers (Python.h), which DeepSpeed's CPU operations need; install them (apt-get install python3-dev)."
}

check_disk() {
  local free_gb
  free_gb=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  ((free_gb >= needed_gb)) ||
    die "$free_gb GB are free in $PWD, and $needed_gb GB are needed; free some, or clone into a larger disk."
}

# What this environment was made from; another value means that setup has work to do.
fingerprint() {
  "$python" - pyproject.toml launch/constraints.txt launch/setup.sh <<'PY'
import hashlib, pathlib, sys
parts = [sys.version, sys.base_prefix, str(pathlib.Path.cwd()), *(pathlib.Path(name).read_text() for name in sys.argv[1:])]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

# Two at once would break each other's work; the lock is on the folder itself and ends with this process.
wait_for_other_setup() {
  command -v flock >/dev/null || return 0
  exec 9<.
  flock -n 9 || { say "waiting for another setup of this folder"; flock 9; }
}

# Whether $venv can be brought up to date in place: whole, made here (its scripts hold this path), by this Python.
venv_is_usable() {
  [[ ! -e $unfinished ]] && grep -qsF "$PWD/$venv" "$venv/bin/activate" &&
    [[ $("$venv/bin/python" -c 'import sys; print(sys.version)' 2>&1) == "$("$python" -c 'import sys; print(sys.version)')" ]] &&
    "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() {
  if ! venv_is_usable; then
    [[ ! -e $venv ]] || mv "$venv" ".venv-discarded-$$"
    rm -rf .venv-discarded-*
    mkdir "$venv"
    touch "$unfinished"
    "$python" -m venv "$venv"
  fi
  touch "$unfinished"
}

install() {
  local status=0
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation \
    --constraint launch/constraints.txt "$@" >>"$log" 2>&1 || status=$?
  ((status == 0)) || explain_failed_install
}

explain_failed_install() {
  tail -n 8 "$log" >&2
  if grep -qiE 'no space left|disk quota' "$log"; then
    die "the disk is full (see above); $needed_gb GB are needed in $PWD and in ${TMPDIR:-/tmp}, which TMPDIR can move."
  elif grep -qE 'connection broken|Failed to establish|name resolution|No matching distribution|ProxyError|Read timed out|SSLError' "$log"; then
    rm -f "$unfinished" # pip fetches everything before it changes anything: what is there is whole
    die "pip could not fetch a package (see above). Check the network, the proxy (HTTPS_PROXY) and the package index" \
      "(pip config list; PIP_INDEX_URL names a mirror), then run again: bash launch/setup.sh"
  fi
  die "pip failed (see above; the whole log is $PWD/$log). Then run again: bash launch/setup.sh"
}

install_all() {
  : >"$log"
  say "1/3 build tools"
  install pip setuptools wheel packaging ninja
  say "2/3 torch, the largest download"
  install torch
  say "3/3 everything else (DeepSpeed is built here, with the torch just installed)"
  install --editable '.[test]'
}

setup_base() {
  local started=$SECONDS
  check_python_parts
  check_disk
  say "making $PWD/$venv"
  rm -f "$venv"/.samestep-stamp*
  make_venv
  install_all
  rm "$unfinished"
  printf '%s\n' "$1" >"$venv/.samestep-stamp"
  say "done in $((SECONDS - started)) s"
}

setup_bench() {
  say "benchmark peers: ${peers[*]}"
  : >"$log"
  rm -f "$venv/.samestep-stamp-bench"
  install --no-deps "${peers[@]}"
  printf '%s\n' "$1" >"$venv/.samestep-stamp-bench"
}

# stamped NAME VALUE: whether the stamp holds this value.
stamped() {
  [[ -f $venv/$1 && $(<"$venv/$1") == "$2" ]]
}

main() {
  [[ $# == 0 || $* == --bench ]] || die "unknown arguments: $*; the only option is --bench."
  find_python
  check_compiler
  wait_for_other_setup
  local wanted
  wanted=$(fingerprint)
  stamped .samestep-stamp "$wanted" || setup_base "$wanted"
  if [[ ${1-} == --bench ]]; then
    stamped .samestep-stamp-bench "$wanted" || setup_bench "$wanted"
  fi
  "$venv/bin/python" -m trainer.data.assets
}

main "$@"
