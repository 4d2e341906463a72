#!/usr/bin/env bash
# Draws the sizes that are too slow for CI on the emulated device, on the demo model in one step, and prints how long
# each took:
#
#   tools/sizes.sh [WxH ...]        # 256x256 512x512 1024x576
#
# WARPSTEP names the binary (target/release/warpstep); OPTIONS holds more options of warpstep generate.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
warpstep=${WARPSTEP:-$root/target/release/warpstep}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
(($# > 0)) || set -- 256x256 512x512 1024x576
read -ra options <<<"${OPTIONS:-}"
for size in "$@"; do
    began=$SECONDS
    "$warpstep" generate "a red circle on a blue background" --size "$size" --steps 1 --seed 1 \
        -o "$out/$size.png" "${options[@]}" 2>"$out/log" || { cat "$out/log" >&2; exit 1; }
    [[ $("$warpstep" inspect "$out/$size.png" | head -1) == *": $size pixels" ]] || { echo "$size: another size" >&2; exit 1; }
    echo "$size: $((SECONDS - began)) s: $(tail -1 "$out/log")"
done
