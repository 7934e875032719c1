#!/usr/bin/env bash
# From nothing to a filled row of the results table, on a TPU slice of Google Cloud:
#
#   scripts/reproduce.sh vit_s16_i1k --type=v5litepod-8 --zone=us-west4-a --bucket=gs://BUCKET \
#       --manual_dir=ARCHIVES --price=USD_OF_A_CHIP_HOUR [--spot ...]
#
# It prepares the datasets and copies them to the bucket, plans, creates the slices, trains and
# watches until the run is done, deletes the slices, and writes results/vit_s16_i1k.json and the row.
# Call it again after any interruption: what is there is not made again. --dry-run prints all
# commands and runs none of them; --help tells the other flags.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

export VIT_JAX_EXTRAS=${VIT_JAX_EXTRAS:+$VIT_JAX_EXTRAS,}tpu  # The TPU compiler, to plan with.
"$root/run.sh" install
export VIT_JAX_PROGRAM=./run.sh PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${VIT_JAX_VENV:-$root/.venv}/bin/python" "$root/scripts/reproduce.py" "$@"
