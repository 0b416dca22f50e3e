#!/usr/bin/env bash
# All that wants a GPU, most valuable first: whole edits against the published loop on diffusers, the UNet alone, the
# kernels' tests compiled, launch shapes, the kernels alone, engine and kernels end to end, SDXL, the peer compiled.
#   bench/gpu.sh DIR            leaves a JSON per step in DIR, written as it ends, and log.txt, a table at its end
#   bench/gpu.sh DIR --quick    small networks, on a CPU too: does every line of this script run?
# It takes SECONDS_IN_ALL at most (470): a step has its own limit and what is left, and the last ones may get nothing.
# Neither git nor a network is needed, and nothing but DIR is written.
set -uo pipefail
[[ $# -ge 1 && ${2:---quick} == --quick ]] || { echo "usage: bench/gpu.sh DIR [--quick]" >&2; exit 2; }
quick=${2:+1}
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # to import ledits_min where it is not installed
export PYTHONUNBUFFERED=1
end=$((SECONDS + ${SECONDS_IN_ALL:-470}))
failed=()

if [[ -z $quick ]]; then
  python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 1
fi

step() {  # name, seconds at most, command
  local name=$1 limit=$2 left=$((end - SECONDS))
  shift 2
  if ((left < 10)); then failed+=("$name (no time left)"); return; fi
  echo "== $name"
  timeout $((limit < left ? limit : left)) "$@" || failed+=("$name ($?)")
}
edit() {  # seconds at most, options
  local how=(--dtype fp16 --output "$out/peer.json")
  [[ -n $quick ]] && how=(--dtype fp32 --output "$out/peer.json" --quick)
  step "edit ${*:2}" "$1" python3 -m bench.speed.peer_diffusers "${how[@]}" "${@:2}"
}
bench() {  # seconds at most, file, options
  step "$(basename "$2" .py)" "$1" python3 -m pytest -q -s "$2" --benchmark-json "$out/$(basename "$2" .py).json" \
    --benchmark-columns median "${@:3}"
}

{
  edit 90 --steps 100 --skip 36
  edit 50 --steps 20 --skip 7
  if [[ -n $quick ]]; then
    step unet_alone 60 python3 -m bench.speed.unet_alone --output "$out/unet_alone.json" --quick --dtype fp32
  else
    step unet_alone 60 python3 -m bench.speed.unet_alone --output "$out/unet_alone.json" --dtype fp16 \
      --batches 1,3,4,8,16,64
    step tests 120 python3 -m pytest -q tests/kernels tests/engine/test_ops.py tests/engine/test_graphs.py \
      tests/engine/test_steps.py tests/engine/test_layouts.py -k "not compiles"
    step tune 120 python3 -m bench.tune_kernels --table "$out/launch_table.json"
  fi
  edit 60 --steps 20 --skip 7 --images 8
  edit 50 --steps 20 --skip 7 --prompts
  for job in group_norm_silu:80 sega_step:60 layer_norm:40 geglu:30 trajectory:30; do
    bench "${job#*:}" "bench/kernels/test_${job%:*}.py"
  done
  if [[ -z $quick ]]; then
    bench 60 bench/speed/test_end_to_end.py
    bench 50 bench/speed/test_edit.py -k edit_sample
    bench 90 bench/speed/test_sdxl_full.py
    edit 180 --steps 20 --skip 7 --compile
  fi
  if ((${#failed[@]})); then printf 'FAILED: %s\n' "${failed[@]}"; else echo "all passed"; fi
  python3 -m bench.speed.table "$out"
  ((${#failed[@]} == 0))
} 2>&1 | tee "$out/log.txt"
