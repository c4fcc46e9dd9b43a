#!/usr/bin/env bash
# The main job on real input: builds, makes the data set, trains a small model on 2 ranks, and lets it write the opening
# of a chapter that it has never seen. About six minutes on two cores after installation.
#
#   scripts/quickstart.sh [--set KEY=VALUE ...]      what is given goes on to `longspan train`
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
case ${1-} in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
for ((i = 1; i <= $#; i++)); do # now, not after minutes
  case ${!i} in
  --set) i=$((i + 1)) && [ $i -le $# ] || { echo "quickstart.sh: --set needs KEY=VALUE" >&2 && exit 2; } ;;
  --set=*) ;;
  *) echo "quickstart.sh: unknown option ${!i} (see --help)" >&2 && exit 2 ;;
  esac
  case ${!i#--set=} in
  run.directory=* | data.path=*) echo "quickstart.sh: ${!i}: its data and results have their places" >&2 && exit 2 ;;
  esac
done

longspan=$root/build/longspan data=$root/data/kjv-web run=$root/runs/quickstart
mpirun=$root/scripts/mpirun.sh
say() { printf '\n== %s\n' "$*"; }

say "build"
scripts/build.sh | tail -n 1

say "data: King James Version -> World English Bible, one pair for each chapter"
if [ ! -f "$data/chapters.h5" ]; then
  scripts/data/kjv-web.sh "$data"
  "$longspan" pack --train "$data/train.tsv" --valid "$data/valid.tsv" --test "$data/test.tsv" --out "$data/chapters.h5"
fi
"$longspan" inspect "$data/chapters.h5"

say "train on 2 ranks: each sequence is shared by both"
train=(train examples/configs/quickstart.yaml "$@" --set data.path="$data/chapters.h5" --set run.directory="$run")
"$mpirun" -n 2 "$longspan" "${train[@]}" --set run.directory="$run.new" --dry-run >/dev/null # before the last run goes
rm -rf "$run" && mkdir -p "$run"
"$mpirun" -n 2 "$longspan" "${train[@]}" | tee "$run/train.log"

say "write the opening of a chapter that was held out"
# the first document of the test split: name, source, target, with \n for line ends
IFS=$'\t' read -r name source target <"$data/test.tsv"
printf '%b' "$source" >"$run/source.txt"
printf '%s\n\nsource:    %b\nreference: %b\n' "$name" "${source:0:300}" "${target:0:300}" | cut -c1-600
printf 'output:    '
"$mpirun" -n 2 "$longspan" generate "$run/best.h5" --input "$run/source.txt" --max-bytes 300 --temperature 0.5 --top-k 20 --seed 1
echo

# the last line: from the metrics that rank 0 wrote
python3 - "$run/metrics.jsonl" <<'EOF'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
steps = [x for x in lines if "loss" in x]
bits = [x["valid_bits_per_byte"] for x in lines if "valid_bits_per_byte" in x][-1]
rate = sum(x["tokens"] for x in steps) / sum(x["seconds"] for x in steps)
memory = max(x["peak_memory_bytes"] for x in steps) / 2**30
print(f"quickstart: ok, validation {bits:.2f} bits per byte, {rate:.0f} tokens/s, {memory:.2f} GiB")
EOF
