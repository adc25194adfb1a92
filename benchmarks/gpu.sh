#!/usr/bin/env bash
# Measure the tables of this folder on one accelerator, or train a model there, in ten minutes.
#
#   benchmarks/gpu.sh OUT [WHEELS] [PTB]
#
# Writes OUT/tables.md, and logs beside it. WHEELS is a folder of wheels to install first, for machines without network access. With
# PTB, the folder of Penn Treebank's three files, a model is trained on it instead, in OUT/ptb; another call continues it. SMALL=1
# makes everything small enough to try the script on a CPU. Benchmarks that fail or take too long are listed at the end; the others
# run nevertheless.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
wheels=${2:-} ptb=${3:-} python=${PYTHON:-python3}
end=$((SECONDS + ${LIMIT:-570})) failed=()
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_MEM_FRACTION=0.9

if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl
fi
"$python" -c 'import jax; print(jax.__version__, jax.devices())' | tee "$out/device.txt"

# measure NAME SECONDS ARGUMENT...: run one benchmark for at most SECONDS
measure() {
  local name=$1 limit=$2
  shift 2
  if [ $((end - SECONDS)) -lt "$limit" ]; then limit=$((end - SECONDS)); fi
  if [ "$limit" -lt 10 ]; then failed+=("$name $*: no time was left"); return; fi
  echo "$name $*: at most $limit s"
  timeout "$limit" "$python" -m "benchmarks.$name" "$@" --write "$out/tables.md" >> "$out/$name.log" 2>&1 ||
    failed+=("$name $*: exit status $? after at most $limit s, see $name.log")
}

small=(--config.model.d_inner=64 --config.train.steps=20)
if [ -n "$ptb" ]; then
  train=("$python" -m deq_flax.main --config configs/ptb.py --workdir "$out/ptb" --config.data.path="$ptb" ${SMALL:+"${small[@]}"})
  # Ended by a signal, a run saves its state; --mode eval then prints its best perplexity.
  timeout --signal=TERM $((end - SECONDS - 60)) "${train[@]}" >> "$out/ptb.log" 2>&1
  "${train[@]}" --mode eval 2>&1 | tee "$out/ptb_eval.log" | tail -1
elif [ -n "${SMALL:-}" ]; then
  measure utilization 200 --small --batch 4 --rounds 2
  measure memory 100 --only layer
  for mode in float32 tf32 bfloat16; do
    measure solvers 100 --rounds 1 --mode $mode
    measure train_step 200 --rounds 1 --mode $mode
    measure evaluate 100 --rounds 1 --mode $mode
  done
else
  measure utilization 200 --rounds 5
  for mode in float32 tf32 bfloat16; do
    measure solvers 45 --rounds 5 --mode $mode
    measure train_step 60 --rounds 5 --mode $mode
    measure evaluate 30 --rounds 5 --mode $mode
  done
  measure compile_time 60 --config configs/wt103.py:base
  measure memory 60 --only wt103
  measure data 30 --rounds 5
fi
[ ${#failed[@]} -eq 0 ] || printf 'failed: %s\n' "${failed[@]}"
