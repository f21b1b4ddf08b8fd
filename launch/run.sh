# Sourced by the other scripts: --help, --dry-run, settings from a file.
# shellcheck shell=bash disable=SC2034

DRY_RUN=

usage() { # prints the comment at the top of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

fail() { # MESSAGE: bad usage
  echo "$(basename "$0"): $1; --help says how" >&2
  exit 2
}

need() { # NAME...: variables that must be set
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || fail "$name is not set"
  done
}

run() { # COMMAND...: runs it, or prints it under --dry-run
  if [ -n "$DRY_RUN" ]; then
    printf '%s\n' "$(printf '%q ' "$@")" # at once: several may print
  else
    "$@"
  fi
}

load() { # FILE: of NAME=value, taken as docker --env-file takes it; what is set already stays
  local line name
  while IFS= read -r line || [ -n "$line" ]; do
    case $line in '' | '#'*) continue ;; esac
    name=${line%%=*}
    [ -n "${!name:-}" ] || export "${line?}"
  done <"$1"
}
