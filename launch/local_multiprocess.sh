#!/usr/bin/env bash
# Starts several processes of one run on this machine, and restarts them when one is lost.
#
#   launch/local_multiprocess.sh [OPTIONS] -- PROGRAM ARGUMENTS...
#   launch/local_multiprocess.sh --processes=2 --devices_per_process=1 -- \
#       python -m maeast_jax.train --config=configs/pretrain_demo.py --workdir=runs/two_processes
#
# --processes=2            number of processes; each gets --coordinator, --num_processes and --process_id
# --devices_per_process=N  gives each process N CPU devices; default: jax chooses the devices
# --restarts=3             restarts in a row; a run of ten minutes or more resets the count
# --grace=60               seconds until the remaining processes are killed after one has failed; more
#                          than MAEAST_JAX_HEARTBEAT_SECONDS, 30 by default, so that they can report
#                          the loss first
# --log_dir=DIR            output of processes 1 and up; process 0 prints to the terminal. Default: a
#                          new folder in /tmp, removed when all processes succeed
# --dry_run                prints the commands, one per line, and runs none
#
# SIGTERM and Ctrl-C are passed to every process. The exit code is that of the process that failed
# first, not of the processes that ended because of it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

processes=2 devices='' restarts=3 grace=60 log_dir='' dry_run=''
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
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
command=("$@")
if [[ -n $devices ]]; then
  whole --devices_per_process "$devices" 1
  command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "$@")
fi

# Prints a free port below those that the system gives to outgoing connections, so that none of them
# takes it before the coordinator does.
choose_port() {
  local candidate=''
  while [[ -z $candidate ]]; do
    candidate=$((20000 + RANDOM % 12000))
    ! (: <>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || candidate=''
  done
  printf '%s\n' "$candidate"
}

words=()
set_words() { # set_words PROCESS PORT: puts the command of one process into `words`
  words=("${command[@]}" "--coordinator=127.0.0.1:$2" "--num_processes=$processes" "--process_id=$1")
}

if [[ -n $dry_run ]]; then
  chosen=$(choose_port)
  for ((i = 0; i < processes; i++)); do
    set_words "$i" "$chosen"
    quote "${words[@]}"
  done
  exit 0
fi

is_own_log_dir=''
if [[ -z $log_dir ]]; then
  log_dir=$(mktemp -d "${TMPDIR:-/tmp}/maeast_jax.XXXXXX")
  is_own_log_dir=yes
fi
mkdir -p "$log_dir"
((processes == 1)) || note "process 1 and up write to $log_dir"

pids=() codes=() stopping='' code=0
send() { # send SIGNAL: to the process group of each process that still runs
  local i
  for i in "${!pids[@]}"; do
    [[ -n ${codes[i]:-} ]] || kill -"$1" -- "-${pids[i]}" 2>/dev/null || true
  done
}
trap 'stopping=TERM; send TERM' TERM HUP
trap 'stopping=INT; send INT' INT
trap 'send KILL' EXIT

start() {
  local i chosen
  chosen=$(choose_port)
  pids=() codes=()
  # In a process group of its own, a process does not get the terminal's Ctrl-C in addition to the
  # signal that this script passes on.
  set -m
  for ((i = 0; i < processes; i++)); do
    set_words "$i" "$chosen"
    if ((i == 0)); then
      "${words[@]}" </dev/null &
    else
      "${words[@]}" </dev/null >>"$log_dir/process_$i.log" 2>&1 &
    fi
    pids+=($!)
  done
  set +m
  # A signal may have come before all processes were started.
  [[ -z $stopping ]] || send "$stopping"
}

# Waits for all processes. Puts 0, or the exit code of the process that failed first, into `code`.
wait_all() {
  local i running failed deadline=''
  code=0
  while :; do
    running='' failed=()
    for i in "${!pids[@]}"; do
      if [[ -n ${codes[i]:-} ]]; then continue; fi
      if kill -0 "${pids[i]}" 2>/dev/null; then
        running=yes
        continue
      fi
      # After the process has ended: a signal that interrupts `wait` would give the signal's code.
      codes[i]=0
      wait "${pids[i]}" 2>/dev/null || codes[i]=$?
      ((codes[i] == 0)) || failed+=("$i")
    done
    if ((code == 0 && ${#failed[@]})); then
      blame "${failed[@]}"
      deadline=$((SECONDS + grace))
    fi
    [[ -n $running ]] || return 0
    if [[ -n $deadline ]] && ((SECONDS > deadline)); then
      note "the other processes did not end within $grace s and are killed"
      send KILL
      deadline=''
    fi
    # A signal to the whole process group ends `sleep` too.
    sleep 0.2 || true
  done
}

# blame PROCESS...: takes the code of one of the processes that failed at the same time. A code that
# no restart mends comes first. 75 comes last, because it follows from the end of another process.
blame() {
  local i cause=$1
  for i; do
    if restartable "${codes[cause]}"; then
      if ! restartable "${codes[i]}" || ((codes[cause] == 75)); then cause=$i; fi
    fi
  done
  code=${codes[cause]}
  note "process $cause ended with code $code"
  if [[ -z $stopping ]] && ((cause)); then
    tail -n 20 "$log_dir/process_$cause.log" | sed "s/^/process $cause | /" >&2
  fi
}

left=$restarts
while :; do
  began=$SECONDS
  start
  wait_all
  if ((code == 0)); then
    [[ -z $is_own_log_dir ]] || rm -r "$log_dir"
    exit 0
  fi
  if [[ -n $stopping ]] || ! restartable "$code"; then exit "$code"; fi
  ((SECONDS - began < 600)) || left=$restarts
  if ((left == 0)); then
    note "code $code again after $restarts restarts: giving up"
    exit "$code"
  fi
  left=$((left - 1))
  note "code $code: starting again, $left more restarts after this one"
  sleep 1 || true
done
