#!/bin/sh
# A user's whole session on the small trained pipeline of examples/emoji: probe, look, write a LoKr config, prove it, train
# with it on a style that the pipeline has never seen, and draw captions that no training has seen.
#
#     sh examples/demo.sh FOLDER      (FOLDER is made; python, simpletuner and layerprobe have to be on PATH)
#
# It runs on the CPU if there is no GPU, downloads nothing, and takes five to seven minutes on two free cores.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: demo.sh FOLDER" >&2
    exit 2
fi
emoji=$(cd "$(dirname "$0")/emoji" && pwd)
folder=$1
run=output/emoji-demo/layerprobe

# Nothing here comes from the Hugging Face hub; this makes a mistake fail at once instead of waiting for the network.
export HF_HUB_OFFLINE=1

announce() {
    printf '\n$ %s\n' "$*"
}

try() {
    announce "$@"
    "$@"
}

announce cp -r "$emoji" "$folder"
cp -r "$emoji" "$folder"
announce cd "$folder"
cd "$folder"
try python unpack.py

# 208 samples of the 200 pictures that are trained on; in 160 of them every block is left out once.
try simpletuner train env=emoji-demo
try layerprobe status "$run"
try layerprobe report "$run"

try layerprobe lokr "$run" --params 300k --env emoji-lokr
try layerprobe check-config config/emoji-lokr/lycoris_config.json --run "$run" --differences

# 80 steps at batch 8
try simpletuner train env=emoji-lokr
try python draw.py --adapter output/emoji-lokr/pytorch_lora_weights.safetensors --out sheet.png

echo
echo "To look at, in $PWD:"
echo "  $run/report.html       which blocks turn the states, and which the loss needs"
echo "  sheet.png                                  true pictures, the pipeline before, and after the training"
echo "  config/emoji-lokr/lycoris_config.json      the LoKr config that was trained"
