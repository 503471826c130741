#!/usr/bin/env bash
# VizWiz, test split: a file for the server.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer vizwiz "$ANSWERS/vizwiz/answers/$CKPT.jsonl"
upload "$ANSWERS/vizwiz/answers_upload/$CKPT.json"
