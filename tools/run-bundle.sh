#!/usr/bin/env bash
# Tests and times a bundle (tools/bundle.sh) on this machine, most telling first, within a time budget:
#
#   ./run.sh [--out DIR] [--results DIR] [--minutes N] [--steps REGEX] [--device cuda|emulated] [--quick]
#            [--no-dependent-launch]
#
#   --out DIR      where the reports go: summary.txt, summary.json and one file per step (default: report)
#   --results DIR  where what was measured goes, as DATE-GPU-COMMIT-WHAT.json (default: the reports' folder), and
#                  report.tar.gz, which holds all of both folders and is kept current after every step; JSON that is
#                  worth keeping belongs into benches/results
#   --minutes N    stop starting new steps, and end the one at hand, after so many minutes (default: 9)
#   --steps REGEX  only steps whose name matches, e.g. '^(conformance|kernels)'; what a failed step is run again as has
#                  its name with more behind it (conformance-UNIT, kernels-OP)
#   --device NAME  cuda; "emulated" tries the script itself on a machine without a GPU (default: cuda)
#   --quick        small cases only, and short benches: minutes on the emulated device
#   --no-dependent-launch
#                  launch nothing before its predecessors have ended, from cases on: for a second call, after a first
#                  one has found dependent launches at fault
#
# Steps, in this order:
#   gpu doctor      facts
#   conformance     every device primitive (conformance.safetensors belongs into tests/golden/conformance)
#   kernels         every kernel against its reference
#   cases           recorded cases of the official code
#   picture         a picture of the demo model, again, without dependent launches, and beside the emulated device's
#   graphs          the bits of a picture of the 14B's shapes, with and without dependent launches
#   kernels-14b     every kernel at the 14B's shapes; their references take the host minutes
#   memcheck        compute-sanitizer, op by op, where it is installed
#   bench           the model with random weights
#   soak            ten pictures of equal numbers
#   try-...         what may make tokens faster
#   peers           PyTorch on the same GPU, if it is installed ($PYTHON, default python3)
#   bench-kernels   every kernel's time
#   memcheck and racecheck, synccheck, initcheck: what is left of compute-sanitizer
#   plots           of all results, where matplotlib is installed
#
# Needs no Rust and no toolkit. The exit status is 0 when every step ran and passed, or cannot run on this machine.
#
# A kernel that hangs, or leaves the device in error, costs its own step and no more: ops are tested one process each,
# units of conformance too, once they fail together; every step has a limit of its own on a GPU. Where cases fail, or
# pictures are others, with dependent launches only, all that follows does without them.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=report results= minutes=9 steps= device=cuda quick= full_edges=
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
        --no-dependent-launch)
            full_edges=yes
            shift
            ;;
        --out | --results | --minutes | --steps | --device)
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
[[ '' =~ $steps ]]
(($? < 2)) || { echo "run.sh: --steps $steps is no regular expression" >&2; exit 2; }
deadline=$((SECONDS + minutes * 60))
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
    # While nobody holds it open, a GPU may be set up anew for every process.
    nvidia-smi -l 60 >"$out/nvidia-smi.txt" 2>&1 &
    trap "kill $! 2>/dev/null" EXIT
fi
stem=$results/$(date -u +%Y%m%d)-$gpu-$(<"$bundle"/COMMIT)
version=$("$warpstep" --version)
names=() states=() seconds=() lines=() failed=0

summary() { # all steps so far as JSON
    printf '{"device": "%s", "version": "%s", "steps": [' "$device" "$version"
    for i in "${!names[@]}"; do
        ((i == 0)) || printf ', '
        printf '{"name": "%s", "state": "%s", "seconds": %d, "last_line": "%s"}' \
            "${names[i]}" "${states[i]}" "${seconds[i]}" "${lines[i]}"
    done
    printf ']}\n'
}

keep() { # all that is known so far, in one file: this machine may be gone before the last step
    local what=(--exclude 'report.tar.gz*' --directory "$out" .) file
    if [[ $results != "$out" ]]; then
        for file in "$stem"-*.json; do
            [[ ! -f $file ]] || what+=(--directory "$results" "${file##*/}")
        done
    fi
    # What is written meanwhile makes tar complain, and is whole after the next step.
    tar --create --gzip --file "$results/report.tar.gz.new" "${what[@]}" 2>/dev/null
    mv "$results/report.tar.gz.new" "$results/report.tar.gz"
}

note() { # note NAME STATE SECONDS LAST_LINE
    names+=("$1") states+=("$2") seconds+=("$3") lines+=("$4")
    [[ $2 == passed || $2 == unable ]] || failed=$((failed + 1))
    printf '%-22s %-8s %5d s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$out/summary.txt"
    summary >"$out/summary.json"
    keep
}

# step NAME SECONDS COMMAND...: runs it within the time left, at most SECONDS on a GPU, and notes how it went. Returns 0
# if it passed, 1 if it did not, 2 if it was not asked for or could not run. A failure whose output matches $excuse is
# none.
step() {
    local name=$1 most=$2 left=$((deadline - SECONDS)) start=$SECONDS status last reason
    shift 2
    [[ $name =~ $steps ]] || return 2
    if ((left <= 0)); then
        note "$name" skipped 0 "no time left"
        return 2
    fi
    # The emulated device is slow, and finds out itself when nothing moves.
    [[ $device == emulated ]] || ((left <= most)) || left=$most
    timeout --kill-after=10 "$left" "$@" >"$out/$name.txt" 2>&1
    status=$?
    last=$(tail -n 1 "$out/$name.txt" | plain)
    if ((status != 0)) && [[ -n ${excuse-} ]] && reason=$(grep --max-count 1 "$excuse" "$out/$name.txt"); then
        note "$name" unable $((SECONDS - start)) "$(plain <<<"$reason")"
        excused=yes
        return 2
    fi
    case $status in
        0) note "$name" passed $((SECONDS - start)) "$last" ;;
        124 | 137) note "$name" timeout $((SECONDS - start)) "$last" ;;
        *) note "$name" FAILED $((SECONDS - start)) "exit status $status: $last" ;;
    esac
    ((status == 0))
}

plain() { # what may stand in a JSON string
    tr -d '\000-\037"\\' | cut -c1-200
}

: >"$out/summary.txt"
if command -v nvidia-smi >/dev/null; then
    step gpu 30 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
fi
step doctor 60 "$warpstep" doctor
step conformance 40 "$warpstep" kernels conformance --device "$device" --out "$out/conformance.safetensors"
if (($? == 1)); then
    for unit in $("$warpstep" kernels conformance --list); do
        step "conformance-$unit" 20 "$warpstep" kernels conformance --unit "$unit" --device "$device"
    done
fi

mapfile -t ops < <("$warpstep" kernels list | sed -n 's/^\([a-z0-9_]*\): .*/\1/p')
scale=medium
[[ -z $quick ]] || scale=small
# Not --quiet: the last line says after which case a kernel hung.
step kernels 60 "$warpstep" kernels test --device "$device" --scale "$scale"
# Wrong results it has counted to the end. After a hang or an error of the device, the ops from there on are left.
if (($? == 1)) && ! tail -n 1 "$out/kernels.txt" | grep --quiet --extended-regexp '^[0-9]+ passed, [0-9]+ failed$'; then
    reached=$(sed -n 's/^\([a-z0-9_]*\) .*: \(ok\|FAIL\).*/\1/p' "$out/kernels.txt" | tail -n 1)
    for op in "${ops[@]}"; do
        [[ -z $reached || $op == "$reached" ]] || continue
        reached=
        step "kernels-$op" 30 "$warpstep" kernels test --op "$op" --device "$device" --scale "$scale"
    done
fi

on=(--device "$device")
[[ -z $full_edges ]] || on+=(--no-dependent-launch)
whole=(--device "$device")
# The emulated device has no dependent launches to leave out.
[[ $device != cuda ]] || whole+=(--no-dependent-launch)
at_fault() { # WHAT is right without dependent launches only: all that follows does without them
    [[ -z $full_edges ]] || return
    full_edges=yes
    on=("${whole[@]}")
    note no-dependent-launch FAILED 0 "$1: dependent launches are at fault, and left out from here on"
}
cases=("$bundle"/golden/cases/*)
[[ -z $quick ]] || cases=("$bundle"/golden/cases/{samplers,t2i_feb_cps_norm}.safetensors)
step cases 120 "$warpstep" verify "${on[@]}" "${cases[@]}"
if (($? == 1)) && [[ $device == cuda && -z $full_edges ]]; then
    step cases-full-edges 120 "$warpstep" verify "${whole[@]}" "${cases[@]}" && at_fault cases
fi

# Pictures are made by graphs, which nothing before has run. Equal requests must give equal bytes, with dependent
# launches or without; whether they are right is seen beside the emulated device's picture, which other roundings keep
# from being the same one.
picture=(generate "a red circle on a blue background" --seed 1)
alike=("$warpstep" compare --at-least 40 "$bundle/picture.png")
step picture 60 "$warpstep" "${picture[@]}" "${on[@]}" -o "$out/picture.png"
made=$? right=$made same=$made
if ((made == 0)); then
    step picture-right 20 "${alike[@]}" "$out/picture.png"
    right=$?
    step picture-again 60 "$warpstep" "${picture[@]}" "${on[@]}" -o "$out/again.png" &&
        step picture-same-bytes 10 cmp "$out/picture.png" "$out/again.png"
fi
if ((made < 2)) && [[ -z $full_edges ]] &&
    step picture-full-edges 60 "$warpstep" "${picture[@]}" "${whole[@]}" -o "$out/full-edges.png"; then
    if ((made == 0)); then
        step picture-same-full-edges 10 cmp "$out/picture.png" "$out/full-edges.png"
        same=$?
    fi
    if ((right == 1 || same == 1)); then
        step picture-full-edges-right 20 "${alike[@]}" "$out/full-edges.png" && at_fault picture
    fi
fi
# The demo model runs few of the kernels in the geometry of the 14B: that has no picture to be compared with, but bits.
graphs=(bench --positions "" --pictures 1 --repeat 3 --seconds 0.2)
if [[ $device == cuda ]]; then graphs+=(--synthetic 14b --layers 2 --sizes 256x256); else graphs+=(--sizes 32x32); fi
if [[ -z $full_edges ]] && step graphs 60 "$warpstep" "${graphs[@]}" "${on[@]}" &&
    step graphs-full-edges 60 "$warpstep" "${graphs[@]}" "${whole[@]}"; then
    grep --only-matching 'bits [0-9a-f]\{16\}' "$out/graphs.txt" >"$out/graphs-bits.txt"
    step graphs-same-bits 10 grep --quiet --file "$out/graphs-bits.txt" "$out/graphs-full-edges.txt"
    (($? != 1)) || at_fault graphs
fi

[[ -n $quick ]] || step kernels-14b 150 "$warpstep" kernels test --scale real --only-scale "${on[@]}"

declare -A sanitized=()
sanitizer=
[[ $device != cuda ]] || sanitizer=$(command -v compute-sanitizer)
sanitize() { # sanitize TOOL SECONDS: what it has not seen yet of the ops, each in a process of its own, within SECONDS
    local tool=$1 end=$((SECONDS + $2)) op excused=
    [[ -n $sanitizer ]] || return
    for op in "${ops[@]}"; do
        [[ -z ${sanitized[$tool-$op]-} && $tool-$op =~ $steps ]] || continue
        ((SECONDS < end)) || return
        sanitized[$tool-$op]=yes
        # A machine that lends its GPU may not lend it to debuggers: the first op tells.
        excuse='[Dd]evice not supported' step "$tool-$op" 40 "$sanitizer" --tool "$tool" --error-exitcode 99 \
            "$warpstep" kernels test --op "$op" --scale small "${on[@]}"
        if [[ -n $excused ]]; then
            for op in "${ops[@]}"; do sanitized[$tool-$op]=yes; done
            return
        fi
    done
}
sanitize memcheck 90

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
# What may make tokens faster (benches/JOURNAL.md), each beside nothing but itself; the bench above has the same row. A
# variant that is named is taken for the prompt as well, and ring does at most two rows.
token=(bench "${on[@]}" --prompt 1 --sizes "" --seconds 1 --format json)
[[ $device == cuda ]] && token+=(--synthetic 14b --positions 1024)
carveout=()
[[ $device == cuda ]] && carveout=(--shared-carveout 100)
rings=()
for op in qkv o_proj gate_up down out_proj linear; do rings+=(--kernel "$op=ring"); done
step try-carveout 60 "$warpstep" "${token[@]}" "${carveout[@]}" --output "$stem-carveout.json"
# Kernels with one thing changed (tools/bundle.sh).
for try in no-ahead attention-8; do
    images=()
    [[ $device == cuda ]] && images=(--cubins "$bundle/try-$try")
    step "try-$try" 60 "$warpstep" "${token[@]}" "${images[@]}" --output "$stem-$try.json"
done
step try-ring 60 "$warpstep" "${token[@]}" "${rings[@]}" --output "$stem-ring.json"
step try-both 60 "$warpstep" "${token[@]}" "${carveout[@]}" "${rings[@]}" --output "$stem-both.json"

has() { # whether Python has this module, without importing it
    "$python" -c "import importlib.util as u; raise SystemExit(u.find_spec('$1') is None)" 2>/dev/null
}
if has torch; then
    peers=("$bundle"/peers.py --seconds 150 --output "$stem-peers.json")
    [[ ! -f $stem-model.json ]] || peers+=(--ours "$stem-model.json")
    [[ $device == cuda ]] || peers+=(--toy)
    step peers 240 "$python" "${peers[@]}"
fi
bench=(kernels bench "${on[@]}" --format json)
[[ -z $quick ]] || bench+=(--repeat 3 --seconds 0.05)
[[ $device == cuda || -n $quick ]] && bench+=(--dtype bf16)
step bench-kernels 300 "$warpstep" "${bench[@]}" --output "$stem-kernels.json"
for tool in memcheck racecheck synccheck initcheck; do
    sanitize "$tool" $((deadline - SECONDS))
    left=()
    for op in "${ops[@]}"; do
        [[ -z $sanitizer || -n ${sanitized[$tool-$op]-} ]] || ! [[ $tool-$op =~ $steps ]] || left+=("$op")
    done
    ((${#left[@]} == 0)) || note "$tool" skipped 0 "no time left for ${left[*]}"
done
if has matplotlib && compgen -G "$stem-*.json" >/dev/null; then
    step plots 60 "$python" "$bundle"/plot.py --out "$out/plots" "$stem"-*.json
fi
printf '%d steps, %d not passed; reports in %s\n' "${#names[@]}" "$failed" "$out" | tee -a "$out/summary.txt"
keep
exit $((failed > 0))
