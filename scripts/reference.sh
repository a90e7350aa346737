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
python "$SDSAT_ROOT/scripts/pass_cost.py" "$model" --out "$RESULTS_DIR/$model/passes_bfloat16.json"
DATA_LIMIT="${DATA_LIMIT:-16}" sdsat bench greedy "$model" cpu --with-generate
DATA_LIMIT="${DATA_LIMIT:-10}" sdsat bench nucleus "$model" cpu 1.0 --k-list 0,3,5,7
DATA_LIMIT="${DATA_LIMIT:-10}" sdsat bench nucleus "$model" cpu 0.2 --k-list 0,3,5,7
sdsat inspect "$model" --data-limit 8 --out "$RESULTS_DIR/$model/inspect.json"

audits="$RESULTS_DIR/$model/exactness"
mkdir -p "$audits"
audit() { OMP_NUM_THREADS=1 sdsat verify "$model" --device cpu --data-limit 40 --out "$audits/$1.json" "${@:2}"; }
for dtype in float32 bfloat16; do
  (
    audit "greedy_$dtype" --dtype "$dtype" --max-new-tokens 48
    audit "nucleus_$dtype" --dtype "$dtype" --max-new-tokens 24 --temperature 0.2,1.0 --seeds 0,1 --k-list 5 --tree chain --tree 2,2,1
  ) &
done
wait
audit greedy_trees_bfloat16 --dtype bfloat16 --max-new-tokens 48 --k-list 5 --tree 2,2,1 --tree 3,2,1,1,1
