#!/usr/bin/env bash
# All that wants a GPU, most valuable first: whole edits against the published loop on diffusers, the UNet alone, the
# kernels' tests compiled, the kernels alone, engine and kernels end to end.
#   bench/gpu.sh DIR            leaves a JSON per step in DIR, written as it ends, and log.txt
#   bench/gpu.sh DIR --quick    small networks, on a CPU too: does every line of this script run?
set -uo pipefail
[[ $# -ge 1 && ${2:---quick} == --quick ]] || { echo "usage: bench/gpu.sh DIR [--quick]" >&2; exit 2; }
quick=${2:+1}
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # to import ledits_min where it is not installed
export PYTHONUNBUFFERED=1
failed=()

if [[ -z $quick ]]; then
  python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 1
fi

step() {  # name, seconds at most, command
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || failed+=("$name ($?)")
}
edit() {  # seconds at most, options
  local how=(--dtype fp16 --output "$out/peer.json")
  [[ -n $quick ]] && how=(--dtype fp32 --quick)
  step "edit ${*:2}" "$1" python3 -m bench.speed.peer_diffusers "${how[@]}" "${@:2}"
}
bench() {  # seconds at most, file, options
  step "$(basename "$2" .py)" "$1" python3 -m pytest -q -s "$2" --benchmark-json "$out/$(basename "$2" .py).json" \
    --benchmark-columns median "${@:3}"
}

{
  edit 120 --steps 100 --skip 36
  edit 60 --steps 20 --skip 7
  edit 60 --steps 20 --skip 7 --prompts
  edit 90 --steps 20 --skip 7 --images 8
  if [[ -n $quick ]]; then
    step unet_alone 60 python3 -m bench.speed.unet_alone --quick --dtype fp32
  else
    step unet_alone 60 python3 -m bench.speed.unet_alone --dtype fp16 --batches 1,3,4,8,32,64
    cp bench/results/unet_alone.json "$out/" || failed+=("unet_alone.json")
    step tests 150 python3 -m pytest -q tests/kernels tests/engine/test_ops.py tests/engine/test_graphs.py
  fi
  for job in sega_step:80 group_norm_silu:110 layer_norm:60 geglu:40 trajectory:40; do
    [[ -f bench/kernels/test_${job%:*}.py ]] && bench "${job#*:}" "bench/kernels/test_${job%:*}.py"
  done
  [[ -n $quick ]] || bench 60 bench/speed/test_end_to_end.py
  [[ -n $quick ]] || bench 50 bench/speed/test_edit.py -k edit_sample
  [[ -n $quick ]] || edit 180 --steps 20 --skip 7 --compile
  if ((${#failed[@]})); then printf 'FAILED: %s\n' "${failed[@]}"; else echo "all passed"; fi
  ((${#failed[@]} == 0))
} 2>&1 | tee "$out/log.txt"
