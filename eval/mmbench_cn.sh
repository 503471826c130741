#!/usr/bin/env bash
# MMBench dev, Chinese: circular accuracy by llava-vlora, and a table for the server.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT=mmbench_dev_cn_20231003
# Below mmbench/, as in LLaVA's docs/Evaluation.md; its script has mmbench_cn/.
answer mmbench-cn "$ANSWERS/mmbench/answers/$SPLIT/$CKPT.jsonl"
table
