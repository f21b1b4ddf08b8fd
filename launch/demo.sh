#!/usr/bin/env bash
# A fresh machine to trained model and report: .venv, install, the three stages on real digits.
#   bash launch/demo.sh [--out DIR] [--seed N] [--ablations]
# PYTHON names the interpreter (default python3, 3.11 or later), VENV the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
make_venv demo
exec "$VENV/bin/hovle" demo "$@"
