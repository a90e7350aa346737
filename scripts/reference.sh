#!/usr/bin/env bash
# Measure everything that the README and docs/exactness.md quote, into results/reference. Every step resumes.
# Speed first, on an otherwise idle machine; then the audits, which time nothing and run two at once.
#
#   bash scripts/reference.sh            well over an hour on two cores
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export RESULTS_DIR="$SDSAT_ROOT/results/reference"
model=smollm2-135m-sdsat
mkdir -p "$RESULTS_DIR/$model"
results="$RESULTS_DIR/$model"
python "$SDSAT_ROOT/scripts/pass_cost.py" "$model" --out "$results/passes_bfloat16.json"
python "$SDSAT_ROOT/scripts/pass_cost.py" "$model" --busy 1 --out "$results/passes_busy.json"
python "$SDSAT_ROOT/scripts/profile_passes.py" "$model" --out "$results/profile.json"
export STRATEGIES=two-step,rounded,one-pass,auto K_LIST=0,3,5,7 TURNS="${TURNS:-3}"
DATA_LIMIT="${DATA_LIMIT:-16}" sdsat bench greedy "$model" cpu --with-generate
DATA_LIMIT="${DATA_LIMIT:-12}" sdsat bench nucleus "$model" cpu 1.0
DATA_LIMIT="${DATA_LIMIT:-12}" sdsat bench nucleus "$model" cpu 0.2
python "$SDSAT_ROOT/scripts/peers.py" "$model" --ours two-step:5 --ours rounded:7 --ours one-pass:5 --ours auto --data-limit 8 --general 8 --out "$results/peers.json"
python "$SDSAT_ROOT/scripts/batch_throughput.py" "$model" --strategy two-step:3 --strategy auto --prompts 32 --max-new-tokens 64 --turns 2 --out "$results/batch.json"
python "$SDSAT_ROOT/scripts/soak.py" --out "$results/soak.json"
sdsat inspect "$model" --out "$results/inspect.json"

mkdir -p "$results/exactness"
sdsat eval "$model" --dtype float32 --k-list 5 --strategies two-step,auto --device cpu --out "$results/eval.json"
audit() { OMP_NUM_THREADS=1 sdsat verify "$model" --device cpu --data-limit 40 --out "$results/exactness/$1.json" "${@:2}"; }
for dtype in float32 bfloat16; do
  audit "greedy_$dtype" --dtype "$dtype" --max-new-tokens 48 --k-list 3,7 &
  audit "nucleus_$dtype" --dtype "$dtype" --max-new-tokens 24 --temperature 0.2,1.0 --seeds 0 --k-list 5 --tree chain --tree 2,2,1 &
  wait
done
audit greedy_trees_bfloat16 --dtype bfloat16 --max-new-tokens 48 --k-list 5 --tree 2,2,1 --tree 3,2,1,1,1
