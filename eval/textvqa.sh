#!/usr/bin/env bash
# TextVQA, OCR tokens in the prompt: soft accuracy by llava-vlora and by LLaVA's own scorer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer textvqa "$ANSWERS/textvqa/answers/$CKPT.jsonl"
scorer llava.eval.eval_textvqa \
    --annotation-file "$DATA/textvqa/TextVQA_0.5.1_val.json" \
    --result-file "$RESULTS"
