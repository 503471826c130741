#!/usr/bin/env bash
# POPE: F1 by llava-vlora (mean of the splits) and by LLaVA's own scorer (each split).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer pope "$ANSWERS/pope/answers/$CKPT.jsonl"
scorer llava.eval.eval_pope \
    --annotation-dir "$DATA/pope/coco" \
    --question-file "$DATA/pope/llava_pope_test.jsonl" \
    --result-file "$RESULTS" ||
    fail "LLaVA's scorer has failed (see above); it divides by zero where the model finds nothing that is there"
