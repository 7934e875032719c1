#!/usr/bin/env bash
# Measures this package on one NVIDIA GPU, in turns with timm, in at most 8 minutes.
#
#   benchmarks/gpu.sh                  everything; writes results/gpu.json and results/gpu.md
#   benchmarks/gpu.sh --tiny           the same code on a CPU with tiny sizes, in a minute
#   benchmarks/gpu.sh --out=FILE.json  another file
#
# Call it again until it says that nothing is left: it goes on where it stopped (exit code 75), for
# the same code, device and packages. It needs jax, flax, optax, orbax and ml_collections; torch and
# timm to compare with, and TensorFlow to measure the host. Without a network, put what is missing as
# wheels into a folder (`pip download --no-deps -d .whl ml_collections importlib_resources`), .whl of
# this checkout or the one that GPU_WHEELS names. VIT_JAX_PYTHON names the interpreter. A copy without
# .git tells its commit in the file .commit.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${VIT_JAX_PYTHON:-python3}
wheels=${GPU_WHEELS:-$root/.whl}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,14p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
  exit
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$PYTHONPATH:$site
fi
if ! why=$("$python" -c 'import vit_jax.bench.model' 2>&1); then
  echo "error: $python cannot import vit_jax (${why##*$'\n'}); --help says how to bring what is missing" >&2
  exit 2
fi
# timm needs memory on the same GPU, so JAX takes only what it uses.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
"$python" "$root/benchmarks/gpu.py" "$@"
