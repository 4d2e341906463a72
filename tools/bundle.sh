#!/usr/bin/env bash
# Makes .dist/: what a machine with a GPU, but without Rust, needs to test and time the kernels.
#
#   tools/bundle.sh            builds, and fills .dist/ anew
#   .dist/run.sh --help        there: what it tests, and within which time
#
# The binary carries its own cubins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Reports name the commit that they are about.
WARPSTEP_COMMIT=$(git describe --always --abbrev=12 --dirty --exclude='*')
export WARPSTEP_COMMIT
# A bundle without GPU kernels would be for nothing.
messages=$(WARPSTEP_REQUIRE_CUBINS=1 cargo build --release --locked --message-format=json-render-diagnostics)
read -r binary out < <(python3 -c '
import json, sys
binary = out = ""
for message in map(json.loads, sys.stdin):
    if message.get("executable") and message["target"]["name"] == "warpstep":
        binary = message["executable"]
    if message["reason"] == "build-script-executed" and "/warpstep-" in message["out_dir"]:
        out = message["out_dir"]
print(binary, out)' <<<"$messages")

rm -rf .dist
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir -p .dist "$stage"/bundle
strip -o "$stage"/bundle/warpstep "$binary"
cp "$out"/ptxas-report.txt tools/peers.py tools/plot.py "$stage"/bundle/
# What the emulated device draws: there it is seen whether the GPU's picture is right.
cp tools/demo/circle.png "$stage"/bundle/picture.png
printf '%s\n' "$WARPSTEP_COMMIT" >"$stage"/bundle/COMMIT
cp -R tests/golden "$stage"/bundle/golden
# Cases whose model is not in tests/golden, or only in part: they cannot run from here.
rm -rf "$stage"/bundle/golden/{gqa5-b,demo128} "$stage"/bundle/golden/cases/{*gqa5-b*,demo_*}
# Kernels with one thing changed, to be timed beside those in the binary by the steps of these names in run.sh.
nvcc=${NVCC:-.cuda/nvidia/cu13/bin/nvcc}
try() { # try NAME FILE FROM TO MODULE...: the modules, with TO in place of FROM in FILE
    local sources=$stage/sources images=$stage/bundle/try-$1 file=$2 from=$3 to=$4 module
    shift 4
    rm -rf "$sources"
    cp -R kernels "$sources"
    sed --in-place "s/$from/$to/" "$sources/$file"
    if cmp --quiet "kernels/$file" "$sources/$file"; then
        echo "kernels/$file has no $from" >&2
        exit 1
    fi
    mkdir "$images"
    for module; do
        "$nvcc" -std=c++20 -O3 --expt-relaxed-constexpr -cubin -gencode=arch=compute_90a,code=sm_90a -I "$sources" \
            "$sources/$module.cu" -o "$images/$module.cubin"
    done
}
# Products ask for nothing ahead of the next ones.
try no-ahead stream.cuh 'kNextSteps = 8;' 'kNextSteps = 0;' qkv o_proj gate_up down
# Two blocks of attention fit beside those of a product, for one more latency of L2 at its end.
try attention-8 attention_mma.cu 'kAhead = 16;' 'kAhead = 8;' attention_mma

# Packed, because the emulated kernels in the binary take half the room that way.
tar --create --gzip --file .dist/bundle.tar.gz --directory "$stage" bundle
cp tools/run-bundle.sh .dist/run.sh
bytes=$(du -sb .dist | cut -f1)
echo ".dist: $bytes bytes, at most $((28 << 20))"
((bytes < 28 << 20))
