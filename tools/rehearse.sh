#!/usr/bin/env bash
# Runs the program, or a bundle, as on a GPU machine, but without a GPU: every call goes through the CUDA device to a
# stand-in for the driver's library (tests/cuda_stub) that runs each launch in the emulator, as late as a driver may.
# Everything that the host does on a GPU happens; times mean nothing.
#
#   tools/rehearse.sh warpstep ARGUMENT...     e.g. warpstep bench --device cuda --synthetic tiny
#   tools/rehearse.sh bundle ARGUMENT...       tools/bundle.sh's .dist/run.sh, e.g. bundle --quick --out /tmp/report
#
# WARPSTEP_STUB sets the GPU up: sms, total (bytes of memory), l2, ... (tests/cuda_stub/state.hpp). The default has little
# memory, because the ceilings that benches measure are as large as it allows.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
what=${1:-}
[[ $what == warpstep || $what == bundle ]] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2; }
shift
work=$root/target/rehearse
mkdir -p "$work"
"${CXX:-c++}" -std=c++17 -O1 -shared -fPIC -o "$work"/libcuda.so.1 "$root"/tests/cuda_stub/driver.cpp -ldl
export WARPSTEP_CUDA_LIBRARY=$work/libcuda.so.1
export WARPSTEP_STUB=execute=1,quiet=1,${WARPSTEP_STUB:-sms=4,l2=65536,total=100000000}
(
    cd "$root"
    # In a folder of its own: a program with other link arguments.
    args=()
    for symbol in find launch; do args+=(-C "link-arg=-Wl,--export-dynamic-symbol=warpstep_emu_$symbol"); done
    cargo rustc --release --locked --bin warpstep -- "${args[@]}" >&2
    cp target/release/warpstep "$work"/warpstep
)
if [[ $what == warpstep ]]; then
    exec "$work"/warpstep "$@"
fi
# A copy of the bundle whose program exports what the stand-in needs.
rm -rf "$work"/dist
mkdir -p "$work"/dist/unpacked
tar --extract --gzip --file "$root"/.dist/bundle.tar.gz --directory "$work"/dist/unpacked
cp "$work"/warpstep "$work"/dist/unpacked/bundle/warpstep
tar --create --gzip --file "$work"/dist/bundle.tar.gz --directory "$work"/dist/unpacked bundle
cp "$root"/tools/run-bundle.sh "$work"/dist/run.sh
exec "$work"/dist/run.sh "$@"
