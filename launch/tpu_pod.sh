#!/usr/bin/env bash
# One run on all workers of a Cloud TPU slice, queued for if need be, and started again after a preemption:
#   NAME=deq TYPE=v5litepod-64 ZONE=us-west4-a REPOSITORY=URL launch/tpu_pod.sh [--dry-run] --config ... --workdir DIR ...
# REPOSITORY is where the workers get this code, DIR on a disk that all of them see. SPOT=1 takes preemptible workers; VERSION is
# their software. The slice is deleted once the run is complete, and kept if it fails.
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

if $dry_run; then create; run "${on_all[@]}" "$setup"; run "${on_all[@]}" "$main"; delete; exit 0; fi
while true; do
  case $(state) in
    '') create ;;
    ACTIVE)
      if "${on_all[@]}" "$setup" && "${on_all[@]}" "$main"; then
        # A preempted run saves and ends well too: it is over only if the slice is still there.
        if [[ $(state) == ACTIVE ]]; then delete; exit 0; fi
      elif [[ $(state) == ACTIVE ]]; then
        echo "$0: the run failed, and the slice is there: see above; it is kept" >&2
        exit 1
      fi
      ;;
    SUSPENDED | SUSPENDING | FAILED) delete ;;
    *) sleep "${POLL:-30}" ;;
  esac
done
