#!/usr/bin/env bash
# ScienceQA, test split: accuracy, with and without images, by llava-vlora and by LLaVA's own scorer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer scienceqa "$ANSWERS/scienceqa/answers/$CKPT.jsonl"
scorer llava.eval.eval_science_qa \
    --base-dir "$DATA/scienceqa" \
    --result-file "$RESULTS" \
    --output-file "${RESULTS%.jsonl}_output.jsonl" \
    --output-result "${RESULTS%.jsonl}_result.json"
