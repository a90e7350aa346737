#!/usr/bin/env bash
# Measure what the documents quote of a model, or more, into results/reference/MODEL (growth: beside it).
# Every step resumes.
# Speed first, on an otherwise idle machine; then the audits, which time nothing and run two at once.
#
#   bash scripts/reference.sh                              well over an hour on two cores
#   bash scripts/reference.sh qwen2.5-coder-0.5b-sdsat     several hours
#   AUDITS=0 DATA_LIMIT=8 bash scripts/reference.sh MODEL     speed alone, of fewer problems
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
model="${1:-smollm2-135m-sdsat}"
export RESULTS_DIR="$SDSAT_ROOT/results/reference"
results="$RESULTS_DIR/$model"
mkdir -p "$results"
measure() { python "$SDSAT_ROOT/scripts/$1.py" "$model" --out "$results/$2.json" "${@:3}"; }
measure pass_cost passes_bfloat16
measure pass_cost passes_busy --busy 1
measure profile_passes profile
export STRATEGIES="${STRATEGIES:-two-step,rounded,one-pass,auto}" K_LIST="${K_LIST:-0,3,5,7}" TURNS="${TURNS:-1}"
DATA_LIMIT="${DATA_LIMIT:-16}" sdsat bench greedy "$model" cpu --with-generate
DATA_LIMIT="${DATA_LIMIT:-12}" sdsat bench nucleus "$model" cpu 1.0
DATA_LIMIT="${DATA_LIMIT:-12}" sdsat bench nucleus "$model" cpu 0.2
DATA_LIMIT="${DATA_LIMIT:-16}" DATASET=everyday sdsat bench greedy "$model" cpu
measure peers peers --without "transformers assisted" --data-limit 3 --general 2 --max-new-tokens 128
measure batch_throughput batch --sizes 1,2,4,8,16 --strategy two-step:3 --strategy lookup \
  --strategy auto:lookup=0 --strategy auto --prompts 16 --max-new-tokens 48 --turns 3
measure memory memory
if [ "$model" = smollm2-135m-sdsat ]; then
  python "$SDSAT_ROOT/scripts/growth.py" --out "$RESULTS_DIR/growth.json" --plot "$SDSAT_ROOT/docs/growth.png"
  python "$SDSAT_ROOT/scripts/soak.py" --out "$results/soak.json"
  python "$SDSAT_ROOT/scripts/serve_check.py" --clients 8 --seconds 300 --hostile 2000 --out "$results/serve.json"
fi
sdsat inspect "$model" --out "$results/inspect.json"
[ "${AUDITS:-1}" = 1 ] || exit 0

mkdir -p "$results/exactness"
sdsat eval "$model" --dtype float32 --k-list 5 --strategies two-step,auto --device cpu --out "$results/eval.json"
audit() { OMP_NUM_THREADS=1 sdsat verify "$model" --device cpu --data-limit 40 --out "$results/exactness/$1.json" "${@:2}"; }
for dtype in float32 bfloat16; do
  audit "greedy_$dtype" --dtype "$dtype" --max-new-tokens 48 --k-list 3,7 &
  audit "nucleus_$dtype" --dtype "$dtype" --max-new-tokens 24 --temperature 0.2,1.0 --seeds 0 --k-list 5 --tree auto --tree 2,2,1 &
  wait
done
for dtype in int8 gguf; do audit "greedy_$dtype" --dtype "$dtype" --max-new-tokens 48 --k-list 7 & done
wait
audit greedy_trees_bfloat16 --dtype bfloat16 --max-new-tokens 48 --k-list 5 --tree 2,2,1 --tree 3,2,1,1,1
