#!/usr/bin/env bash
# Reproduce the published mean IoU on PASCAL VOC 2012 val:
#
#     bash scripts/reproduce.sh kazuto      kazuto1011's weights, three scales, without and with CRF
#     bash scripts/reproduce.sh official    the authors' weights, evaluated in the same way
#     bash scripts/reproduce.sh train       train_msc.py with the official recipe from the COCO weights, then the same
#
# Downloads missing files (VOC2012 2 GB, SBD 1.4 GB, the weights), prepares, evaluates, and prints expected and measured values.
# The same command resumes an interrupted run. Results are written to results/. Further options go to evaluate.py; the
# environment variables TRAIN_OPTIONS and STEPS (default: 20000) set options and the number of steps of train_msc.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

steps=${STEPS:-20000}
case ${1:-} in
    kazuto)   expected="76.65 77.93"; item=voc-kazuto1011; weights=weights/deeplabv2_resnet101_msc-vocaug-20000.pth ;;
    official) expected="76.35 77.69"; item=caffe; weights=weights/caffe/train_iter_20000.caffemodel ;;
    train)    expected="76.35 77.69"; item=coco-init-vllab; weights=weights/resnet101COCO-41f33a49.pth ;;
    *)        sed -n '2,10s/^# \{0,1\}//p' scripts/reproduce.sh >&2; exit 2 ;;
esac
name=$1
shift
environment requirements.txt

echo "== images and labels"
if [ ! -f data/VOCdevkit/VOC2012/ImageSets/SegmentationAug/val.txt ]; then
    python scripts/download.py VOC2012 SBD
    python scripts/prepare_voc.py
fi

echo "== weights"
[ -f "$weights" ] || python scripts/download.py "$item"

if [ "$name" = train ]; then
    echo "== training"
    folder=snapshots_reproduce
    options=(--restore-from "$weights" --random-scale --random-mirror --num-steps "$steps")
    [ ! -f $folder/last.ckpt ] || options=(--resume)
    read -r -a more <<< "${TRAIN_OPTIONS:-}"
    made="$folder/*_scenes_$steps.pth"
    compgen -G "$made" > /dev/null || python train_msc.py --snapshot-dir $folder "${options[@]}" ${more[@]+"${more[@]}"}
    weights=$(compgen -G "$made" | head -n 1)
fi

echo "== evaluation"
results=results/$name
if [ ! -f "$results/scores.json" ]; then
    python evaluate.py --restore-from "$weights" --scales 1,0.75,0.5 --crf --report "$results/report" \
        --save-json "$results/scores.json" "$@"
fi
python - "$results/scores.json" $expected <<'EOP'
import json, sys

with open(sys.argv[1]) as file:
    scores = json.load(file)
print(f"\n{'mean IoU % on VOC 2012 val, three scales':<40} expected      got")
for key, title, expected in (("before_crf", "without CRF", sys.argv[2]), ("after_crf", "with CRF", sys.argv[3])):
    print(f"{title:<40} {expected:>8} {100 * scores[key]['mean_iou']:8.2f}")
EOP
echo "open $results/report/index.html"
