#!/usr/bin/env bash
# Everything a change must pass: format, lint, types, tests. Arguments go to pytest.
#   bash launch/test.sh [-m slow]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
make_venv test
"$VENV/bin/ruff" format --check .
"$VENV/bin/ruff" check .
"$VENV/bin/mypy" hovle_jax
"$VENV/bin/python" -m pytest "$@"
