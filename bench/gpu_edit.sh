#!/usr/bin/env bash
# The whole edit on a GPU against the published loop on diffusers, in one command.
#   bench/gpu_edit.sh DIR        leaves peer.json, unet_alone.json and log.txt in DIR; under nine minutes
set -uo pipefail
[[ $# -eq 1 ]] || { echo "usage: bench/gpu_edit.sh DIR" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 1

{
  failed=0
  edit() { timeout "$1" python3 -m bench.speed.peer_diffusers --dtype fp16 --output "$out/peer.json" "${@:2}" || failed=1; }
  timeout 30 python3 -m pytest -q tests/engine/test_graphs.py || failed=1
  timeout 60 python3 -m bench.speed.unet_alone --dtype fp16 --batches 1,3,4,64 || failed=1
  cp bench/results/unet_alone.json "$out/" || failed=1
  edit 120 --steps 100 --skip 36
  edit 60 --steps 20 --skip 7 --prompts
  edit 90 --steps 20 --skip 7 --images 8
  edit 180 --steps 20 --skip 7 --compile
  exit "$failed"
} 2>&1 | tee "$out/log.txt"
