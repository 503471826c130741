#!/usr/bin/env bash
# MM-Vet: a file for its notebook, which asks GPT-4.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer mm-vet "$ANSWERS/mm-vet/answers/$CKPT.jsonl"
upload "$ANSWERS/mm-vet/results/$CKPT.json"
