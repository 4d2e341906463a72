#!/usr/bin/env bash
# Runs tests in an instrumented build of the emulated device:
#
#   tools/emulator-test.sh asan                      all tests of the emulator, ops and primitives, for overruns
#   tools/emulator-test.sh race --test ops           data races, uninitialised shared memory, launch hazards
#   tools/emulator-test.sh count --test byte_audit   bytes per buffer and launch
#
# Further arguments go to `cargo test`. WARPSTEP_CASES=TEXT keeps op cases whose name contains TEXT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=${1:-}
case $build in
    asan | race | count) shift ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
if (($# == 0)); then
    set -- --test emulator --test ops --test conformance
fi
# Kernels are compiled for the host alone: the GPU images are the same in every build.
export WARPSTEP_EMULATOR=$build NVCC=none WARPSTEP_REQUIRE_CUBINS=0
exec cargo test --release "$@"
