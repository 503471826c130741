#!/usr/bin/env bash
# VQAv2, test-dev: a file for the server.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT=llava_vqav2_mscoco_test-dev2015
answer vqav2 "$ANSWERS/vqav2/answers/$SPLIT/$CKPT/merge.jsonl"
upload "$ANSWERS/vqav2/answers_upload/$SPLIT/$CKPT.json"
