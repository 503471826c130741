#!/usr/bin/env bash
# GQA, test-dev balanced: accuracy by llava-vlora, and by GQA's eval.py if it is there and LLAVA is set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer gqa "$ANSWERS/gqa/answers/llava_gqa_testdev_balanced/$CKPT/merge.jsonl"
run mkdir -p "$ANSWERS/gqa/data"
converter convert_gqa_for_eval.py --src "$RESULTS" --dst "$ANSWERS/gqa/data/testdev_balanced_predictions.json"
if [[ -n $LLAVA ]]; then tool "$ANSWERS/gqa/data" eval/eval.py --tier testdev_balanced; fi # reads what was converted
