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
# VIT_JAX_PYTHON names the interpreter, VIT_JAX_VENV the folder of the environment (.venv),
# VIT_JAX_EXTRAS what is installed besides (tpu, cuda).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export VIT_JAX_PROGRAM=./run.sh  # How messages call the program.
venv=${VIT_JAX_VENV:-.venv}
extras=${VIT_JAX_EXTRAS:-}

# is_supported PYTHON [MODULE]: that it has.
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
  echo "error: no Python 3.11, 3.12 or 3.13${1:+ with venv} found; install one" \
    "${1:+(Debian: and python3-venv) }or name it with VIT_JAX_PYTHON" >&2
  exit 2
}

# Installs the package with the given extras, unless exactly that has been installed before.
install() {
  local extras=$1 stamp="$venv/.installed-$1" wanted python
  wanted=$(cat setup.cfg pyproject.toml constraints.txt | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  # Not there, or cut short while it was made.
  if ! "$venv/bin/python" -m pip --version &>/dev/null; then
    # Debian's Python makes no environments until python3-venv is installed.
    python=$(find_python ensurepip) || exit 2
    "$python" -m venv "$venv"
  fi
  echo "installing into $venv (once; some minutes on a first run)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}" >&2
  echo "$wanted" >"$stamp"
}

case ${1:-} in
  test)
    shift
    install test
    exec env -u VIT_JAX_PROGRAM "$venv/bin/python" -m pytest "$@"
    ;;
  imagenet)
    shift
    install "$extras"
    exec "$venv/bin/python" -m vit_jax prepare imagenet2012 "$@"
    ;;
  tpu)
    python=$(find_python) || exit 2
    exec "$python" -m vit_jax "$@"
    ;;
  install)
    install "$extras"
    ;;
  -h | --help)
    sed -n '2,12p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
    ;;
  '' | --config.*)
    install "$extras"
    "$venv/bin/python" -m vit_jax prepare digits
    exec "$venv/bin/python" -m vit_jax train --config=configs/digits.py --workdir=runs/digits "$@"
    ;;
  *)
    install "$extras"
    exec "$venv/bin/python" -m vit_jax "$@"
    ;;
esac
