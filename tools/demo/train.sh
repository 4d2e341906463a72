#!/bin/sh
# Trains the demo model from nothing: tokenizer, VAE, transformer with flow head; writes a complete model directory.
#
#   tools/demo/train.sh RUN_DIR [VAE_MINUTES [MODEL_MINUTES]]
#
# Run it again after an interruption: every stage resumes where it stopped. START=MODEL_DIR takes tokenizer, VAE and
# first weights from an earlier model and trains the transformer only. PLAN names a plan of train.py: `small` from
# nothing and `above` from earlier weights unless it is set, of 64x64 pictures; `full` and `square` are of 128x128.
set -eu

run=${1:?usage: train.sh RUN_DIR [VAE_MINUTES [MODEL_MINUTES]]}
vae_minutes=${2:-40}
model_minutes=${3:-240}
plan=${PLAN:-${START:+above}}
plan=${plan:-small}
case $plan in
    full | square) size=128x128 ;;
    *) size=64x64 ;;
esac
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
    ${START:+--start "$START"} --plan "$plan" --minutes "$model_minutes"

mkdir -p "$run/model/vae"
cp "$run/transformer/export/"* "$run/model/"
cp "$vae/config.json" "$vae/model.safetensors" "$run/model/vae/"
"$python" "$here/evaluate.py" "$run/model" --size "$size" --captions 240 --sheet "$run/sheet.png"
