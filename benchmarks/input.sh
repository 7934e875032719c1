#!/usr/bin/env bash
# Measures the input pipeline in turns with other loaders, on original and on stored files.
#
#   benchmarks/input.sh                  ten minutes or so; writes results/input-*.json
#   benchmarks/input.sh FLAG ...         further flags of `bench input`, such as --rounds=7
#
# It prints the figures against the bars: original files 2.3 (crop and flip) and 2.1 (RandAugment)
# times timm's rate, our stored files against timm's originals 3.5 and 3, stored files for both 2.5
# and 2.2, and a PSNR of 38 dB of the crops. Nothing else should run on the machine. VIT_JAX_PYTHON
# names the interpreter, which needs timm and torch; Grain and FFCV are left out if they are missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${VIT_JAX_PYTHON:-$root/.venv/bin/python}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$root/results"
pp='decode_jpeg_and_inception_crop(224)|flip_lr'

measure() { # measure NAME PP RIVAL FLAG ...
  local name=$1 pp=$2 rival=$3 out=$root/results/input-$1.json
  shift 3
  "$python" -m vit_jax bench input --config="$root/configs/vit_s16_i1k.py" \
    --config.data.source=fake --config.data.args.encoded=true --config.batch_size=128 \
    --config.data.pp="$pp" --against="$rival" --stored=q90,max_side=512 --json="$out" "$@" \
    >/dev/null || echo "$name: not measured"
}

measure crop-flip "$pp" timm "$@"
measure randaugment "$pp|randaug(2,10)" timm "$@"
measure tfrecord "$pp" tfrecord "$@"
measure grain "$pp" grain "$@"
measure ffcv "$pp" ffcv "$@"

"$python" - "$root/results" <<'PYTHON'
import json
import pathlib
import sys

BARS = {
    "crop-flip": {"timm_ratio": 2.3, "timm_ratio_ours_stored": 3.5, "timm_ratio_stored": 2.5},
    "randaugment": {"timm_ratio": 2.1, "timm_ratio_ours_stored": 3.0, "timm_ratio_stored": 2.2},
}
for path in sorted(pathlib.Path(sys.argv[1]).glob("input-*.json")):
    name, found = path.stem.removeprefix("input-"), json.loads(path.read_text())
    bars = BARS.get(name, {}) | {"stored_psnr": 38.0}
    for key, value in found.items():
        if isinstance(value, (int, float)):
            bar = f"   bar {bars[key]}: {'held' if value >= bars[key] else 'missed'}" if key in bars else ""
            print(f"{name:12} {key:44} {value:9.2f}{bar}")
PYTHON
