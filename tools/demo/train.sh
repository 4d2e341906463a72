#!/bin/sh
# Trains the demo model from nothing: tokenizer, VAE, transformer with flow head; writes a complete model directory.
#
#   tools/demo/train.sh RUN_DIR [VAE_MINUTES [MODEL_MINUTES]]
#
# Run it again after an interruption: every stage resumes where it stopped. START=MODEL_DIR takes tokenizer, VAE and
# first weights from an earlier model and trains the transformer only. PLAN=square trains 128x128 captions alone.
set -eu

run=${1:?usage: train.sh RUN_DIR [VAE_MINUTES [MODEL_MINUTES]]}
vae_minutes=${2:-40}
model_minutes=${3:-240}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$run"

# One OpenMP thread beats two on a shared machine, and glibc's defaults return every activation to the kernel.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

if [ -n "${START:-}" ]; then
    tokenizer=$START
    vae=$START/vae
else
    tokenizer=$run/tokenizer
    vae=$run/vae/export
    [ -f "$tokenizer/tokenizer.json" ] || "$python" "$here/tokenizer.py" "$tokenizer"
    "$python" "$here/train_vae.py" --run "$run/vae" --minutes "$vae_minutes"
fi
"$python" "$here/train.py" --run "$run/transformer" --vae "$vae" --tokenizer "$tokenizer" \
    ${START:+--start "$START"} --plan "${PLAN:-full}" --minutes "$model_minutes"

mkdir -p "$run/model/vae"
cp "$run/transformer/export/"* "$run/model/"
cp "$vae/config.json" "$vae/model.safetensors" "$run/model/vae/"
"$python" "$here/evaluate.py" "$run/model" --captions 240 --sheet "$run/sheet.png"
