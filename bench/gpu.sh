#!/usr/bin/env bash
# All that wants a GPU: the kernels' tests compiled, their benchmarks, the end-to-end comparison and the whole edit's speed.
#   bench/gpu.sh DIR        leaves one JSON a benchmark in DIR, and log.txt; under nine minutes
set -uo pipefail
[[ $# -eq 1 ]] || { echo "usage: bench/gpu.sh DIR" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # to import ledits_min where it is not installed
export PYTHONUNBUFFERED=1
failed=()

python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 1

step() {  # name, seconds at most, command
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || failed+=("$name ($?)")
}

{
  step tests 150 python3 -m pytest -q tests/kernels tests/engine/test_ops.py
  for job in sega_step:80 end_to_end:50 group_norm_silu:110 trajectory:40 geglu:40; do
    stem=${job%:*}
    step "$stem" "${job#*:}" python3 -m pytest -q -s "bench/test_$stem.py" \
      --benchmark-json "$out/$stem.json" --benchmark-columns median
  done
  step edit 50 python3 -m pytest -q bench/speed/test_edit.py -k edit_sample \
    --benchmark-json "$out/edit.json" --benchmark-columns median
  if ((${#failed[@]})); then printf 'FAILED: %s\n' "${failed[@]}"; else echo "all passed"; fi
  ((${#failed[@]} == 0))
} 2>&1 | tee "$out/log.txt"
