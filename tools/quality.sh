#!/usr/bin/env bash
# Judges pictures that warpstep draws from captions of the demo model's grammar:
#
#   tools/quality.sh [--captions N] [--kind one|two|row|mixed] [--seed S] [--out DIR] [--compare DIR2]
#                    [--sheet FILE] [--strict] [-- OPTIONS of warpstep generate ...]
#
#   tools/quality.sh --captions 8 --kind one
#   tools/quality.sh --captions 120 --out f32 -- --precision f32
#   tools/quality.sh --captions 120 --out bf16 --compare f32 -- --precision bf16
#
# Draws N captions (24) that training has not seen, of one kind or of all (mixed), from seed S (1), gives picture i the
# noise of seed S + i, writes pictures and captions.tsv into DIR (a new temporary folder), prints the table of
# tools/demo/check.py with standard errors, and the failures. --compare also lists the captions whose verdict differs
# from DIR2, a folder of the same captions made by this script or by `tools/demo/evaluate.py --save`. --sheet also writes
# the pictures side by side (PNG). --strict exits with 1 unless every picture is right.
#
# WARPSTEP names the binary (target/release/warpstep), PYTHON an interpreter with numpy, scipy and pillow (python3,
# with what tools/setup.sh installed).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
warpstep=${WARPSTEP:-$root/target/release/warpstep}
# The packages in .check belong to the machine's own python3: another interpreter brings its own.
if [[ -z ${PYTHON:-} && -d $root/.check ]]; then
    export PYTHONPATH=$root/.check
fi
check=("${PYTHON:-python3}" "$root/tools/demo/check.py")

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

captions=24 kind=mixed seed=1 out='' compare='' sheet='' last=()
while (($#)); do
    case $1 in
        --help | -h)
            usage
            exit
            ;;
        --)
            shift
            break
            ;;
        --strict)
            last+=(--strict)
            shift
            ;;
        --captions | --kind | --seed | --out | --compare | --sheet)
            (($# > 1)) || { echo "quality.sh: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        *)
            echo "quality.sh: unknown argument $1; options of warpstep generate come after --" >&2
            usage >&2
            exit 2
            ;;
    esac
done
for number in captions seed; do
    [[ ${!number} =~ ^[0-9]+$ ]] || { echo "quality.sh: --$number ${!number} is not a number" >&2; exit 2; }
done
((captions > 0)) || { echo "quality.sh: --captions 0 leaves nothing to judge" >&2; exit 2; }
[[ -x $warpstep ]] || { echo "quality.sh: no $warpstep: run cargo build --release, or set WARPSTEP" >&2; exit 2; }
# Said now, not after all pictures are made.
[[ -z $compare || -f $compare/captions.tsv ]] || { echo "quality.sh: no $compare/captions.tsv" >&2; exit 2; }

out=${out:-$(mktemp -d)}
mkdir -p "$out"
mapfile -t texts < <("${check[@]}" --draw "$captions" --kind "$kind" --seed "$seed")
((${#texts[@]} == captions)) || { echo "quality.sh: check.py drew no captions" >&2; exit 1; }
# Left over from an earlier run, they would be judged as this one's.
rm -f "$out"/captions.tsv "$out"/[0-9][0-9][0-9][0-9].png
began=$SECONDS
for i in "${!texts[@]}"; do
    name=$(printf '%04d.png' "$i")
    if ! log=$("$warpstep" generate "${texts[i]}" -o "$out/$name" --seed $((seed + i)) "$@" 2>&1); then
        printf 'quality.sh: warpstep failed on "%s":\n%s\n' "${texts[i]}" "$log" >&2
        exit 1
    fi
    printf '%s\t%s\n' "$name" "${texts[i]}" >>"$out/captions.tsv"
    made=$((i + 1))
    left=$(((SECONDS - began) * (captions - made) / made))
    printf '%d of %d pictures, %d min %02d s left\n' "$made" "$captions" $((left / 60)) $((left % 60)) >&2
done
echo "$out: $captions captions, kind $kind, seed $seed, generate ${*:-with its defaults}"
if [[ -n $compare ]]; then
    "${check[@]}" "$out" --compare "$compare"
fi
[[ -z $sheet ]] || last+=(--sheet "$sheet")
"${check[@]}" "$out" "${last[@]}"
