# Shared by cpu_results.sh and gpu_results.sh; sourced, not run: pieces with a time limit each, going on after failures.
#
# What both can be told through the environment:
#   SHAPE    another shape, such as tiny, to try the script
#   RESULTS  where results go (default: docs/results), IMAGES  where figures go (default: docs/images)
#   PYTHON   default: .venv/bin/python, or the python on the PATH
#   PATIENCE multiplies the time limits, for a slow machine

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
RESULTS=${RESULTS:-docs/results}
IMAGES=${IMAGES:-docs/images}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
PATIENCE=${PATIENCE:-1}
FAILED=()
mkdir -p "$RESULTS" "$IMAGES"

# keep SECONDS NAME COMMAND...: run a benchmark for SECONDS at most; its JSON becomes RESULTS/NAME.json and its figure
# IMAGES/NAME.png.
keep() {
    local limit=$(($1 * PATIENCE)) name=$2 folder
    shift 2
    folder=$(mktemp -d)
    echo "== $name: $*"
    if timeout "$limit" "$PYTHON" -m llava_vlora "$@" --out "$folder" && cp "$folder"/*.json "$RESULTS/$name.json"; then
        cp "$folder"/*.png "$IMAGES/$name.png"
    else
        failed "$name" "$limit"
    fi
    rm -r "$folder"
}

# limited SECONDS NAME COMMAND...: run a command that writes its own result.
limited() {
    local limit=$(($1 * PATIENCE)) name=$2
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" || failed "$name" "$limit"
}

failed() {
    FAILED+=("$1")
    echo "$1 failed, or took more than $2 s" >&2
}

# run_pieces KNOWN CHOSEN...: call the function piece_NAME of each; all where none is chosen.
run_pieces() {
    local known=$1 piece
    shift
    for piece in "$@"; do
        case " $known " in
            *" $piece "*) ;;
            *)
                echo "$(basename "$0"): there is no piece '$piece'; choose from: $known" >&2
                exit 2
                ;;
        esac
    done
    for piece in ${*:-$known}; do
        "piece_$piece"
    done
    if [ ${#FAILED[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${FAILED[@]}" >&2
        exit 1
    fi
    echo "All results are in $RESULTS; scripts/update_readme.py takes them up."
}
