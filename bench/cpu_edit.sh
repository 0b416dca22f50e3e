#!/usr/bin/env bash
# The whole edit on a CPU that computes in bfloat16, against the published loop on diffusers, in one command.
#   bench/cpu_edit.sh        writes bench/results/{peer,unet_alone,growth}.json, growth.png and bench/RESULTS.md
# An hour or two on two cores. Nothing else should run meanwhile. Figures that matter most come first.
set -uo pipefail
[[ $# -eq 0 ]] || { echo "usage: bench/cpu_edit.sh" >&2; exit 2; }
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

python3 -c 'from ledits_min.engine.cpu import computes_in_bfloat16 as does; assert does(), "this CPU does not"' || exit 1

failed=0
measure() { python3 -m "bench.speed.$1" "${@:2}" || failed=1; }
measure peer_diffusers --rounds 2
measure peer_diffusers --prompts
measure peer_diffusers --peer-dtype fp32
measure unet_alone --batches 1,3,4,8
measure growth
measure unet_alone --batches 4 --compile --openvino
measure peer_diffusers --compile
python3 -m bench.report || failed=1
exit "$failed"
