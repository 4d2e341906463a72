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
cp "$out"/ptxas-report.txt tools/peers.py tools/plot.py tools/likeness.py "$stage"/bundle/
# What the emulated device draws: there it is seen whether the GPU's picture is right.
cp tools/demo/circle.png "$stage"/bundle/picture.png
printf '%s\n' "$WARPSTEP_COMMIT" >"$stage"/bundle/COMMIT
cp -R tests/golden "$stage"/bundle/golden
# Cases whose model is not in tests/golden, or only in part: they cannot run from here.
rm -rf "$stage"/bundle/golden/{gqa5-b,demo128} "$stage"/bundle/golden/cases/{*gqa5-b*,demo_*}
# What may make tokens faster or slower, for its step in run.sh: products that ask for nothing ahead of the next ones.
cp -R kernels "$stage"/kernels
sed --in-place 's/kNextSteps = 8;/kNextSteps = 0;/' "$stage"/kernels/stream.cuh
if cmp --quiet kernels/stream.cuh "$stage"/kernels/stream.cuh; then
    echo "kernels/stream.cuh has no kNextSteps = 8 to leave out" >&2
    exit 1
fi
mkdir "$stage"/bundle/try-no-ahead
nvcc=${NVCC:-.cuda/nvidia/cu13/bin/nvcc}
for op in qkv o_proj gate_up down; do
    "$nvcc" -std=c++20 -O3 --expt-relaxed-constexpr -cubin -gencode=arch=compute_90a,code=sm_90a -I "$stage"/kernels \
        "$stage"/kernels/$op.cu -o "$stage"/bundle/try-no-ahead/$op.cubin
done

# Packed, because the emulated kernels in the binary take half the room that way.
tar --create --gzip --file .dist/bundle.tar.gz --directory "$stage" bundle
cp tools/run-bundle.sh .dist/run.sh
bytes=$(du -sb .dist | cut -f1)
echo ".dist: $bytes bytes, at most $((28 << 20))"
((bytes < 28 << 20))
