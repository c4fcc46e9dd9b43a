#!/usr/bin/env bash
# Memory against length: two training steps of examples/configs/long.yaml for each window, and the peak of all ranks together.
#
#   scripts/bench-memory.sh [RANKS [WINDOW ...]]        default: 2 ranks, windows of 8K to 128K
#
# The last column is what each further position costs; a linear mechanism keeps it level.
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1-} in
-h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit 0 ;;
-*) echo "bench-memory.sh: unknown option $1 (see --help)" >&2 && exit 2 ;;
esac
ranks=${1:-2}
[ $# -lt 1 ] || shift
[ $# -gt 0 ] || set -- 8192 16384 32768 65536 131072
for number in "$ranks" "$@"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "bench-memory.sh: $number is no whole number from 1 on (see --help)" >&2 && exit 2; }
done
[ -x "$root/build/longspan" ] || "$root/scripts/build.sh" >&2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

printf '%10s %10s %10s %12s %14s %16s\n' window source target seconds 'peak MiB' 'KiB per position'
last_positions=0 last_peak=0
for window in "$@"; do
  data=$root/data/kjv-web/window-$window
  if [ ! -f "$data.h5" ]; then
    "$root/scripts/data/kjv-web.sh" --window "$window" "$data" >"$scratch/log"
    "$root/build/longspan" pack --train "$data/train.tsv" --valid "$data/valid.tsv" --out "$data.h5" >"$scratch/log"
  fi
  rm -rf "$scratch/run"
  "$root/scripts/mpirun.sh" -n "$ranks" "$root/build/longspan" train "$root/examples/configs/long.yaml" \
    --set data.path="$data.h5" --set run.directory="$scratch/run" --set train.steps=2 --set train.evaluate_every=0 \
    --set train.evaluate_documents=1 --set train.save_every=0 ${LONGSPAN_SET:+--set "$LONGSPAN_SET"} >"$scratch/log"
  read -r seconds peak <<<"$(python3 - "$scratch/run/metrics.jsonl" <<'EOF'
import json, sys
steps = [x for x in map(json.loads, open(sys.argv[1])) if "loss" in x]
print(f"{steps[-1]['seconds']:.2f} {max(x['peak_memory_bytes'] for x in steps) / 2**20:.1f}")
EOF
)"
  awk -v w="$window" -v s="$seconds" -v p="$peak" -v n="$((2 * window))" -v ln="$last_positions" -v lp="$last_peak" \
    'BEGIN { printf "%10d %10d %10d %12.2f %14.1f %16s\n", w, w, w, s, p, ln ? sprintf("%.2f", (p - lp) * 1024 / (n - ln)) : "-" }'
  last_positions=$((2 * window)) last_peak=$peak
done
