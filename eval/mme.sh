#!/usr/bin/env bash
# MME: perception and cognition by llava-vlora, and by MME's own tool if it is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer mme "$ANSWERS/MME/answers/$CKPT.jsonl"
tool "$ANSWERS/MME" convert_answer_to_mme.py --experiment "$CKPT"
tool "$ANSWERS/MME/eval_tool" calculation.py --results_dir "answers/$CKPT"
