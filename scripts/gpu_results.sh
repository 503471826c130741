#!/usr/bin/env bash
# Everything that needs a GPU, on one of 80 GB or more, in under 9 minutes:
# scripts/gpu_results.sh [bench train flash bits sparse tests]
# Without names all pieces; each has its own time limit, and the others go on where one fails. DEVICE=cpu SHAPE=tiny tries
# the script without a GPU. What can be set besides: see scripts/pieces.sh.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pieces.sh"

DEVICE=${DEVICE:-cuda}
SHAPE=${SHAPE:-7b}
export DEVICE
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_results.sh: PyTorch finds no GPU here; DEVICE=cpu SHAPE=tiny tries the script without one" >&2
    exit 2
fi
ON="gpu"
[ "$DEVICE" = cuda ] || ON="$DEVICE"

piece_bench() {
    keep 130 "bench-$SHAPE-$ON-bfloat16" bench --shape "$SHAPE" --dtype bfloat16 --rounds 5 --steps 16 --device "$DEVICE"
}
piece_train() {
    keep 130 "bench-train-$SHAPE-$ON-bfloat16" bench train --shape "$SHAPE" --rounds 3 --batch 4 \
        --stages pretrain,finetune,frozen --device "$DEVICE"
}
piece_flash() {
    limited 60 "$ON-flash" "$PYTHON" scripts/gpu_checks.py flash --shape "$SHAPE" --device "$DEVICE" \
        --out "$RESULTS/$ON-flash.json"
}
piece_bits() {
    local bits
    for bits in 8 4; do
        keep 50 "bench-$SHAPE-$ON-${bits}bit" bench --shape "$SHAPE" --bits "$bits" --rounds 3 --steps 8 --batch 1 \
            --parts first,decode,memory --device "$DEVICE"
        rm -f "$IMAGES/bench-$SHAPE-$ON-${bits}bit.png"
    done
}
piece_sparse() {
    limited 40 "$ON-sparse" "$PYTHON" scripts/gpu_checks.py sparse --shape "$SHAPE" --device "$DEVICE" \
        --out "$RESULTS/$ON-sparse.json"
}
piece_tests() {
    limited 75 "$ON-tests" "$PYTHON" scripts/gpu_checks.py tests --device "$DEVICE" --out "$RESULTS/$ON-tests.json"
}

run_pieces "bench train flash bits sparse tests" "$@"
