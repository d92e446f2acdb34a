#!/usr/bin/env bash
# Install into a virtual environment, on request in pinned versions. `make` calls it, and setup.sh.
#
#   LOCK= PIP_ARGS= .ci/install.sh VENV PINS WORDS...
#
# WORDS are what pip shall install. With LOCK=1 pip installs nothing in another version than the file PINS says, which
# `make lock` writes. Its first line says for which machines; on others, and where pip does not find a pinned version,
# pip chooses the newest versions that pyproject.toml allows, as it does without LOCK.
set -euo pipefail
venv=$1 pins=$2
shift 2

say() { echo "setup: $*" >&2; }
install() {
    # shellcheck disable=SC2086  # PIP_ARGS is a list of words
    "$venv/bin/python" -m pip install --progress-bar off --disable-pip-version-check ${PIP_ARGS:-} "$@" \
        </dev/null >>"$venv/setup.log" 2>&1
}

rm -f "$venv"/.setup* "$venv/setup.log"
case ${LOCK:-} in
"" | 0) ;;
1)
    here=$("$venv/bin/python" -c 'import platform as p; print(".".join(p.python_version_tuple()[:2]), p.system(), p.machine())')
    here="Python $here"
    read -r _ there <"$pins" 2>/dev/null || there=
    if [ "$here" != "$there" ]; then
        say "$pins has no versions for this environment ($here): pip chooses the newest that pyproject.toml allows."
    elif install --constraint "$pins" "$@"; then
        exit
    else
        say "pip cannot install the versions of $pins ($venv/setup.log says why): it chooses the newest that" \
            "pyproject.toml allows."
    fi
    ;;
*)
    say "LOCK is '$LOCK': give 1 for the versions of $pins, or nothing."
    exit 1
    ;;
esac
install "$@" || {
    tail -n 20 "$venv/setup.log" >&2
    say "pip failed; all of its output is in $venv/setup.log."
    exit 1
}
