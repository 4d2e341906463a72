#!/usr/bin/env bash
# Makes again what the README shows of the demo model: the picture, the edit, the table of reconstructions (printed, to
# be pasted). To be run when the demo model's weights have changed.
#
#   tools/readme.sh
#
# WARPSTEP names the binary (target/release/warpstep).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
warpstep=${WARPSTEP:-target/release/warpstep}
decoded=$(mktemp -d)
trap 'rm -rf "$decoded"' EXIT
cd tools/demo
case $warpstep in /*) ;; *) warpstep=../../$warpstep ;; esac
"$warpstep" generate "a red circle on a blue background" --seed 1 -o circle.png
"$warpstep" edit circle.png "make the circle black" --cfg 3 --cfg-img 1.5 --seed 1 -o black.png
"$warpstep" reconstruct pictures -o "$decoded/decoded.png"
