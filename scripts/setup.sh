#!/usr/bin/env bash
# Makes the project's environment: scripts/setup.sh [current|pinned|demo]
#   current -> .venv          recent transformers
#   pinned  -> .venv-pinned   the transformers release that LLaVA's requirements name
#   demo    -> .venv          what the demo needs of current, which completes it
# PYTHON=/path/to/python chooses the interpreter (3.10 to 3.12). A second run returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=${1:-current}
case $stack in
    current) venv=.venv extras=llava,lora,quant,serve,deepspeed,track,bench,dev ;;
    pinned) venv=.venv-pinned extras=llava,lora,serve,deepspeed,track,bench,dev ;;
    demo) venv=.venv extras= ;;
    *) echo "setup: unknown stack '$stack'; choose current, pinned or demo" >&2; exit 2 ;;
esac
constraints=scripts/constraints-${stack/demo/current}.txt
llava=llava-torch==1.2.2.post1
log=$venv/setup.log

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.11 python3.10 python3.12 python3; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
            >/dev/null 2>&1; then
            echo "$name"
            return
        fi
        if [ -n "${PYTHON:-}" ]; then break; fi
    done
    echo "setup: needs Python 3.10, 3.11 or 3.12${PYTHON:+ (PYTHON=$PYTHON is not one)};" \
        "install one or set PYTHON=/path/to/python" >&2
    return 1
}

step() {
    local title=$1
    shift
    echo "setup $stack: $title"
    if ! "$@" >>"$log" 2>&1; then
        tail -n 25 "$log" >&2
        echo "setup $stack: FAILED while: $title (whole log: $log)" >&2
        exit 1
    fi
}

python=$(find_python)
# The folder belongs to the stamp because an environment does not survive a move.
stamp=$( (pwd; "$python" -VV
    cat "$constraints" setup.cfg pyproject.toml scripts/setup.sh scripts/lmms-eval.txt \
        scripts/scikit-learn.txt) |
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
is() { [ "$(cat "$venv/$1" 2>/dev/null)" = "$stamp" ]; }
if is setup.stamp || { [ "$stack" = demo ] && is demo.stamp; }; then
    echo "setup $stack: $venv is up to date"
    exit 0
fi

# A demo's environment is completed. Without its stamp, so that one that is broken off is made anew.
if is demo.stamp; then
    rm "$venv/demo.stamp"
else
    rm -rf "$venv"
    mkdir -p "$venv"
fi
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input -c "$constraints")
step "make $venv with $("$python" --version)" "$python" -m venv "$venv"
step "install torch" "${pip[@]}" torch==2.13.0
step "install llava-vlora and its dependencies" "${pip[@]}" -e ".${extras:+[$extras]}"
step "install $llava without its pins" "${pip[@]}" --no-deps "$llava"
if [ "$stack" = demo ]; then
    echo "$stamp" >"$venv/demo.stamp"
    echo "setup demo: done; scripts/setup.sh completes it"
    exit 0
fi
# In folders of their own, for their tests alone: transformers imports datasets and scikit-learn where it finds
# them, in every process.
beside=(scikit-learn)
if [ "$stack" = current ]; then beside+=(lmms-eval); fi
for name in "${beside[@]}"; do
    step "install $name beside" "${pip[@]}" --no-deps --target "$venv/$name" -r "scripts/$name.txt"
done
echo "$stamp" >"$venv/setup.stamp"
echo "setup $stack: done, use $venv/bin/llava-vlora"
