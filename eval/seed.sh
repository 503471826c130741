#!/usr/bin/env bash
# SEED-Bench: accuracy by llava-vlora, and by LLaVA's own script if LLAVA is set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer seed "$ANSWERS/seed_bench/answers/$CKPT/merge.jsonl"
run mkdir -p "$ANSWERS/seed_bench/answers_upload"
converter convert_seed_for_submission.py \
    --annotation-file "$DATA/seed_bench/SEED-Bench.json" \
    --result-file "$RESULTS" \
    --result-upload-file "$ANSWERS/seed_bench/answers_upload/$CKPT.jsonl" ||
    fail "LLaVA's script has failed (see above); it does so where all answers of one type of question are wrong"
