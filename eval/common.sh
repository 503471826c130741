# Shared by the recipes beside it; sourced, not run.
#
# What a recipe can be told through the environment:
#   DATA      LLaVA's folder of benchmarks (default: playground/data/eval)
#   OUT       where llava-vlora leaves answers and scores (default: runs/eval)
#   ANSWERS   answers are left below it too, at the places of LLaVA's scripts (default: DATA)
#   NAME      of the model in files (default: LLaVA's, the folder; checkpoint-N with the folder above)
#   GPUS      processes (default: the GPUs that PyTorch sees, so CUDA_VISIBLE_DEVICES chooses; without any the CPU)
#   LLAVA     source checkout of LLaVA, for the converters that its package lacks
#   DRY_RUN   1 prints the commands instead of running them
# Arguments behind the checkpoint are passed on to `llava-vlora eval`, as in `pope.sh checkpoints/my-vlora --bits 4`.

usage() {
    cat <<EOT
usage: bash eval/$(basename "$0") CHECKPOINT [flags of \`llava-vlora eval\`]
$(sed -n '2s/^# //p' "$0")
The environment may set DATA, OUT, ANSWERS, NAME, GPUS, LLAVA and DRY_RUN; eval/common.sh says what they mean.
EOT
}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    "" | -*)
        usage >&2
        exit 2
        ;;
esac

MODEL=$1
shift
FLAGS=(--conv-mode vicuna_v1 "$@") # as LLaVA's scripts ask; what is given later wins
DATA=${DATA:-playground/data/eval}
OUT=${OUT:-runs/eval}
ANSWERS=${ANSWERS:-$DATA}
LLAVA=${LLAVA:-}
if [[ -z ${NAME:-} ]]; then
    folder=${MODEL%/}
    if [[ -d $folder ]]; then folder=$(cd "$folder" && pwd); fi
    NAME=$(basename "$folder")
    if [[ $NAME == checkpoint-* ]]; then NAME=$(basename "$(dirname "$folder")")_$NAME; fi
fi

# CKPT, as in LLaVA's scripts, names files; blind answers have a name of their own.
CKPT=$NAME
PARTIAL=0
for flag in "$@"; do
    # argparse takes the beginning of a flag for the flag.
    case $flag in
        --model | --model=*) fail "the checkpoint is the first argument; leave $flag out" ;;
        --n*) fail "set NAME instead of $flag" ;;
        --da*) fail "set DATA instead of $flag" ;;
        --o*) fail "set OUT instead of $flag" ;;
        --be*) fail "this is a recipe for one benchmark; run \`llava-vlora eval\` for $flag" ;;
        --bl*) CKPT=$NAME.blind ;;
        --l*) PARTIAL=1 ;;
        cpu | --de*=cpu) GPUS=${GPUS:-1} ;;
    esac
done
GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}

run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# answer BENCHMARK FILE: answer and score; FILE is where LLaVA's script leaves the answers.
answer() {
    local launcher=(python)
    BENCHMARK=$1
    RESULTS=$2
    if ((GPUS > 1)); then launcher=(torchrun --standalone --nproc_per_node "$GPUS"); fi
    run mkdir -p "$(dirname "$RESULTS")" # a folder that cannot be written is found before hours of answers
    run "${launcher[@]}" -m llava_vlora eval --model "$MODEL" --name "$NAME" --benchmarks "$BENCHMARK" \
        --data "$DATA" --out "$OUT" "${FLAGS[@]}"
    if ((PARTIAL)); then
        echo "Answers to a part of the questions: $OUT/$BENCHMARK/$CKPT.jsonl; LLaVA's own programs want them all."
        exit 0
    fi
    run cp "$OUT/$BENCHMARK/$CKPT.jsonl" "$RESULTS"
    echo "Answers: $RESULTS"
}

# upload FILE: leave what a server or judge reads where LLaVA's converter does.
upload() {
    run mkdir -p "$(dirname "$1")"
    run cp "$OUT/$BENCHMARK/$CKPT.upload.json" "$1"
    echo "To submit: $1"
}

# scorer MODULE FLAGS...: a scorer of LLaVA's package.
scorer() {
    echo "LLaVA's own $1:"
    run python -m llava_vlora.run "$@"
}

# converter SCRIPT FLAGS...: a script of LLaVA's checkout.
converter() {
    if [[ -z $LLAVA ]]; then
        echo "Set LLAVA to a source checkout of LLaVA to run its scripts/$1 too."
        return
    fi
    [[ -f $LLAVA/scripts/$1 ]] || fail "there is no $LLAVA/scripts/$1; LLAVA must be a source checkout of LLaVA"
    echo "LLaVA's own scripts/$1:"
    run python "$LLAVA/scripts/$1" "${@:2}"
}

# table: MMBench's upload file of the answers to its own table SPLIT; llava-vlora writes one where openpyxl is installed.
table() {
    local folder=$ANSWERS/mmbench/answers_upload/$SPLIT ours=$OUT/$BENCHMARK/$CKPT.upload.xlsx
    run mkdir -p "$folder"
    if [[ -z $LLAVA && (-f $ours || ${DRY_RUN:-0} == 1) ]]; then
        run cp "$ours" "$folder/$CKPT.xlsx"
        echo "To submit: $folder/$CKPT.xlsx"
        return
    fi
    converter convert_mmbench_for_submission.py --annotation-file "$DATA/mmbench/$SPLIT.tsv" \
        --result-dir "$(dirname "$RESULTS")" --upload-dir "$folder" --experiment "$CKPT"
}

# tool FOLDER SCRIPT FLAGS...: a benchmark's own script, which works in its folder.
tool() {
    if [[ ! -f $1/$2 ]]; then
        echo "There is no $1/$2 to run too."
        return
    fi
    echo "The benchmark's own $2:"
    (cd "$1" && run python "${@:2}")
}
