#!/usr/bin/env bash
# What tpu_vm.sh has done on each worker; it lies there in the source that was sent.
#
#   launch/worker.sh install            .venv beside launch/, with requirements.txt, jax[tpu] and gcsfs
#   launch/worker.sh start [OPTIONS] -- PROGRAM ARGUMENTS...     in the background, brought back
#   launch/worker.sh status             running or ended, and the log's last line
#   launch/worker.sh over -- PROGRAM ARGUMENTS...      how that program ended, where it need not start
#   launch/worker.sh stop               SIGTERM, and waits until the program has saved and ended
#
# --restarts=20   so often in a row; a run that lasted ten minutes begins the count anew
# --delay=15      seconds before each
#
# The log is .worker/log. A program that ends with code 70 (an error that it does not know), 75
# (another process of the run was lost) or by a signal starts again; with 0, a mistake, a full disk,
# a loss that is not finite, or after `stop`, it does not.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.."
script=$PWD/launch/worker.sh

state=.worker

running() {
  # The program holds the lock as well, so that one which outlived its loop counts.
  [[ -e $state/lock ]] && ! flock --nonblock "$state/lock" true
}

install() {
  local python='' candidate
  for candidate in python3.12 python3.11 python3.13 python3; do
    if "$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [[ -z $python ]]; then
    # Ubuntu 22.04, which the runtimes are built on, comes with 3.10, and packages no released 3.11.
    # A new machine updates itself first and holds apt's lock meanwhile.
    sudo add-apt-repository -y --no-update ppa:deadsnakes/ppa
    # The timeout is for installing; the lists have a lock of their own.
    for _ in {1..60}; do
      ! sudo apt-get update || break
      sleep 10
    done
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y python3.12 python3.12-venv
    python=python3.12
  fi
  rm -f .venv/installed
  "$python" -m venv .venv
  # One call, so that jax[tpu] is had in a version that requirements.txt allows.
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet -r requirements.txt 'jax[tpu]' gcsfs
  .venv/bin/python -c 'import jax; print("installed jax", jax.__version__)'
  touch .venv/installed
}

start() {
  local wanted
  wanted=$(quote "$@")
  mkdir -p "$state"
  if running; then
    [[ $(<"$state/command") == "$wanted" ]] ||
      fail "another command runs here, $(<"$state/command"); stop it first"
    note "runs already"
    return
  fi
  printf '%s\n' "$wanted" >"$state/command"
  # Away from the ssh session, which ends now.
  setsid "$script" loop "--restarts=$restarts" "--delay=$delay" -- "$@" >>"$state/log" 2>&1 </dev/null &
  for _ in {1..50}; do
    if [[ $(cat "$state/pid" 2>/dev/null) == "$!" ]]; then
      note "started; log: $PWD/$state/log"
      return
    fi
    sleep 0.1
  done
  refused "the loop did not start within 5 s; see $PWD/$state/log"
}

# Nothing is trapped: where the machine shuts down, the loop and the program are told each by itself.
loop() {
  local code began left=$restarts
  exec 9>"$state/lock"
  flock --nonblock 9 || fail "a program runs here already; stop it first"
  rm -f "$state/stopping"
  printf '%s\n' "$$" >"$state/pid"
  [[ ! -d .venv ]] || export PATH="$PWD/.venv/bin:$PATH"
  while :; do
    began=$SECONDS code=0
    printf 'running since %s\n' "$(date '+%F %T')" >"$state/status"
    "$@" &
    printf '%s\n' "$!" >"$state/program"
    wait "$!" || code=$?
    rm -f "$state/program"
    printf 'ended with code %s at %s\n' "$code" "$(date '+%F %T')" >"$state/status"
    note "$(<"$state/status")"
    if [[ -e $state/stopping ]] || ! restartable "$code"; then
      return "$code"
    fi
    ((SECONDS - began < 600)) || left=$restarts
    if ((left == 0)); then
      note "code $code again after $restarts restarts: giving up"
      return "$code"
    fi
    left=$((left - 1))
    # Long enough in all for the others to notice and to come back too.
    note "starting again in $delay s, $left more restarts after this one"
    sleep "$delay"
    [[ ! -e $state/stopping ]] || return "$code"
  done
}

told() {
  # The loop writes how the program ended; where it was killed itself, nobody does.
  if running; then cat "$state/status"; else sed 's/^running/ended unseen, running/' "$state/status"; fi
}

status() {
  [[ -e $state/status ]] || fail "nothing was started here; see start"
  told
  tail -n 1 "$state/log"
}

over() {
  [[ -e $state/status && $(<"$state/command") == "$(quote "$@")" ]] && ! running || return 0
  grep '^ended with code [0-3] ' "$state/status" || true
}

stop() {
  local waited=0 signalled='' program
  if ! running; then
    note "nothing runs here"
    return
  fi
  touch "$state/stopping"
  while running; do
    # Looked up each time: the loop may have been about to start the program again.
    program=$(cat "$state/program" 2>/dev/null) || program=''
    if [[ -n $program && $program != "$signalled" ]]; then
      kill -TERM "$program" 2>/dev/null || true
      signalled=$program
    fi
    ((waited < 600)) || refused "it did not end within 600 s of SIGTERM; see $PWD/$state/log"
    sleep 1
    waited=$((waited + 1))
  done
  told
}

verb=${1:---help}
shift || true
restarts=20 delay=15
while (($#)); do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --delay=*) delay=${1#*=} ;;
    --) shift && break ;;
    *) fail "$1 is not an option; options are --name=value, then -- and the program (see --help)" ;;
  esac
  shift
done
whole --restarts "$restarts" 0
whole --delay "$delay" 0
case $verb in
  install | status | stop) "$verb" ;;
  start | loop | over)
    (($#)) || fail "no program; write -- PROGRAM ARGUMENTS after the options (see --help)"
    "$verb" "$@"
    ;;
  --help) help "$script" ;;
  *) fail "$verb is not a command; install, start, status, over and stop are" ;;
esac
