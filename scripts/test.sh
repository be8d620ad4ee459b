#!/usr/bin/env bash
# Everything that must hold: style, types, who imports whom, tests. Stops at the first step that
# fails; the last line is pytest's own.
#
#   ./scripts/test.sh                    all of it
#   ./scripts/test.sh tests/test_cli.py  the same checks, with arguments for pytest
#
# Makes or reuses .venv; PYTHON names the interpreter to make it with.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
. scripts/venv.sh

prepare_venv dev,quickstart,lm-eval
export HF_HUB_OFFLINE=1

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/pytest "$@"
