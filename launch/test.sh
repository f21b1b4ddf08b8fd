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
# A process per core; tests of a file share what they set up.
"$VENV/bin/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
