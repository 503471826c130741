#!/usr/bin/env bash
# The committed results of a CPU, one after the other: scripts/cpu_results.sh [1b repeat 7b train bits8 bits4 cost]
# Without names all of them, some 2 hours on two cores. Nothing else may run on the machine: the times are committed.
# What can be set besides: see scripts/pieces.sh.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"

SMALL=${SHAPE:-1b}
LARGE=${SHAPE:-7b}
ON_CPU=(--device cpu)

piece_1b() {
    keep 5400 "bench-$SMALL-cpu" bench --shape "$SMALL" --rounds 3 --steps 8 "${ON_CPU[@]}"
}
piece_repeat() {
    keep 3600 "bench-$SMALL-cpu-repeat" bench --shape "$SMALL" --rounds 8 --steps 16 --batch 1 \
        --parts prefill,first,decode "${ON_CPU[@]}"
}
piece_7b() {
    keep 5400 "bench-$LARGE-cpu-bfloat16" bench --shape "$LARGE" --dtype bfloat16 --rounds 2 --steps 4 --batch 1 \
        --parts prefill,first,decode,image,memory "${ON_CPU[@]}"
}
piece_train() {
    keep 5400 "bench-train-$SMALL-cpu-bfloat16" bench train --shape "$SMALL" --rounds 3 \
        --stages pretrain,finetune,frozen "${ON_CPU[@]}"
}
bits() {
    keep 3600 "bench-$SMALL-cpu-$1bit" bench --shape "$SMALL" --bits "$1" --rounds 2 --steps 2 --batch 1 \
        --parts decode,memory "${ON_CPU[@]}"
    rm -f "$IMAGES/bench-$SMALL-cpu-$1bit.png" # a table says it all
}
piece_bits8() { bits 8; }
piece_bits4() { bits 4; }
piece_cost() {
    limited 300 cost "$PYTHON" -m llava_vlora cost --answer-tokens 100 --paper \
        --json "$RESULTS/cost-7b.json" --figure "$IMAGES/cost-figure4.png"
}

run_pieces "1b repeat 7b train bits8 bits4 cost" "$@"
