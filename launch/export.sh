#!/usr/bin/env bash
# A work directory (or model directory) as a Hugging Face directory, and proof that it is the same.
#   bash launch/export.sh WORKDIR OUT [--dry-run] [CASE.npz ...] [-- OPTIONS of hovle export]
# Export and its own comparison (OUT/verification.json); where torch and transformers are
# installed, OUT in PyTorch against WORKDIR (OUT.live.json); recorded outputs if any are given
# (OUT.cases.json). Status 1 if one differs. For the released tokenizer: -- --assets HF_DIR.
set -euo pipefail
source "$(dirname "$0")/run.sh"
paths=() options=()
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --) options=("${@:2}") && break ;;
    -*) fail "unknown argument $1" ;;
    *) paths+=("$1") ;;
  esac
  shift
done
[ ${#paths[@]} -ge 2 ] || fail "WORKDIR and OUT are needed"
workdir=${paths[0]} out=${paths[1]} cases=("${paths[@]:2}")

if [ -e "$out/verification.json" ]; then
  echo "$out: exported before" >&2
else
  run hovle export "$workdir" "$out" --verify "${options[@]}"
fi
status=0
if python3 -c 'import torch, transformers' 2>/dev/null; then
  run hovle verify "$workdir" --live "$out" --json "$out.live.json" || status=1
else
  echo "no torch and transformers here: not compared in PyTorch" >&2
fi
if [ ${#cases[@]} -gt 0 ]; then
  run hovle verify "$out" "${cases[@]}" --json "$out.cases.json" || status=1
fi
exit "$status"
