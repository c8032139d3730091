#!/usr/bin/env bash
# Measures everything that needs a GPU, most valuable first, in limited time (docs/gpu.md). Needs no installation.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
