#!/usr/bin/env bash
# Installs what is pinned in tools/requirements-*.txt into this checkout: no root, nothing outside the repository.
#
#   .cuda/         the CUDA compiler and libclang
#   .cuda-tools/   cuobjdump and nvdisasm, with which tests/fast_kernels.rs reads the kernels' instructions
#   .check/        clang-format, and what tools/demo/check.py needs to judge pictures
#
# Safe to run again: it does nothing for a folder that matches its requirements.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# install FOLDER REQUIREMENTS [PIP OPTION...]: exit status 0 if anything was installed, 1 if it was up to date.
install() {
    local folder=$1 requirements=$2 wanted
    shift 2
    wanted=$(sha256sum <"$requirements") || exit 1
    # The stamp is written last, so an interrupted install is done again.
    if [[ -f $folder/.stamp && $(<"$folder/.stamp") == "$wanted" ]]; then
        echo "setup: $folder is up to date"
        return 1
    fi
    if ! python3 -m pip --version >/dev/null 2>&1; then
        echo "setup: needs python3 with pip (or point CUDA_HOME at a CUDA 13.0 toolkit and skip this script)" >&2
        exit 1
    fi
    rm -rf "$folder"
    python3 -m pip install --quiet --no-cache-dir --no-compile --disable-pip-version-check "$@" \
        --target "$folder" --requirement "$requirements" || exit 1
    printf '%s\n' "$wanted" >"$folder/.stamp"
    echo "setup: installed $(du -sm "$folder" | cut -f1) MiB into $folder"
}

if install .cuda tools/requirements-cuda.txt --no-deps; then
    .cuda/nvidia/cu13/bin/nvcc --version | tail -n 2
    # cargo cannot watch for a compiler that was not there: have it run the build script again.
    touch build.rs
fi
install .cuda-tools tools/requirements-sass.txt --no-deps || true
install .check tools/requirements-check.txt || true
