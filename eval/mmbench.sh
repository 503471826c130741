#!/usr/bin/env bash
# MMBench dev, English: circular accuracy by llava-vlora, and a table for the server.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT=mmbench_dev_20230712
answer mmbench "$ANSWERS/mmbench/answers/$SPLIT/$CKPT.jsonl"
table
