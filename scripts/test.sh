#!/usr/bin/env bash
# Checks everything: scripts/test.sh [--fast] [pytest arguments]
# Lint and types once, then the tests on both stacks, those marked one_stack on the current one. --fast or
# LLAVA_VLORA_FAST=1 leaves out slow tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=${LLAVA_VLORA_FAST:-0}
if [ "${1:-}" = --fast ]; then
    fast=1
    shift
fi
# Work stealing gives each worker a block of tests, so that fixtures of a module are made once.
pytest_args=(-q -p no:cacheprovider -n 2 --dist worksteal --durations=12)
marks="not one_stack"
if [ "$fast" = 1 ]; then
    pytest_args+=(-m "not slow")
    marks="$marks and not slow"
fi

# Two workers on two cores: more threads each would only fight.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg
failed=()
check() {
    local title=$1
    shift
    echo "== $title"
    "$@" || failed+=("$title")
}

bash scripts/setup.sh current || exit 1
bash scripts/setup.sh pinned || exit 1
check "ruff check" .venv/bin/ruff check .
check "ruff format" .venv/bin/ruff format --check .
check "mypy" .venv/bin/mypy
check "tests, pinned stack" .venv-pinned/bin/python -m pytest "${pytest_args[@]}" -m "$marks" "$@" \
    </dev/null
check "tests, current stack" .venv/bin/python -m pytest "${pytest_args[@]}" "$@" </dev/null
# A report to read, not a test: times on a shared machine say little, and nothing is asserted.
if [ "$fast" != 1 ]; then
    check "training steps, a report" .venv/bin/llava-vlora bench train --rounds 2 --out runs/ci </dev/null
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
