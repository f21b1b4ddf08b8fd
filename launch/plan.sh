#!/usr/bin/env bash
# Plans of every topology x model x stage that OUT has not yet, one JSON file each; no TPU needed.
#   bash launch/plan.sh OUT [--dry-run] [--fast | --search] [--config.KEY=VALUE ...]
# TOPOLOGIES, MODELS, STAGES: lists, instead of those below; "v5e:16x16*2" is two slices.
# Rows of 4,096 tokens, half of them of images (8,192 for hovle_hd, 13 tiles), and the settings
# found best; --config.* come after them. ROWS: per device, the batch grows with the topology.
# Two to six minutes of one core and 2 GB a plan, --search an hour. What does not compile leaves its
# reason in OUT/*.failed, is tried again next time, and makes the status 1.
set -euo pipefail
set -f # v5e:16x16*2 is no file pattern
source "$(dirname "$0")/run.sh"
out='' more=()
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --fast | --search | --config.*=*) more+=("$1") ;;
    -*) fail "unknown argument $1" ;;
    *) out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || fail "where to?"
topologies="v5e:4x4 v5e:16x16 v5e:16x16*2 v5p:4x4x4 v5p:4x4x8 v6e:4x4 v6e:16x16 tpu7x:4x4x4"

settings() { # TOPOLOGY MODEL: sets tokens, tiles, remat, chunk, rows
  tokens=4096 tiles=8 remat=products chunk=4096 rows=1
  case $1 in
    v6e:*) remat=mixed ;; # its matrix units outrun its memory: less to read is faster
    v5p:*) rows=2 ;;      # it has the memory; a layer takes 1 % less a row than with one
  esac
  case $2 in hovle_hd) tokens=8192 tiles=13 rows=1 ;; esac
  case $1$2 in v5e:*hovle_hd) remat=mixed ;; esac # `products` needs 27 GiB
}

plan() { # TOPOLOGY MODEL STAGE
  local target=${1%\**} slices=1 config total chips devices file tokens tiles remat chunk rows
  settings "$1" "$2"
  [ "$target" = "$1" ] || slices=${1##*\*}
  case $3 in
    1) config=configs/stage1_distill.py total=$((122000 * 512 * 4120)) ;;
    2) config=configs/stage2_align.py total=$((24000 * 512 * 8192)) ;;
    3) config=configs/stage3_instruct.py total=$((7000 * 256 * 8192)) ;;
    *) fail "STAGES: no stage $3" ;;
  esac
  chips=${target#*:}
  devices=$((slices * ${chips//x/*}))
  case $target in tpu7x:*) devices=$((2 * devices)) ;; esac
  file=$out/$2-stage$3-${target/:/-}x$slices
  rows=$((${ROWS:-$rows} * devices))
  local command=(hovle plan "--config=$config:$2" "--topology=$target" "--slices=$slices"
    "--config.data.rows=$rows" "--config.data.tokens=$tokens"
    "--config.steps=$((total / (rows * tokens)))" # all tokens of the config, whatever the batch
    "--config.data.tiles=$tiles" "--config.model.remat=$remat" "--config.model.loss_chunk=$chunk"
    "${more[@]}" "--json=$file.part")
  # Written beside and moved: a plan that was killed is not a plan, nor one of another command.
  if [ -s "$file.json" ] && [ "$(cat "$file.command" 2>/dev/null)" = "${command[*]}" ]; then
    return
  elif [ -n "$DRY_RUN" ]; then
    run "${command[@]}"
  elif "${command[@]}" 2>"$file.failed"; then
    mv "$file.part" "$file.json"
    echo "${command[*]}" >"$file.command"
    rm "$file.failed"
  else
    failed=1
    tail -n 1 "$file.failed" >&2
  fi
}

failed=0
[ -n "$DRY_RUN" ] || mkdir -p "$out"
for topology in ${TOPOLOGIES:-$topologies}; do
  for model in ${MODELS:-hovle_2b hovle_hd}; do
    for stage in ${STAGES:-1 2 3}; do plan "$topology" "$model" "$stage"; done
  done
done
run hovle plan --tabulate "$out"
exit "$failed"
