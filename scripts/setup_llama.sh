#!/usr/bin/env bash
# Build llama.cpp's server for this processor into build/llama.cpp, from the sources that its Python package carries. Idempotent.
# Optional: nothing but scripts/peers.py wants it. Needs cmake and a C++ compiler; 10 to 25 minutes.
#
#   bash scripts/setup_llama.sh
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
version=0.3.36 made="$root/build/llama.cpp"
fail() { echo "setup_llama: $1" >&2; exit 2; }

[ "$(cat "$made/version" 2>/dev/null)" != "$version" ] || { echo "setup_llama: $made is ready" >&2; exit 0; }
command -v cmake >/dev/null || fail "cmake is missing; install it"
part="$(mktemp -d)"
trap 'rm -rf "$part"' EXIT
"${PYTHON:-python3}" -m pip download -q --disable-pip-version-check --no-deps --no-binary :all: --dest "$part" \
  "llama-cpp-python==$version" || fail "fetching llama-cpp-python $version failed; pip's message is above"
tar -xzf "$part"/llama_cpp_python-*.tar.gz -C "$part"
build="$part/build"
cmake -S "$part"/llama_cpp_python-*/vendor/llama.cpp -B "$build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF >"$part/log" 2>&1 ||
  { tail -n 20 "$part/log" >&2; fail "cmake failed; its last lines are above"; }
cmake --build "$build" --target llama-server llama-quantize -j "$(nproc 2>/dev/null || echo 2)" >"$part/log" 2>&1 ||
  { tail -n 20 "$part/log" >&2; fail "building failed; its last lines are above"; }
mkdir -p "$made"
cp "$build"/bin/llama-server "$build"/bin/llama-quantize "$made"
echo "$version" >"$made/version"
