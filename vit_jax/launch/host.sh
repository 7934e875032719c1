#!/usr/bin/env bash
# One host of a TPU slice: installs, starts and watches a run there. Copied to the hosts and called
# by `./run.sh tpu`. Everything of a run lies in ~/vit_jax_runs/NAME.
#
#   host.sh NAME prepare [REPOSITORY COMMIT]   code (unpacked from ~/NAME.tgz, or cloned), Python,
#                                              packages
#   host.sh NAME check [gs://BUCKET/...]       what would stop the run: a process that holds the
#                                              TPU, a bucket that may not be written
#   host.sh NAME measure [gs://BUCKET/...]     chips, versions, the all-reduce, the bucket's speed
#   host.sh NAME start ARGUMENTS...            `./run.sh train ARGUMENTS`, in the background, unless
#                                              it is already running
#   host.sh NAME state                         HOST none | running LAST LINE | ended CODE LAST LINE
#   host.sh NAME arguments                     those of the run that was started last, in a line
#   host.sh NAME logs                          what the run says, until it ends
#   host.sh NAME stop                          asks the run to save and end; kills it after
#                                              VIT_JAX_STOP_SECONDS (600)
set -euo pipefail

lockfile=/tmp/libtpu_lockfile

fail() {
  echo "error: $(hostname): $*" >&2
  exit 2
}

# Without ensurepip a Python makes no environments (Debian's, until python3-venv is installed).
is_supported() {
  "$1" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    2>/dev/null
}

newest_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3; do
    if is_supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# TPU images may bring a Python that is too old, or one that makes no environments. uv brings its own
# builds and needs no root. Ubuntu 24.04 refuses `pip install` outside of environments (PEP 668); its
# flag for that is unknown to older pips, so that uv's own installer is the last resort.
install_python() {
  local uv
  if python3 -m pip install --quiet --user uv >&2 ||
    python3 -m pip install --quiet --user --break-system-packages uv >&2; then
    uv=(python3 -m uv)
  else
    curl -LsSf https://astral.sh/uv/install.sh |
      env UV_INSTALL_DIR="$HOME/.local/bin" UV_NO_MODIFY_PATH=1 sh >&2 || return
    uv=("$HOME/.local/bin/uv")
  fi
  "${uv[@]}" python install --quiet 3.12 >&2 && "${uv[@]}" python find 3.12
}

prepare() {
  local code="$run/code" python
  mkdir -p "$run"
  # A launcher that was interrupted leaves its call, which may be installing still.
  exec 9>"$run/lock"
  flock --wait 3600 9 || fail "another call has held $run/lock for an hour; end it on this host"
  if [[ $# -gt 0 ]]; then
    if [[ $(git -C "$code" remote get-url origin 2>/dev/null) != "$1" ]]; then
      rm -rf "$code" && git clone --quiet "$1" "$code"
    fi
    git -C "$code" fetch --quiet origin
    git -C "$code" checkout --quiet "$2" || fail "commit $2 is not in $1"
  else
    rm -rf "$code.new" && mkdir "$code.new"
    tar -xzf ~/"$name.tgz" -C "$code.new"
    rm -rf "$code" && mv "$code.new" "$code"
  fi
  python=$(newest_python) || python=$(install_python) ||
    fail "no Python 3.11 or newer, and none could be installed; give the subnetwork a Cloud NAT," \
      "or choose a newer runtime with --version"
  VIT_JAX_PYTHON=$python VIT_JAX_EXTRAS=tpu VIT_JAX_VENV=$run/venv "$code/run.sh" install
}

# Runs a command as root where that needs no password: others' open files are root's to see.
as_root() {
  if sudo -n true 2>/dev/null; then sudo -n "$@"; else "$@"; fi
}

# Processes with a file open whose name matches one of the patterns, as lines "PID USER COMMAND".
holders() {
  local pattern pid
  for pattern in "$@"; do
    as_root find /proc/[0-9]*/fd -maxdepth 1 -lname "$pattern" 2>/dev/null || true
  done | cut -d/ -f3 | sort -u | while read -r pid; do
    echo "$pid $(stat -c %U "/proc/$pid") $(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c1-80)"
  done
}

check_tpu_is_free() {
  local found
  found=$(holders '/dev/accel*' '/dev/vfio/[0-9]*')
  if [[ -n $found ]]; then
    fail "a process holds the TPU: ${found//$'\n'/; }. End it (kill PID), or wait for it"
  fi
  # libtpu locks this file, and leaves it behind; it cannot open another user's.
  if [[ -e $lockfile && $(stat -c %u "$lockfile") != "$(id -u)" ]] &&
    ! as_root rm -f "$lockfile" 2>/dev/null; then
    fail "$lockfile belongs to $(stat -c %U "$lockfile"), so that libtpu cannot lock the TPU;" \
      "remove it"
  fi
}

metadata() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/$1"
}

# Asks the bucket which of the permissions that a run needs this host's service account has.
check_bucket() {
  local api=https://storage.googleapis.com/storage/v1 bucket=${1#gs://}
  local token account granted missing=() permission query=''
  # TensorFlow looks at the bucket itself before it makes a folder in it.
  local wanted=(storage.buckets.get storage.objects.create storage.objects.delete
    storage.objects.get storage.objects.list)
  local role roles=()
  bucket=${bucket%%/*}
  account=$(metadata email) || fail "this host has no service account; add --service-account=EMAIL"
  token=$(metadata token | sed 's/.*"access_token" *: *"\([^"]*\)".*/\1/')
  for permission in "${wanted[@]}"; do
    query+="&permissions=$permission"
  done
  granted=$(curl -sf -H @- "$api/b/$bucket/iam/testPermissions?${query#&}" \
    <<<"Authorization: Bearer $token") ||
    fail "bucket gs://$bucket does not exist, or $account may not see it"
  for permission in "${wanted[@]}"; do
    [[ $granted == *"\"$permission\""* ]] || missing+=("$permission")
  done
  if [[ ${#missing[@]} -gt 0 ]]; then
    [[ ${missing[*]} != *storage.objects.* ]] || roles+=(roles/storage.objectUser)
    [[ ${missing[*]} != *storage.buckets.* ]] || roles+=(roles/storage.legacyBucketReader)
    fail "service account $account lacks ${missing[*]} on gs://$bucket. Grant what has them:" \
      "$(for role in "${roles[@]}"; do
        echo "gcloud storage buckets add-iam-policy-binding gs://$bucket" \
          "--member=serviceAccount:$account --role=$role;"
      done | paste -sd ' ')"
  fi
}

measure() {
  check_tpu_is_free
  cd "$run/code"
  "$run/venv/bin/python" -m vit_jax.launch.measure --host="$(hostname)" ${1:+"--workdir=$1"}
}

# After a restart of the host, the files tell of a run that is over, and its PID may be another's.
is_of_this_boot() {
  [[ -f $run/boot_id && $(<"$run/boot_id") == "$(</proc/sys/kernel/random/boot_id)" ]]
}

is_running() {
  is_of_this_boot && [[ -f $run/pid ]] && kill -0 "$(<"$run/pid")" 2>/dev/null
}

# The launcher tells its own run from others by this line.
on_one_line() {
  local arguments=("${@//\\/\\\\}")
  local line="${arguments[*]// /\\ }"
  line=${line//$'\n'/\\n}
  printf '%s\n' "${line//$'\r'/\\r}"
}

start() {
  if is_running; then
    return
  fi
  rm -f "$run/code_of_exit" "$run/pid" "$run/stopped"
  cat /proc/sys/kernel/random/boot_id >"$run/boot_id"
  cd "$run/code"
  on_one_line "$@" >"$run/arguments"
  VIT_JAX_EXTRAS=tpu VIT_JAX_VENV=$run/venv setsid nohup bash -c '
    ./run.sh train "${@:2}" & child=$!
    trap "kill -TERM $child" TERM
    while kill -0 $child 2>/dev/null; do wait $child; done
    wait $child
    echo $? >"$1/code_of_exit"' bash "$run" "$@" >>"$run/log" 2>&1 </dev/null &
  echo $! >"$run/pid"
}

last_line() {
  tail -n 1 "$run/log" 2>/dev/null | cut -c1-300
}

# The launcher tells a run that somebody stopped from one that has failed.
stopped() {
  [[ ! -f $run/stopped ]] || echo "stopped: "
}

state() {
  if is_running; then
    echo "$(hostname) running $(last_line)"
  elif is_of_this_boot && [[ -f $run/code_of_exit ]]; then
    echo "$(hostname) ended $(<"$run/code_of_exit") $(stopped)$(last_line)"
  else
    echo "$(hostname) none"
  fi
}

logs() {
  [[ -f $run/log ]] || fail "run $name has not been started here"
  if is_running; then
    tail -n 200 -F --pid="$(<"$run/pid")" "$run/log" 2>/dev/null
  else
    tail -n 200 "$run/log"
  fi
}

arguments() {
  [[ ! -f $run/arguments ]] || cat "$run/arguments"
}

stop() {
  is_running || return 0
  local pid
  pid=$(<"$run/pid")
  touch "$run/stopped"
  kill -TERM "$pid"
  # The session, because the supervisor starts the trainer in a process group of its own.
  timeout "${VIT_JAX_STOP_SECONDS:-600}" tail --pid="$pid" -f /dev/null ||
    pkill -KILL -s "$pid" || true
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  name=$1
  run=~/vit_jax_runs/$name
  case $2 in
    prepare | measure | start | state | arguments | logs | stop) "$2" "${@:3}" ;;
    check)
      check_tpu_is_free
      if [[ ${3:-} == gs://* ]]; then
        check_bucket "$3"
      fi
      ;;
    *) fail "unknown action $2" ;;
  esac
fi
