#!/usr/bin/env bash
# Sets up the current stack and runs the demo; arguments go to `llava-vlora demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh current
exec .venv/bin/llava-vlora demo "$@"
