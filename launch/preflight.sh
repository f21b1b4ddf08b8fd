#!/usr/bin/env bash
# Would a run start here? On every host, before the run; seconds instead of a night in a queue.
#   bash launch/preflight.sh --config=configs/stage3_instruct.py:hovle_2b --workdir=/bucket/runs/a \
#     --topology=v5e:4x4 [--slices=N] [--dry-run] [--coordinator=HOST:PORT --processes=N --process=I] \
#     [--config.KEY=VALUE ...]
# The state fits in memory (hovle plan --fast); hosts reach each other; the devices are those of
# the topology; what one host writes into the work directory the others read; tokenizer, data and
# what the run starts from open. Status 1 if one fails. Without --topology: whatever is here.
# On TPU VMs: bash launch/tpu_vm.sh v5e:4x4 -- bash launch/preflight.sh ...
set -euo pipefail
here=$(dirname "$0")
source "$here/run.sh"
planned=() more=() topology='' config='' workdir=''
for argument in "$@"; do
  case $argument in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --topology=* | --slices=*) planned+=("$argument") more+=("$argument") && topology=1 ;;
    --config=* | --config.*=*) config=1 planned+=("$argument") more+=("$argument") ;;
    --workdir=*) workdir=1 more+=("$argument") ;;
    --*=*) more+=("$argument") ;;
    *) fail "arguments are --NAME=VALUE, not $argument" ;;
  esac
done
[ "$config$workdir" = 11 ] || fail "--config and --workdir are needed"

status=0
if [ -n "$topology" ]; then
  # First, and in a process of its own, for two cannot hold a TPU.
  plan=$(mktemp)
  trap 'rm -f "$plan"' EXIT
  if run env JAX_PLATFORMS=cpu LIBTPU_INIT_ARGS= hovle plan --fast "${planned[@]}" --json="$plan"; then
    [ -n "$DRY_RUN" ] || python3 - "$plan" <<'PYTHON' || status=1
import json, sys
hbm = json.load(open(sys.argv[1]))["hbm"]
share = hbm["arguments"] / hbm["limit"]
print(f"memory  {'ok' if share < 1 else 'FAILED'}: the state takes {share:.0%} of a chip's")
sys.exit(share >= 1)
PYTHON
  else
    status=1
  fi
fi
run python3 "$here/preflight.py" "${more[@]}" || status=1
exit "$status"
