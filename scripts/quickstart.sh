#!/usr/bin/env bash
# Makes a small data set, trains a net on it, evaluates it with three scales and the dense CRF, and writes a report.
# Trains a ResNet-101 on a CUDA device, a ResNet-18 on the CPU.
#
#     bash scripts/quickstart.sh [FOLDER]        writes to FOLDER (default: quickstart); replaces an earlier run
set -euo pipefail
start_folder=$PWD
cd "$(dirname "$0")/.."
. scripts/environment.sh
environment requirements.txt

out=${1:-quickstart}
case $out in /*) ;; *) [ -z "${1:-}" ] || out=$start_folder/$out ;; esac
if [ -e "$out" ] && [ ! -e "$out/.quickstart" ]; then
    echo "$out exists and was not made by this script; name another folder" >&2
    exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.quickstart"

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    net=(--backbone resnet101 --batch-size 16 --num-steps 1500 --learning-rate 2e-3)
else
    net=(--backbone resnet18 --batch-size 8 --num-steps 160 --learning-rate 5e-3)
fi

python scripts/make_shapes.py --kind landscapes --size 193,257 --out "$out/landscapes"
python train.py --data-dir "$out/landscapes" --restore-from none "${net[@]}" \
    --input-size 129,129 --random-mirror --random-scale \
    --save-pred-every 100 --val-every 40 --snapshot-dir "$out/snapshots"
snapshot=$(ls -t "$out"/snapshots/*_scenes_*.pth | head -n 1)
python evaluate.py --data-dir "$out/landscapes" --restore-from "$snapshot" --scales 1,0.75,0.5 --crf \
    --save-dir "$out/masks" --save-panels "$out/panels" --save-json "$out/scores.json" --report "$out/report"

cat <<EOF

panels           $out/panels/      image, label, prediction and errors, after the CRF
during training  $out/snapshots/images/
masks            $out/masks/       indexed PNGs, one per image
metrics          $out/scores.json

open $out/report/index.html
EOF
