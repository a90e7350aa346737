#!/usr/bin/env bash
# Run all checks: format, lint, types, tests.
#
#   bash scripts/test.sh                 everything
#   bash scripts/test.sh tests/test_tree.py -k walk    pytest's own arguments
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$SDSAT_ROOT"
python -m pip install -q --disable-pip-version-check --root-user-action=ignore -r requirements-dev.txt ||
  sdsat_fail "installing requirements-dev.txt failed; pip's message is above"
ruff format --check .
ruff check .
mypy & types=$!  # beside the tests: alone it keeps one core busy
# What is compiled, and asserts as pytest rewrites them, is kept: else every process does it anew.
unset PYTHONDONTWRITEBYTECODE
# One process a core, one thread a process: many small models. Neighbours share a process, and with
# it what a module makes once; whoever is done takes over from the others.
OMP_NUM_THREADS=1 python -m pytest -q -n "$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)" --dist worksteal "$@"
wait "$types"
