#!/usr/bin/env bash
# Several processes of one run on this machine, started together and brought back together.
#
#   launch/local_multiprocess.sh [OPTIONS] -- PROGRAM ARGUMENTS...
#   launch/local_multiprocess.sh --processes=2 --devices_per_process=1 -- \
#       python -m maeast_jax.train --config=configs/pretrain_demo.py --workdir=runs/two_processes
#
# --processes=2            how many; each gets --coordinator, --num_processes and --process_id
# --port=N                 of the coordinator; without it a free one, a fresh one at each start
# --devices_per_process=N  computes on N CPU devices a process; without it jax chooses
# --restarts=3             starts again after a lost process, so often in a row; a run that
#                          lasted ten minutes begins the count anew
# --grace=60               seconds the others have to end after one failed, before they are killed;
#                          more than HEARTBEAT_SECONDS of distributed.py, so that they can say why
# --log_dir=DIR            for the output of processes 1 and up; that of process 0 goes to the
#                          terminal. Without it a new folder in /tmp, removed if all ends well
# --dry_run                prints the commands, one a line, and runs none
#
# SIGTERM and Ctrl-C go to every process. Ends with the run's exit code: that of the process which
# failed, not of those which it took down.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

processes=2 port='' devices='' restarts=3 grace=60 log_dir='' dry_run=''
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --devices_per_process=*) devices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --log_dir=*) log_dir=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --help) help "$0" && exit 0 ;;
    --) shift && break ;;
    *) fail "$1 is not an option; options are --name=value, then -- and the program (see --help)" ;;
  esac
  shift
done
(($#)) || fail "no program; write -- PROGRAM ARGUMENTS after the options (see --help)"
joins "$@"
whole --processes "$processes" 1
whole --restarts "$restarts" 0
whole --grace "$grace" 0
[[ -z $devices ]] || whole --devices_per_process "$devices" 1
if [[ -n $port ]]; then
  whole --port "$port" 1
  ((port < 65536)) || fail "--port=$port must be below 65536"
fi
command=("$@")
environment=()
[[ -z $devices ]] || environment=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")

# Below the range from which the system gives ports to outgoing connections, so that none of them
# takes it between this look and the coordinator's start.
free_port() {
  local candidate
  while :; do
    candidate=$((20000 + RANDOM % 12000))
    (: <>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
  done
  printf '%s\n' "$candidate"
}

words=()
set_words() { # set_words PROCESS PORT: the command of one process, in `words`
  words=("${command[@]}" "--coordinator=127.0.0.1:$2" "--num_processes=$processes" "--process_id=$1")
  ((${#environment[@]} == 0)) || words=(env "${environment[@]}" "${words[@]}")
}

if [[ -n $dry_run ]]; then
  chosen=${port:-$(free_port)}
  for ((i = 0; i < processes; i++)); do
    set_words "$i" "$chosen"
    quote "${words[@]}"
  done
  exit 0
fi

own_log_dir=''
if [[ -z $log_dir ]]; then
  log_dir=$(mktemp -d "${TMPDIR:-/tmp}/maeast_jax.XXXXXX")
  own_log_dir=yes
fi
mkdir -p "$log_dir"
pids=() codes=() failed=()
stopping=''

forward() {
  local i
  stopping=$1
  for i in "${!pids[@]}"; do
    [[ -n ${codes[i]:-} ]] || kill -"$1" "${pids[i]}" 2>/dev/null || true
  done
}

kill_rest() {
  local i
  for i in "${!pids[@]}"; do
    # The group, so that what a process started goes with it.
    [[ -n ${codes[i]:-} ]] || kill -KILL -- "-${pids[i]}" 2>/dev/null || true
  done
}

trap 'forward TERM' TERM HUP
trap 'forward INT' INT
trap kill_rest EXIT

# A signal to the whole group, Ctrl-C or a time limit's, ends the sleep too, which is no failure.
pause() {
  sleep "$1" || true
}

start() {
  local i chosen=${port:-$(free_port)}
  pids=() codes=()
  for ((i = 0; i < processes; i++)); do
    [[ -z $stopping ]] || return 0
    set_words "$i" "$chosen"
    # A group of its own for each: Ctrl-C at the terminal then comes to this script alone, which
    # passes it on once, and a background process is not born deaf to it.
    set -m
    if ((i == 0)); then
      "${words[@]}" </dev/null &
    else
      "${words[@]}" </dev/null >>"$log_dir/process_$i.log" 2>&1 &
    fi
    pids+=($!)
    set +m
  done
  # A signal that came between a start and the line that notes its number.
  [[ -z $stopping ]] || forward "$stopping"
}

# Waits for all; the run's code is in `code`, that of the first to fail.
wait_all() {
  local i running ended deadline=''
  code=0
  while :; do
    running='' failed=()
    for i in "${!pids[@]}"; do
      [[ -z ${codes[i]:-} ]] || continue
      if kill -0 "${pids[i]}" 2>/dev/null; then
        running=yes
        continue
      fi
      # Looked up only once it is gone: a wait that a signal cuts short tells the signal's number.
      ended=0
      wait "${pids[i]}" 2>/dev/null || ended=$?
      codes[i]=$ended
      ((ended == 0)) || failed+=("$i")
    done
    if ((code == 0 && ${#failed[@]})); then
      judge
      deadline=$((SECONDS + grace))
    fi
    [[ -n $running ]] || return 0
    if [[ -n $deadline ]] && ((SECONDS > deadline)); then
      note "the other processes did not end within $grace s and are killed"
      deadline=''
      kill_rest
    fi
    pause 0.2
  done
}

# Of those found in one look, the one nearest to the cause: one that must not be restarted, then any
# that was not itself taken down by another's end (75).
judge() {
  local i cause=${failed[0]}
  for i in "${failed[@]}"; do
    if restartable "${codes[cause]}"; then
      if ! restartable "${codes[i]}" || ((codes[cause] == 75)); then cause=$i; fi
    fi
  done
  code=${codes[cause]}
  if [[ -n $stopping ]] || ((processes == 1)); then
    note "process $cause ended with code $code"
    return
  fi
  note "process $cause ended with code $code; the others have $grace s to end"
  if ((cause)); then
    tail -n 20 "$log_dir/process_$cause.log" | sed "s/^/process $cause | /" >&2
  fi
}

if ((processes == 2)); then
  note "process 1 writes to $log_dir"
elif ((processes > 2)); then
  note "processes 1 to $((processes - 1)) write to $log_dir"
fi
left=$restarts
while :; do
  began=$SECONDS
  start
  wait_all
  if ((code == 0 && ${#pids[@]} < processes)); then
    # Stopped before all were started: no process tells a code, so that of the signal.
    [[ $stopping == INT ]] && code=130 || code=143
  fi
  if ((code == 0)); then
    [[ -z $own_log_dir ]] || rm -r "$log_dir"
    exit 0
  fi
  if [[ -n $stopping ]]; then
    ((code != 130 && code != 143)) || note "stopped as asked: the same command goes on"
    exit "$code"
  fi
  if ! restartable "$code"; then
    note "not started again: code $code is none that another start mends"
    exit "$code"
  fi
  ((SECONDS - began < 600)) || left=$restarts
  if ((left == 0)); then
    note "code $code again after $restarts restarts: giving up"
    exit "$code"
  fi
  left=$((left - 1))
  note "code $code: starting again, $left more restarts after this one"
  pause 1
done
