#!/usr/bin/env bash
# Measure nucleus decoding, AR against SDSAT, on HumanEval: a table here, JSON and plots in results/.
#
#   bash start_nucleus.sh [MODEL] [GPUS] [TEMPERATURE]
#
# MODEL: hub id, model directory, adapter directory; default: the embedded model. GPUS: cpu, or 0,1,2,3 for one worker each, or
# 0+1,2+3 for two GPUs a worker; default: GPU 0 where there is one, else the CPU. Environment: K_LIST (0,1,3,5,7), DATA_LIMIT (problems, or all),
# MAX_NEW_TOKENS, SEED, DTYPE, TREE (chain, paper, 2,1,1), RESULTS_DIR. An interrupted run resumes.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
export RESULTS_DIR="${RESULTS_DIR:-$SDSAT_ROOT/results}"
exec sdsat bench nucleus "${1:-}" "${2:-}" "${3:-1.0}"
