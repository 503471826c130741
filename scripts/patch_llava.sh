#!/usr/bin/env bash
# Makes a LLaVA source tree load plugins by itself: scripts/patch_llava.sh apply|revert|check [DIR]
# DIR is LLaVA's checkout, or the folder that holds the package llava; default: this folder if it is a checkout,
# else where the current python finds llava. PYTHON=/path/to/python chooses another python. See docs/patches.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for python in ${PYTHON:+"$PYTHON"} python python3; do
    if command -v "$python" >/dev/null; then exec "$python" "$here/patch_llava.py" "$@"; fi
done
echo "patch_llava: there is no python; set PYTHON=/path/to/python" >&2
exit 2
