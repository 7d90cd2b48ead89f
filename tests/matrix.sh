#!/usr/bin/env bash
# The test suite under pairs of torch and Python, each in an environment of its own that is deleted afterwards.
#
#   tests/matrix.sh 2.6:3.10:lowest 2.14:3.13     # these pairs; their rows in benchmarks/results/matrix.md are replaced
#   tests/matrix.sh --has 3.10                    # whether there is such a Python
#   tests/matrix.sh --part 2.6:3.10:lowest        # a part of the suite, which takes minutes; writes no row
#
# A pair is TORCH:PYTHON, and TORCH:PYTHON:lowest for the lower bounds in pyproject.toml of everything else, too. An
# environment takes 6 GB and minutes to install. Settings: JOBS (test processes), ENVIRONMENTS (the folder for them, which
# stays, with what pytest printed; without it, a temporary one that does not), INSTALL_SECONDS (after which an installation
# has failed), ARGS (handed on to pytest).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

JOBS=${JOBS:-2}
INSTALL_SECONDS=${INSTALL_SECONDS:-1800}
RESULTS=benchmarks/results/matrix.md
# Both front ends, every op, rewrites, files, and modules of the original class.
PART="tests/ir/test_export.py tests/ir/test_captured.py tests/ir/test_patches.py tests/ir/test_python.py tests/rules
    tests/properties/test_networks.py tests/passes/test_prune_graph.py tests/test_io.py tests/test_write_back.py
    tests/test_write_back_classes.py"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

usage() {
    sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed 1d >&2
    exit 2
}

interpreter() {  # of a version: on the path, or where pyenv keeps it
    local candidate
    for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        if "$candidate" -c "" 2>/dev/null; then echo "$candidate" && return; fi
    done
    echo "no Python $1 here" >&2
    return 1
}

constraints() {  # lower bounds of pyproject.toml as pins, with `lowest`; and what pip cannot know of torch
    local torch=$1 lowest=$2
    if [ "$lowest" = lowest ]; then
        grep -oE '"[A-Za-z0-9_.-]+(\[[a-z]+\])?>=[0-9.]+' pyproject.toml | tr -d '"' | grep -vE '^(torch|torchvision|hatchling|ruff|pyright)\b' |
            sed -E 's/\[[a-z]+\]//; s/>=/==/' | sort -u
    fi
    case $torch in  # torchao names no version of torch, and fails to be imported by older ones
        2.6*) echo "torchao<0.13" ;;
        2.7* | 2.8*) echo "torchao<0.15" ;;
    esac
}

install() {  # of a pair into a folder; an error says what failed, and leaves nothing behind
    local torch=$1 python=$2 lowest=$3 folder=$4 rc=0
    rm -rf "$folder"
    "$(interpreter "$python")" -m venv "$folder" || return
    constraints "$torch" "$lowest" >"$folder/constraints.txt"
    timeout --foreground "$INSTALL_SECONDS" "$folder/bin/python" -m pip install -q --no-compile "torch==$torch.*" torchvision \
        -c "$folder/constraints.txt" -e ".[test]" || rc=$?
    if [ $rc -ne 0 ]; then
        rm -rf "$folder"
        if [ $rc -eq 124 ]; then echo "pip was stopped after $INSTALL_SECONDS s (INSTALL_SECONDS)" >&2; fi
        echo "torch $torch could not be installed for Python $python; no test was run with it" >&2
    fi
    return $rc
}

run_pair() {  # called where "set -e" does not act
    local pair=$1 torch python lowest folder log started rc=0
    IFS=: read -r torch python lowest <<<"$pair"
    folder="$ENVIRONMENTS/torch-$torch-python-$python" log="$ENVIRONMENTS/${pair//:/-}.log"
    install "$torch" "$python" "${lowest:-}" "$folder" || return
    started=$SECONDS
    # Bytecode of torch is kept for the many processes that the tests start, wherever the caller stands on that.
    # shellcheck disable=SC2086
    env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX="$folder/bytecode" PYTHONPATH="$PWD" "$folder/bin/python" -m pytest -n "$JOBS" -m "not slow" -q -p no:cacheprovider --show-capture=no ${ARGS:-} $selected \
        2>&1 | tee "$log" || rc=$?
    if [ -z "$selected" ]; then
        "$folder/bin/python" tests/matrix_row.py "$RESULTS" "$log" "${lowest:-newest}" $((SECONDS - started))
    fi
    rm -rf "$folder"
    return $rc
}

if [ "${1:-}" = --has ]; then interpreter "$2" >/dev/null && exit 0 || exit 1; fi
selected=""
if [ "${1:-}" = --part ]; then selected=$PART && shift; fi
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then usage; fi
if [ -z "${ENVIRONMENTS:-}" ]; then
    ENVIRONMENTS=$(mktemp -d)
    trap 'rm -rf "$ENVIRONMENTS"' EXIT
    trap 'exit 130' INT TERM
fi
failed=0
for pair in "$@"; do run_pair "$pair" || failed=1; done
exit $failed
