#!/usr/bin/env bash
# Measure nucleus decoding, AR against SDSAT: a table here, JSON and plots in results/.
#
#   bash start_nucleus.sh [MODEL] [GPUS] [TEMPERATURE]
#
# MODEL: hub id, model directory, adapter directory; default: the embedded model. GPUS: cpu, or 0,1,2,3 for one worker each, or
# 0+1,2+3 for two GPUs a worker; default: GPU 0 where there is one, else the CPU. Environment, an interrupted run resumes:
#   K_LIST, STRATEGIES (two-step,auto; of lookup, two-step, rounded, one-pass, auto), TREE (auto, grown, chain, paper, 2,1,1),
#   MAX_NEW_TOKENS, SEED, DTYPE, RESULTS_DIR,
#   DATASET (humaneval, everyday, infilling, infilling-psm, a .jsonl of prompts; more with commas between), DATA_LIMIT (16, 3%, all),
#   TURNS (1: how often each is measured; medians count), SAT_TOKEN_ID (32011, or 32011,32012,.. one a depth) and TRAINED_K,
#   whatever the checkpoint says, REVISION (of a hub id),
#   REPEAT (1: every worker measures all problems, and intervals are over workers),
#   LOOKUP (12: tokens that auto and lookup look up in the text so far; 0: auto without that, alone), TEMPLATE_OPTIONS (of the chat
#   template, as enable_thinking=false; more with spaces between). Beside auto stand lookup alone and auto without lookup.
# Defaults: HumanEval up to 256 tokens, K_LIST 0,1,3,5,7, TREE auto, DTYPE bfloat16; on a CPU 6 problems. For an SDSAT checkpoint
# of CodeLlama's form, as `ainergy/CodeLlama-SDSAT_L5_7B`, the paper's: half of HumanEval up to 512 tokens and 3 % of infilling
# up to 50, K_LIST 0,5,7,9,11,13, TREE paper, DTYPE auto.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
export RESULTS_DIR="${RESULTS_DIR:-$SDSAT_ROOT/results}"
exec sdsat bench nucleus "${1:-}" "${2:-}" "${3:-1.0}"
