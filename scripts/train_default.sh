#!/usr/bin/env bash
# Make the default model's adapter from nothing: fetch open-source Python packages, let the base answer their documented
# functions, train on the answers. Resumable at any point: run it again. How the shipped adapter was made: dev/LOG.md.
#
#   bash scripts/train_default.sh [OUT]      OUT: working folder, default runs/default
#   LIMIT=3072 STEPS=2850 bash scripts/train_default.sh
#
# On a machine with GPUs: GPU training goes through `accelerate launch`, see scripts/gpu_default.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
out="${1:-$SDSAT_ROOT/runs/default}"
mkdir -p "$out"
[ -d "$out/corpus" ] || {
  # Prompts only: function headers with docstrings. Licences: BSD, MIT, Apache-2.0; the standard library: PSF.
  python -m pip install -q --no-deps --target "$out/corpus.part" -r "$SDSAT_ROOT/scripts/corpus.txt"
  mv "$out/corpus.part" "$out/corpus"
}
# Keep freed memory: glibc would give every large tensor back to the system and fetch it anew, a tenth of a step.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
stdlib="$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')"
sdsat distill --source "$out/corpus" --source "$stdlib" --out "$out/data" --limit "${LIMIT:-3072}"
sdsat train --data "$out/data" --out "$out/adapter" --steps "${STEPS:-2850}" --anchors 48
echo "Ship it: cp $out/adapter/adapter_* $out/adapter/train_log.jsonl $SDSAT_ROOT/sdsat/adapters/smollm2-135m-sdsat/"
