#!/usr/bin/env bash
# Formats what this repository holds in Rust, CUDA and C++: `tools/format.sh`, or `tools/format.sh --check`, which
# changes nothing and fails if something would change. Needs tools/setup.sh, whose clang-format is the pinned one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CLANG_FORMAT=.check/clang_format/data/bin/clang-format
rust=() clang=(-i)
case ${1-} in
    "") ;;
    --check) rust=(--check) clang=(--dry-run --Werror) ;;
    *)
        echo "usage: tools/format.sh [--check]" >&2
        exit 2
        ;;
esac
[[ -x $CLANG_FORMAT ]] || { echo "format: no $CLANG_FORMAT: run tools/setup.sh first" >&2; exit 1; }
cargo fmt "${rust[@]}"
git ls-files -z -- 'kernels/*.cu' 'kernels/*.cuh' 'kernels/*.cpp' 'kernels/*.h' 'kernels/*.hpp' |
    xargs -0 "$CLANG_FORMAT" "${clang[@]}"
