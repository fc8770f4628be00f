#!/bin/sh
# A user's whole session on a tiny real pipeline: probe, look, write the weighted config, prove it, train with it.
#
#     sh examples/demo.sh FOLDER      (FOLDER is made; simpletuner and layerprobe have to be on PATH)
#
# It runs on the CPU if there is no GPU, downloads nothing, and takes about four minutes, most of them imports.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: demo.sh FOLDER" >&2
    exit 2
fi
examples=$(cd "$(dirname "$0")" && pwd)
folder=$1
run=output/tiny-probe/layerprobe

# Nothing here comes from the Hugging Face hub; this makes a mistake fail at once instead of waiting for the network.
export HF_HUB_OFFLINE=1

announce() {
    printf '\n$ %s\n' "$*"
}

try() {
    announce "$@"
    "$@"
}

try python "$examples/tiny_sd3.py" --out "$folder"
announce cd "$folder"
cd "$folder"

try simpletuner train env=tiny-probe
try layerprobe status "$run"
try layerprobe heatmap "$run" --out figures

announce layerprobe lokr "$run" --preset article --env tiny-weighted
layerprobe lokr "$run" --preset article --env tiny-weighted >table.txt
cat table.txt
try layerprobe check-config config/tiny-weighted/lycoris_config.json --run "$run" --differences

try simpletuner train env=tiny-weighted

echo
sed -e '/^written:/d' -e '/^next:/d' table.txt
echo
echo "In $PWD:"
for path in "$run" figures config/tiny-weighted output/tiny-weighted; do
    for file in "$path"/*; do
        if [ -f "$file" ]; then echo "  $file"; fi
    done
done
