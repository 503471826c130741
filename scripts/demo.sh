#!/usr/bin/env bash
# Sets up what the demo needs and runs it; arguments go to `llava-vlora demo`. scripts/test.sh completes the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh demo
exec .venv/bin/llava-vlora demo "$@"
