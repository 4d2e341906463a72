#!/usr/bin/env bash
# Installs the pinned CUDA compiler (and libclang) into .cuda/ of this checkout: no root, nothing outside the
# repository. Safe to run again: it does nothing while .cuda/ matches tools/requirements-cuda.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=tools/requirements-cuda.txt
wanted=$(sha256sum <"$requirements")
# The stamp is written last, so an interrupted install is done again.
if [[ -f .cuda/.stamp && $(<.cuda/.stamp) == "$wanted" ]]; then
    echo "setup: .cuda is up to date"
    exit 0
fi

if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "setup: needs python3 with pip (or point CUDA_HOME at a CUDA 13.0 toolkit and skip this script)" >&2
    exit 1
fi
rm -rf .cuda
python3 -m pip install --quiet --no-cache-dir --no-deps --no-compile --disable-pip-version-check \
    --target .cuda --requirement "$requirements"
.cuda/nvidia/cu13/bin/nvcc --version | tail -n 2
# cargo cannot watch for a compiler that was not there: have it run the build script again.
touch build.rs
printf '%s\n' "$wanted" >.cuda/.stamp
echo "setup: installed $(du -sm .cuda | cut -f1) MiB into .cuda"
