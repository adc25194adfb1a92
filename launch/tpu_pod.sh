#!/usr/bin/env bash
# Start one run on all workers of a Cloud TPU slice, wait for the slice if necessary, and restart after preemptions:
#   NAME=deq TYPE=v5litepod-64 ZONE=us-west4-a REPOSITORY=URL launch/tpu_pod.sh [--dry-run] --config ... --workdir DIR ...
# REPOSITORY is the URL that the workers clone this code from, DIR a folder on a disk that all of them share. SPOT=1 requests
# preemptible workers; VERSION is their runtime version. CHECK=1 compiles the run's steps for TYPE here, before anything is
# requested, and ends if they do not fit. The slice is deleted once the run is complete, and kept if the run fails.
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true; shift; fi
for needed in NAME TYPE ZONE REPOSITORY; do
  if [[ -z ${!needed:-} ]]; then echo "$0: set $needed; see the head of this file" >&2; exit 2; fi
done
tpu=(gcloud compute tpus)
spot=()
if [[ ${SPOT:-0} == 1 ]]; then spot=(--spot); fi
on_all=("${tpu[@]}" tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command)
printf -v arguments '%q ' "$@"
setup="test -d deq_flax || git clone $(printf %q "$REPOSITORY") deq_flax; cd deq_flax && pip install -q -r requirements-tpu.txt"
main="cd deq_flax && python3 -m deq_flax.main $arguments --coordinator auto"

check=("${PYTHON:-python}" -m deq_flax.compile --must_fit --topology "$TYPE" "$@")

run() {
  if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}
state() {
  "${tpu[@]}" queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)' 2>/dev/null || true
}
create() {
  run "${tpu[@]}" queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" \
    --runtime-version "${VERSION:-tpu-ubuntu2204-base}" "${spot[@]}"
}
delete() {
  run "${tpu[@]}" queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
}

if [[ ${CHECK:-0} == 1 ]]; then run "${check[@]}"; fi
if $dry_run; then create; run "${on_all[@]}" "$setup"; run "${on_all[@]}" "$main"; delete; exit 0; fi
while true; do
  case $(state) in
    '') create ;;
    ACTIVE)
      if "${on_all[@]}" "$setup" && "${on_all[@]}" "$main"; then
        # A preempted run saves and exits with 0 too: the run is complete only if the slice still exists.
        if [[ $(state) == ACTIVE ]]; then delete; exit 0; fi
      elif [[ $(state) == ACTIVE ]]; then
        echo "$0: the run failed: see above; the slice is kept" >&2
        exit 1
      fi
      ;;
    SUSPENDED | SUSPENDING | FAILED) delete ;;
    *) sleep "${POLL:-30}" ;;
  esac
done
