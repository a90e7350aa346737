#!/usr/bin/env bash
# Make an environment that can run sdsat, or reuse one. The other scripts source it. An interrupted one goes on where it was.
#
#   bash scripts/setup.sh        make .venv, or complete the active environment if it has a CUDA torch >= 2.11
#   PYTHON=python3.12 ...        the interpreter to make .venv with (default python3)

SDSAT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

sdsat_fail() { echo "setup: $1" >&2; exit 2; }

# True if the interpreter $1 has a torch >= 2.11 that was built for CUDA.
sdsat_has_cuda_torch() {
  "$1" - 2>/dev/null <<'PY'
import sys
from importlib import metadata
if metadata.version("torch").endswith("+cpu"):
    sys.exit(1)  # known without seconds of importing it
import torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
sys.exit(0 if torch.version.cuda and torch.cuda.is_available() and version >= (2, 11) else 1)
PY
}

# True if the interpreter $1 has an environment of its own, with pip. Takes away what says that a package is there which was left
# half-installed, so that pip installs it again: INSTALLER is written after a package's files, METADATA maybe before.
sdsat_has_pip() {
  "$1" -I - >/dev/null 2>&1 <<'PY'
import shutil, sys, sysconfig
from pathlib import Path
if sys.prefix == sys.base_prefix:
    sys.exit(1)  # what pip did there would change the base
packages = set(Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
half = {each for each in packages if not (each / "INSTALLER").is_file()}
for each in half:
    shutil.rmtree(each)
sys.exit(0 if any(each.name.startswith("pip-") for each in packages - half) else 1)
PY
}

# Have pip install "${@:2}", and keep in the file $1 what it says.
sdsat_install() {
  "$python" "$SDSAT_ROOT/scripts/install.py" "$@" && return
  [ $? != 130 ] || exit 130  # interrupted
  sdsat_fail "installing ${*:2} failed; pip's errors are above, and all that it said is in $1"
}

sdsat_setup() {
  local python="${PYTHON:-python3}" requirements="$SDSAT_ROOT/requirements.txt" bin stamp wanted said
  command -v "$python" >/dev/null || sdsat_fail "no $python on PATH; install Python 3.10 or later, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    sdsat_fail "$("$python" --version 2>&1) is too old; install Python 3.10 or later, or set PYTHON"
  wanted="$(cat "$SDSAT_ROOT"/requirements*.txt "$SDSAT_ROOT/pyproject.toml" | cksum) $SDSAT_ROOT"
  if sdsat_has_cuda_torch "$python"; then
    bin="$(dirname "$(command -v "$python")")"
    stamp="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/sdsat-setup"
  else
    bin="$SDSAT_ROOT/.venv/bin"
    stamp="$SDSAT_ROOT/.venv/sdsat-setup"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] && ! sdsat_has_pip "$bin/python"; then  # absent, or left half-made
      echo "setup: making $SDSAT_ROOT/.venv" >&2
      said="$("$python" -m venv --clear "$SDSAT_ROOT/.venv" 2>&1)" || sdsat_fail "$python -m venv failed; install python3-venv: $said"
    fi
    python="$bin/python"
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing packages into $(dirname "$bin"), once; what pip says is in $stamp.log" >&2
    : >"$stamp.log" || sdsat_fail "$stamp.log cannot be written"
    if sdsat_has_cuda_torch "$python"; then
      requirements="$(mktemp)"
      # The torch, and a transformers in range, that are already there stay as they are.
      grep -v '^torch==' "$SDSAT_ROOT/requirements.txt" | sed 's/==\([^ ]*\)/>=0/; s/^transformers>=0/transformers>=5.16.1,<5.20/' >"$requirements"
    fi
    sdsat_install "$stamp.log" -r "$requirements"
    sdsat_install "$stamp.log" --no-deps -e "$SDSAT_ROOT"
    echo "$wanted" >"$stamp" || sdsat_fail "$stamp cannot be written"
  fi
  export PATH="$bin:$PATH" TOKENIZERS_PARALLELISM=false
}

sdsat_setup
