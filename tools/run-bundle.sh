#!/usr/bin/env bash
# Tests and times a bundle (tools/bundle.sh) on this machine, most telling first, within a time budget:
#
#   ./run.sh [--out DIR] [--results DIR] [--minutes N] [--device cuda|emulated] [--quick]
#
#   --out DIR      where the reports go: summary.txt, summary.json and one file per step (default: report)
#   --results DIR  where what was measured goes, as DATE-GPU-COMMIT-WHAT.json (default: the reports' folder); files
#                  that are worth keeping belong into benches/results
#   --minutes N    stop starting new steps, and end the one at hand, after so many minutes (default: 25)
#   --device NAME  cuda; "emulated" tries the script itself on a machine without a GPU (default: cuda)
#   --quick        small cases only, and short benches: minutes on the emulated device
#
# Steps: facts, conformance of every device primitive (its outputs are kept: conformance.safetensors belongs into
# tests/golden/conformance), every kernel against its reference, the recorded cases of the official code, a picture, the
# same picture again, the bench of the model with random weights, ten more pictures of equal numbers, what may make
# tokens faster, PyTorch on the same GPU if it is installed ($PYTHON, default python3), the bench of the kernels,
# compute-sanitizer where it is installed, and the 14B shapes. Needs no Rust and no toolkit. The exit status is 0 when
# every step ran and passed.
#
# A kernel that hangs, or leaves the device in error, costs its own step and no more: ops are tested one process each,
# units of conformance too once they fail together, every step has a limit of its own on a GPU, and cases that fail are
# run again without dependent launches, to find out whether these are at fault: then all that follows does without too.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=report results= minutes=25 device=cuda quick=
while (($#)); do
    case $1 in
        --help | -h)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit
            ;;
        --quick)
            quick=yes
            shift
            ;;
        --out | --results | --minutes | --device)
            (($# > 1)) || { echo "run.sh: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        *)
            echo "run.sh: unknown argument $1 (--help says which there are)" >&2
            exit 2
            ;;
    esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "run.sh: --minutes $minutes is no number of minutes" >&2; exit 2; }
[[ $device == cuda || $device == emulated ]] || { echo "run.sh: --device is cuda or emulated" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
results=${results:-$out}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
tar --extract --gzip --file "$here/bundle.tar.gz" --directory "$here" || exit 2
bundle=$here/bundle
warpstep=$bundle/warpstep
python=${PYTHON:-python3}
# Cases take gigabytes for a moment: glibc keeps them for the next one, instead of having the kernel clear new ones.
export GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592
# Where a toolkit puts compute-sanitizer.
PATH=$PATH:/usr/local/cuda/bin
gpu=$device
if [[ $device == cuda ]] && command -v nvidia-smi >/dev/null; then
    gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | sed 's/^NVIDIA //; s/[^A-Za-z0-9.]\+/-/g')
fi
stem=$results/$(date -u +%Y%m%d)-$gpu-$(<"$bundle"/COMMIT)
deadline=$((SECONDS + minutes * 60))
names=() states=() seconds=() lines=()

note() { # note NAME STATE SECONDS LAST_LINE
    names+=("$1") states+=("$2") seconds+=("$3") lines+=("$4")
    printf '%-22s %-8s %5d s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$out/summary.txt"
}

step() { # step NAME SECONDS COMMAND...: runs it within the time left, at most SECONDS on a GPU, and notes how it went
    local name=$1 most=$2 left=$((deadline - SECONDS)) start=$SECONDS status
    shift 2
    if ((left <= 0)); then
        note "$name" skipped 0 "no time left"
        return
    fi
    # The emulated device is slow, and finds out itself when nothing moves.
    [[ $device == emulated ]] || ((left <= most)) || left=$most
    timeout --kill-after=10 "$left" "$@" >"$out/$name.txt" 2>&1
    status=$?
    local last
    last=$(tail -n 1 "$out/$name.txt" | tr -d '\000-\037"\\' | cut -c1-200)
    case $status in
        0) note "$name" passed $((SECONDS - start)) "$last" ;;
        124 | 137) note "$name" timeout $((SECONDS - start)) "$last" ;;
        *) note "$name" FAILED $((SECONDS - start)) "exit status $status: $last" ;;
    esac
}

: >"$out/summary.txt"
if command -v nvidia-smi >/dev/null; then
    step gpu 30 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
fi
step doctor 60 "$warpstep" doctor
step conformance 60 "$warpstep" kernels conformance --device "$device" --out "$out/conformance.safetensors"
if [[ ${states[-1]} != passed ]]; then
    for unit in $("$warpstep" kernels conformance --list); do
        step "conformance-$unit" 20 "$warpstep" kernels conformance --unit "$unit" --device "$device"
    done
fi
scale=medium
[[ -z $quick ]] || scale=small
# Not --quiet: the last line says after which case a kernel hung.
for op in $("$warpstep" kernels list | sed -n 's/^\([a-z0-9_]*\): .*/\1/p'); do
    step "kernels-$op" 60 "$warpstep" kernels test --op "$op" --device "$device" --scale "$scale"
done
cases=("$bundle"/golden/cases/*)
[[ -z $quick ]] || cases=("$bundle"/golden/cases/{samplers,t2i_feb_cps_norm}.safetensors)
step cases 180 "$warpstep" verify --device "$device" "${cases[@]}"
on=(--device "$device")
if [[ ${states[-1]} != passed && $device == cuda ]]; then
    step cases-full-edges 120 "$warpstep" verify "${on[@]}" --no-dependent-launch "${cases[@]}"
    [[ ${states[-1]} != passed ]] || on+=(--no-dependent-launch)
fi
picture=(generate "a red circle on a blue background" --seed 1 "${on[@]}")
step picture 60 "$warpstep" "${picture[@]}" -o "$out/picture.png"
# The same request again must give the same bytes.
step picture-again 60 "$warpstep" "${picture[@]}" -o "$out/again.png"
step same-bytes 10 cmp "$out/picture.png" "$out/again.png"
# Without --device cuda both are small and say that their times mean nothing.
bench=(bench "${on[@]}" --format json)
[[ $device == cuda ]] && bench+=(--synthetic 14b --pictures 3)
[[ -z $quick ]] || bench+=(--repeat 3 --seconds 0.2)
step bench 240 "$warpstep" "${bench[@]}" --output "$stem-model.json"
# Of the same numbers again and again: more than 10,000 tokens of the true shapes, but for the number of layers, without
# a hang or another bit.
soak=(bench "${on[@]}" --positions "" --repeat 1 --pictures 10)
[[ $device == cuda ]] && soak+=(--synthetic 14b --layers 2 --sizes 512x512)
step soak 120 "$warpstep" "${soak[@]}"
# What may make tokens faster (benches/JOURNAL.md), each beside nothing but itself; the bench above has the same row.
token=(bench "${on[@]}" --sizes "" --seconds 1 --format json)
[[ $device == cuda ]] && token+=(--synthetic 14b --positions 1024)
rings=()
for op in qkv o_proj gate_up down out_proj linear; do rings+=(--kernel "$op=ring"); done
step try-carveout 60 "$warpstep" "${token[@]}" --shared-carveout 100 --output "$stem-carveout.json"
step try-ring 60 "$warpstep" "${token[@]}" "${rings[@]}" --output "$stem-ring.json"
step try-both 60 "$warpstep" "${token[@]}" --shared-carveout 100 "${rings[@]}" --output "$stem-both.json"
if "$python" -c 'import torch' 2>/dev/null; then
    peers=("$bundle"/peers.py --output "$stem-peers.json")
    [[ ! -f $stem-model.json ]] || peers+=(--ours "$stem-model.json")
    [[ $device == cuda ]] || peers+=(--toy)
    step peers 240 "$python" "${peers[@]}"
fi
bench=(kernels bench "${on[@]}" --format json)
[[ -z $quick ]] || bench+=(--repeat 3 --seconds 0.05)
[[ $device == cuda || -n $quick ]] && bench+=(--dtype bf16)
step bench-kernels 300 "$warpstep" "${bench[@]}" --output "$stem-kernels.json"
if "$python" -c 'import matplotlib' 2>/dev/null; then
    step plots 60 "$python" "$bundle"/plot.py --out "$out/plots" "$stem"-*.json
fi
if command -v compute-sanitizer >/dev/null && [[ $device == cuda ]]; then
    for tool in memcheck racecheck synccheck initcheck; do
        step "sanitizer-$tool" 180 compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$warpstep" kernels test --scale small --quiet "${on[@]}"
    done
fi
# Last: the references of these shapes take the host minutes.
[[ -n $quick ]] || step kernels-14b 900 "$warpstep" kernels test --scale real --only-scale "${on[@]}"

failed=0
{
    printf '{"device": "%s", "version": "%s", "steps": [' "$device" "$("$warpstep" --version)"
    for i in "${!names[@]}"; do
        ((i == 0)) || printf ', '
        printf '{"name": "%s", "state": "%s", "seconds": %d, "last_line": "%s"}' \
            "${names[i]}" "${states[i]}" "${seconds[i]}" "${lines[i]}"
        [[ ${states[i]} == passed ]] || failed=$((failed + 1))
    done
    printf ']}\n'
} >"$out/summary.json"
printf '%d steps, %d not passed; reports in %s\n' "${#names[@]}" "$failed" "$out" | tee -a "$out/summary.txt"
exit $((failed > 0))
