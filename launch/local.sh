#!/usr/bin/env bash
# Start one run in N processes on this machine:
#   launch/local.sh [--dry-run] N --config configs/wt103.py:tiny --workdir runs/tiny ...
# On a machine with GPUs, process i uses GPU i.
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true; shift; fi
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then echo "usage: $0 [--dry-run] N ARGUMENTS OF deq_flax.main" >&2; exit 2; fi
count=$1
shift

python=${PYTHON:-python}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
pids=()
for ((i = 0; i < count; i++)); do
  command=("$python" -m deq_flax.main "$@" --coordinator "localhost:$port" --num_processes "$count" --process_id "$i")
  if $dry_run; then printf '%q ' "${command[@]}"; echo; continue; fi
  JAX_LOCAL_DEVICE_IDS=$i "${command[@]}" &
  pids+=($!)
done
if $dry_run; then exit 0; fi

signalled=false
trap 'signalled=true; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do
  while true; do
    signalled=false
    code=0
    wait "$pid" || code=$?
    $signalled || break # a trapped signal ends `wait` early
  done
  if ((code > status)); then status=$code; fi
done
exit "$status"
