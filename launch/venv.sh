# Sourced by the other scripts: makes the virtual environment and installs this project with extras.
# shellcheck shell=bash

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

make_venv() { # EXTRA
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $PYTHON is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --editable ".[$1]"
}
