#!/usr/bin/env bash
# Stages I, II and III, one after the other; the same command again goes on where it stopped.
#   bash launch/stages.sh [--dry-run] [--retries N] [--config.KEY=VALUE ...]
# Settings, from the environment or the files named by SETTINGS (launch/example.env says what each
# is): RUNS TOKENIZER LLM TEACHER IMAGES ALIGN INSTRUCT; optional: MODEL, INDEX, ARGS1, ARGS2, ARGS3,
# TEXT (stage I: in place of random tokens), CONFIGS (their directory), STAGES ("1 2 3"; one of your
# own by its config, "1 2 2_late 3" for CONFIGS/stage2_late.py with ARGS2_late), CONNECT
# (--coordinator HOST:PORT --processes N --process I, where hosts do not find each other).
# A stage that ended with status 75 has saved a checkpoint and is run again, up to N times (100).
# SIGTERM is passed on, and this script then ends with 75, too. Other statuses are the stage's own.
set -euo pipefail
source "$(dirname "$0")/run.sh"
retries=100 overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --retries) retries=${2:?--retries N} && shift ;;
    --config.*=*) overrides+=("$1") ;;
    *) fail "unknown argument $1" ;;
  esac
  shift
done
for file in ${SETTINGS:-}; do load "$file"; done
need RUNS TOKENIZER
if [ -n "${INDEX:-}" ]; then # lengths are looked up at random, which no mounted bucket is made for
  run cp -rT "$INDEX" /dev/shm/hovle-index
  overrides+=(--config.data.index=/dev/shm/hovle-index)
fi
read -ra connect <<<"${CONNECT:-}"

stopped='' child='' previous=''
stop() {
  stopped=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

await() { status=0 && wait "$child" || status=$?; }

train() { # STAGE CONFIG ARGUMENT...: one stage, unless the same command has finished before
  local stage=$1 config=${CONFIGS:-configs}/$2.py:${MODEL:-hovle_2b} more=ARGS$1 args tries=0 status
  shift 2
  read -ra args <<<"${!more:-}"
  local command=(hovle train "--config=$config" "--workdir=$RUNS/stage$stage"
    "--config.data.tokenizer=$TOKENIZER" "$@" "${args[@]}" "${overrides[@]}")
  if [ "$(cat "$RUNS/stage$stage.done" 2>/dev/null)" = "${command[*]}" ]; then
    echo "stage $stage: done before" >&2
    return
  fi
  if [ -n "$DRY_RUN" ]; then
    run "${command[@]}" "${connect[@]}" && return
  fi
  while :; do
    [ -z "$stopped" ] || exit 75
    # In the background: bash handles a signal only when what it runs in front has ended.
    "${command[@]}" "${connect[@]}" &
    child=$! && await
    while kill -0 "$child" 2>/dev/null; do await; done # a signal ended the wait, not the stage
    [ -z "$stopped" ] || await # the status may still be that of the interrupted wait
    child=''
    case $status in
      0) break ;;
      75) [ -z "$stopped" ] && [ "$tries" -lt "$retries" ] || exit 75 ;;
      *) echo "stage $stage ended with status $status: ${command[*]}" >&2 && exit "$status" ;;
    esac
    tries=$((tries + 1))
    echo "stage $stage: preempted, run again ($tries of $retries)" >&2
  done
  echo "${command[*]}" >"$RUNS/stage$stage.done"
}

[ -n "$DRY_RUN" ] || mkdir -p "$RUNS"
for stage in ${STAGES:-1 2 3}; do
  case $stage in
    1)
      need IMAGES LLM TEACHER
      read -ra sources <<<"$IMAGES"
      printf -v list "'%s'," "${sources[@]}"
      train 1 stage1_distill "--config.data.images=($list)" ${TEXT:+"--config.data.text=$TEXT"} \
        "--config.init.llm=$LLM" "--config.init.teacher=$TEACHER"
      ;;
    2)
      need ALIGN LLM
      train 2 stage2_align "--config.data.meta=$ALIGN" "--config.init.llm=$LLM" \
        "--config.init.previous=$RUNS/stage1"
      ;;
    3)
      need INSTRUCT
      train 3 stage3_instruct "--config.data.meta=$INSTRUCT" \
        "--config.init.previous=$RUNS/stage${previous:-2}"
      ;;
    *)
      [ -n "$previous" ] || fail "STAGES: name the stage before $stage, too"
      train "$stage" "stage$stage" "--config.init.previous=$RUNS/stage$previous"
      ;;
  esac
  previous=$stage
done
