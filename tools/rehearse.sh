#!/usr/bin/env bash
# Runs the program as on a GPU machine, but without a GPU: every call goes through the CUDA device to a stand-in for the
# driver's library (tests/cuda_stub) that runs each launch in the emulator, as late as a driver may. Everything that the
# host does on a GPU happens; times mean nothing.
#
#   tools/rehearse.sh ARGUMENT...     e.g. bench --device cuda --synthetic tiny --repeat 2 --seconds 0.2
#
# WARPSTEP_STUB sets the GPU up: sms, total (bytes of memory), l2, ... (tests/cuda_stub/state.hpp). The default has little
# memory, because the ceilings that benches measure are as large as it allows.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
(($#)) || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2; }
work=$root/target/rehearse
mkdir -p "$work"
"${CXX:-c++}" -std=c++17 -O1 -shared -fPIC -o "$work"/libcuda.so.1 "$root"/tests/cuda_stub/driver.cpp -ldl
(
    cd "$root"
    # The stand-in looks for the emulator in the program, which must export it. The next build links the usual one again;
    # the copy stays.
    exported=()
    for symbol in find launch; do exported+=(-C "link-arg=-Wl,--export-dynamic-symbol=warpstep_emu_$symbol"); done
    cargo rustc --release --locked --bin warpstep -- "${exported[@]}" >&2
    cp target/release/warpstep "$work"/warpstep
)
export WARPSTEP_CUDA_LIBRARY=$work/libcuda.so.1
export WARPSTEP_STUB=execute=1,quiet=1,${WARPSTEP_STUB:-sms=4,l2=65536,total=100000000}
exec "$work"/warpstep "$@"
