#!/usr/bin/env bash
# Start one run as the Kubernetes JobSet of gke_jobset.yaml, on the TPU slice that it names:
#   IMAGE=... launch/gke_jobset.sh [--dry-run] --config configs/wt103.py --workdir /runs/wt103 ...
# IMAGE holds this package; the workdir is on the volume that the JobSet mounts. CHECK=1 compiles the run's steps for that slice
# here, before anything is created, and ends if they do not fit. --dry-run prints the JobSet, and creates nothing.
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true; shift; fi
if [[ -z ${IMAGE:-} ]]; then echo "$0: set IMAGE; see the head of this file" >&2; exit 2; fi
python=${PYTHON:-python}
jobset=$(<"$(dirname "$0")/gke_jobset.yaml")

label() {
  sed -n "s|^ *cloud.google.com/gke-tpu-$1: *||p" <<<"$jobset"
}
if [[ ${CHECK:-0} == 1 ]]; then
  case $(label accelerator) in
    tpu-v4-podslice) chip=v4 ;;
    tpu-v5-lite-*) chip=v5e ;;
    tpu-v5p-slice) chip=v5p ;;
    tpu-v6e-slice) chip=v6e ;;
    *) chip=$(label accelerator) ;;
  esac
  check=("$python" -m deq_flax.compile --must_fit --topology "$chip:$(label topology)" "$@")
  if $dry_run; then printf '%q ' "${check[@]}" | sed 's/^/# /'; echo; else "${check[@]}"; fi
fi

arguments=$("$python" -c 'import json, sys; print(json.dumps(sys.argv[1:])[1:-1])' "$@")
jobset=${jobset//'$IMAGE'/"$IMAGE"}
jobset=${jobset//'$ARGUMENTS'/"$arguments"}
if $dry_run; then printf '%s\n' "$jobset"; else kubectl apply -f - <<<"$jobset"; fi
