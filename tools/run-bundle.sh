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
# tests/golden/conformance), every kernel against its reference, the recorded cases of the official code, the bench of
# the model with random weights, PyTorch on the same GPU where it is installed ($PYTHON, default python3), the bench of
# the kernels, a picture, the same picture again, the 14B shapes, and compute-sanitizer where it is installed. Needs no
# Rust and no toolkit. The exit status is 0 when every step ran and passed.
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

step() { # step NAME COMMAND...: runs it within the time left, keeps its output, notes how it went
    local name=$1 left=$((deadline - SECONDS)) start=$SECONDS status
    shift
    if ((left <= 0)); then
        note "$name" skipped 0 "no time left"
        return
    fi
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
    step gpu nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
fi
step doctor "$warpstep" doctor
step conformance "$warpstep" kernels conformance --device "$device" --out "$out/conformance.safetensors"
scale=medium
[[ -z $quick ]] || scale=small
step kernels "$warpstep" kernels test --device "$device" --quiet --scale "$scale"
cases=("$bundle"/golden/cases/*)
[[ -z $quick ]] || cases=("$bundle"/golden/cases/{samplers,t2i_feb_cps_norm}.safetensors)
step cases "$warpstep" verify --device "$device" "${cases[@]}"
# Without --device cuda both are small and say that their times mean nothing.
bench=(bench --device "$device" --format json)
[[ $device == cuda ]] && bench+=(--synthetic 14b --pictures 3)
[[ -z $quick ]] || bench+=(--repeat 3 --seconds 0.2)
step bench "$warpstep" "${bench[@]}" --output "$stem-model.json"
if "$python" -c 'import torch' 2>/dev/null; then
    peers=("$bundle"/peers.py --ours "$stem-model.json" --output "$stem-peers.json")
    [[ $device == cuda ]] || peers+=(--toy)
    step peers "$python" "${peers[@]}"
fi
bench=(kernels bench --device "$device" --format json)
[[ -z $quick ]] || bench+=(--repeat 3 --seconds 0.05)
[[ $device == cuda || -n $quick ]] && bench+=(--dtype bf16)
step bench-kernels "$warpstep" "${bench[@]}" --output "$stem-kernels.json"
if "$python" -c 'import matplotlib' 2>/dev/null; then
    step plots "$python" "$bundle"/plot.py --out "$out/plots" "$stem"-*.json
fi
picture=(generate "a red circle on a blue background" --seed 1 --device "$device")
step picture "$warpstep" "${picture[@]}" -o "$out/picture.png"
# The same request again must give the same bytes.
step picture-again "$warpstep" "${picture[@]}" -o "$out/again.png"
step same-bytes cmp "$out/picture.png" "$out/again.png"
[[ -n $quick ]] || step kernels-14b "$warpstep" kernels test --scale real --only-scale --device "$device" --quiet
if command -v compute-sanitizer >/dev/null && [[ $device == cuda ]]; then
    for tool in memcheck racecheck synccheck initcheck; do
        step "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$warpstep" kernels test --scale small --quiet --device "$device"
    done
fi

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
