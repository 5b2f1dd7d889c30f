#!/usr/bin/env bash
# Checks fedfmd on an NVIDIA GPU, times it and trains on all of CIFAR-10, in at most nine minutes.
#
#   run.sh [--toy] [OUT]
#
# OUT (default runs/gpu) gets a table per part, written row by row, log.txt and summary.txt. A part that fails does
# not stop the next; the status is then 1. --toy: toy sizes on the CPU, in about a minute, to try the script.
#
#   PARTS    what to run (default "check layers networks graphs train"; "compiled", whose networks take up to a minute
#            each to compile, only if asked for)
#   DATA     for train: the folder with the parts that images.py packed, or with cifar10_{train,test}.npz
#   LIMIT_S  seconds for everything (default 530; of toys, 3000); what takes less than its share leaves the rest to the next
#   TRAIN    more options of train.py, such as "--networks odconv-4 --channels-last"
#   PYTHON   the interpreter (default python3)
set -uo pipefail

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
fail() { echo "run.sh: $*" >&2; exit 2; }

toy=() shares=(100 60 150 40) limit=${LIMIT_S:-530}
if [ "${1:-}" = --toy ]; then toy=(--toy) shares=(900 900 900 900) limit=${LIMIT_S:-3000}; shift; fi
[ $# -le 1 ] && [[ ${1:-} != -* ]] || usage
out=${1:-runs/gpu} parts=${PARTS:-check layers networks graphs train} python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

for part in $parts; do
  [[ " check layers networks graphs compiled train " == *" $part "* ]] || fail "PARTS = '$parts': '$part' is none of check, layers, networks, graphs, compiled, train"
done
[[ $limit =~ ^[0-9]+$ ]] || fail "LIMIT_S = '$limit': must be a whole number of seconds"
if [ ${#toy[@]} -eq 0 ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "$python has no PyTorch that can use a GPU here; --toy tries the script on the CPU"
  [[ " $parts " != *" train "* ]] || [ -d "${DATA:-}" ] ||
    fail "DATA = '${DATA:-}': must be a folder with CIFAR-10 for train (see README.md), or leave train out of PARTS"
fi
mkdir -p "$out" || fail "$out: can't be made"
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

# Some seconds for the summary are kept back.
left() { echo $((limit - SECONDS - 10)); }

# A script, with its share of the time; one that hangs is ended.
run_part() {
  local name=$1 seconds=$2
  shift 2
  [ "$seconds" -gt 0 ] || { echo "$name: not run, out of time"; return 1; }
  timeout --kill-after=5 $((seconds + 30)) "$python" "$here/$name.py" --out "$out" --seconds "$seconds" ${toy[@]+"${toy[@]}"} "$@"
}

data() {
  folder=${DATA:-}
  [ ${#toy[@]} -eq 0 ] && [ ! -e "$folder/cifar10_train.npz" ] || return 0
  folder=$temporary
  "$python" "$here/images.py" join "$DATA" "$folder"
}

least() { echo $(($1 < $2 ? $1 : $2)); }

everything() {
  local failed=()
  [ ${#toy[@]} -gt 0 ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  for part in $parts; do
    local started=$SECONDS status=0
    case $part in
      check) run_part check "$(least "${shares[0]}" "$(left)")" ;;
      layers) run_part layers "$(least "${shares[1]}" "$(left)")" ;;
      networks) run_part networks "$(least "${shares[2]}" "$(left)")" ;;
      graphs) run_part graphs "$(least "${shares[3]}" "$(left)")" ;;
      compiled) run_part graphs "$(left)" --compiled ;;
      train) data && run_part train "$(left)" --data "$folder" ${TRAIN:-} ;;
    esac || { status=$?; failed+=("$part"); }
    echo "run.sh: $part took $((SECONDS - started)) s, status $status"
  done
  "$python" "$here/summary.py" "$out" >"$out/summary.txt" || failed+=(summary)
  cat "$out/summary.txt"
  [ ${#failed[@]} -eq 0 ] && echo "run.sh: all parts passed in $SECONDS s" && return 0
  echo "run.sh: FAILED: ${failed[*]}, in $SECONDS s"
  return 1
}

everything 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
