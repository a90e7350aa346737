#!/usr/bin/env bash
# Make the coder's adapter from nothing: mixed prompts (code of open-source packages, general chat), the base's own answers,
# training on them. Resumable at any point: run it again. How the shipped adapter was made: dev/LOG.md.
#
#   bash scripts/train_coder.sh [OUT]      OUT: working folder, default runs/coder
#   LIMIT=2560 STEPS=800 bash scripts/train_coder.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
out="${1:-$SDSAT_ROOT/runs/coder}"
base=qwen2.5-coder-0.5b-instruct
mkdir -p "$out"
[ -f "$out/prompts.jsonl" ] ||
  python "$SDSAT_ROOT/scripts/make_prompts.py" --model "$base" --corpus "$out/corpus" --out "$out/prompts.jsonl"
# Keep freed memory: glibc would give every large tensor back to the system and fetch it anew, a tenth of a step.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
sdsat distill --model "$base" --source "$out/prompts.jsonl" --out "$out/data" --limit "${LIMIT:-12000}" \
  --max-new-tokens 512 --max-prompt-tokens 256 --seed 1
sdsat train --model "$base" --data "$out/data" --out "$out/adapter" --steps "${STEPS:-1600}" \
  --anchors 128 --batch-size 1 --held-out 32
echo "Ship it: cp $out/adapter/adapter_* $out/adapter/train_log.jsonl $SDSAT_ROOT/sdsat/adapters/qwen2.5-coder-0.5b-sdsat/"
