#!/usr/bin/env bash
# Sets up everything on a machine with Python 3.11 to 3.13 and git, then runs a command.
#
#   ./run.sh [--config.KEY=VALUE ...]   train configs/digits.py on real images, evaluate, report
#   ./run.sh test [PYTEST ARGUMENTS]    run the tests
#   ./run.sh imagenet [ARGUMENTS]       prepare ImageNet: what it takes, step by step
#   ./run.sh COMMAND ...                any other command of `vit-jax`, such as `./run.sh train`
#   ./run.sh tpu ...                    creates and uses Cloud TPU slices; installs nothing here
#   ./run.sh install                    only sets everything up
#
# Relative paths are those of the folder that you are in. VIT_JAX_PYTHON names the interpreter,
# VIT_JAX_VENV the folder of the environment (.venv), VIT_JAX_EXTRAS what is installed besides (tpu,
# cuda).
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

export VIT_JAX_PROGRAM=./run.sh  # How messages call the program.
if [[ $0 == */* ]]; then
  VIT_JAX_PROGRAM=$0
fi
venv=${VIT_JAX_VENV:-$root/.venv}
if [[ $venv != /* ]]; then
  venv=$PWD/$venv
fi
extras=${VIT_JAX_EXTRAS:-}
disk_mib=4000  # The environment takes 2.8 GB, and pip needs room to unpack.

fail() {
  echo "error: $*" >&2
  exit 2
}

# is_supported PYTHON [MODULE]: succeeds if the interpreter runs, is supported and has the module.
is_supported() {
  "$1" -c "import ${2:-sys}, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" \
    2>/dev/null
}

find_python() {
  local candidate candidates=(python3 python3.12 python3.13 python3.11 python)
  if [[ -n ${VIT_JAX_PYTHON:-} ]]; then
    candidates=("$VIT_JAX_PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    if is_supported "$candidate" "${1:-}"; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13${1:+ with venv} found; install one" \
    "${1:+(Debian: and python3-venv) }or name it with VIT_JAX_PYTHON"
}

# Prints a line about the environment's interpreter, or fails if it does not run. An upgrade of the
# system can replace or remove the Python that an environment was made with.
interpreter() {
  "$venv/bin/python" -c 'import sys; print(sys.version.split()[0], sys.base_prefix)' 2>/dev/null
}

make_environment() {
  local python free link clear=()
  # Debian's Python makes no environments until python3-venv is installed.
  python=$(find_python ensurepip) || exit 2
  mkdir -p "$venv" 2>/dev/null ||
    fail "$venv: this folder cannot be made; name another with VIT_JAX_VENV"
  free=$(df -Pm "$venv" | awk 'NR == 2 { print $4 }')
  if [[ $free =~ ^[0-9]+$ && $free -lt $disk_mib ]]; then
    fail "$venv: $free MiB of disk are free, $disk_mib are needed; free some, or name another" \
      "folder with VIT_JAX_VENV"
  fi
  # What is left of an environment would stop the command; other folders are not emptied.
  if [[ -f $venv/pyvenv.cfg ]]; then
    clear=(--clear)
  fi
  # Python leaves links to an interpreter that is gone as they are.
  for link in "$venv"/bin/python*; do
    if [[ -L $link && ! -e $link ]]; then
      rm "$link"
    fi
  done
  # Empty lists are unset in bash 3.2.
  "$python" -m venv ${clear[@]+"${clear[@]}"} "$venv" ||
    fail "$venv: $python could not make an environment there; name another folder with VIT_JAX_VENV"
}

unreachable='No matching distribution|ConnectionError|Timeout|Connection broken|IncompleteRead'
shown='^(Collecting|Downloading|Using|Building|Preparing|Installing) '
shown_outside_terminals='^(Downloading|Using) .*[0-9][0-9]\.[0-9] MB|^Installing collected'

# Shows pip's output while it works: its steps on one line of a terminal, else the large downloads.
show_progress() {
  local line name
  while IFS= read -r line; do
    name=${line#"${line%%[! ]*}"}
    if [[ -t 2 && $name =~ $shown ]]; then
      printf '\r\033[K%.*s' "$((${COLUMNS:-80} - 1))" "$name" >&2
    elif [[ ! -t 2 && $name =~ $shown_outside_terminals ]]; then
      echo "  ${name:0:79}" >&2
    fi
  done
  if [[ -t 2 ]]; then
    printf '\r\033[K' >&2
  fi
}

# Prints why pip failed, in one line where the reason is known.
explain() {
  local log=$1
  if grep -qE 'No space left|quota exceeded' "$log"; then
    fail "$venv: the disk is full; free some space, or name another folder with VIT_JAX_VENV"
  elif grep -qE 'ProxyError|Cannot connect to proxy' "$log"; then
    fail "the proxy does not lead to the package index; correct HTTPS_PROXY, or unset it, and" \
      "try again (pip's output: $log)"
  elif grep -q 'CERTIFICATE_VERIFY_FAILED' "$log"; then
    fail "the package index shows a certificate that is not trusted here; name the file of your" \
      "proxy's certificates with PIP_CERT, and try again (pip's output: $log)"
  elif grep -qE "$unreachable" "$log"; then
    fail "the package index cannot be reached, or lacks a package; name a mirror with" \
      "PIP_INDEX_URL or a proxy with HTTPS_PROXY, and try again (pip's output: $log)"
  fi
  tail -n 5 "$log" >&2
  fail "pip could not install the packages (its output: $log)"
}

# Installs the package with the given extras, unless exactly that has been installed before.
install() {
  local extras=$1 stamp="$venv/.installed-$1" log="$venv/install.log" wanted
  wanted=$(cd "$root" && cat setup.py setup.cfg pyproject.toml constraints.txt | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted $(interpreter)" ]]; then
    return
  fi
  # It is missing, was cut short while it was made, or its interpreter is gone or another one.
  if ! is_supported "$venv/bin/python" || ! "$venv/bin/python" -m pip --version &>/dev/null ||
    (grep -qsE '^[0-9]+ [0-9]+ .' "$venv"/.installed-* &&
      ! grep -qsF "$(interpreter)" "$venv"/.installed-*); then
    make_environment
  fi
  echo "installing into $venv (once; some minutes on a first run)" >&2
  trap 'echo "interrupted; the same command continues the installation" >&2; exit 130' INT
  "$venv/bin/python" -m pip install --progress-bar off --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root[$extras]" 2>&1 |
    tee "$log" | show_progress || explain "$log"
  trap - INT
  echo "$wanted $(interpreter)" >"$stamp"
}

# Of the folders here, only the package of this checkout is meant.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
default_extras=train,text${extras:+,$extras}

case ${1:-} in
  test)
    shift
    install test
    cd "$root"
    exec env -u VIT_JAX_PROGRAM "$venv/bin/python" -m pytest "$@"
    ;;
  imagenet)
    shift
    install "$default_extras"
    exec "$venv/bin/python" -m vit_jax prepare imagenet2012 "$@"
    ;;
  tpu)
    python=$(find_python) || exit 2
    exec "$python" -m vit_jax "$@"
    ;;
  install)
    install "$default_extras"
    ;;
  -h | --help)
    sed -n '2,14p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
    ;;
  '' | --config.*)
    install "$default_extras"
    "$venv/bin/python" -m vit_jax prepare digits
    if [[ " $*" != *" --workdir"* ]]; then
      set -- --workdir=runs/digits "$@"
    fi
    exec "$venv/bin/python" -m vit_jax train --config="$root/configs/digits.py" "$@"
    ;;
  *)
    install "$default_extras"
    exec "$venv/bin/python" -m vit_jax "$@"
    ;;
esac
