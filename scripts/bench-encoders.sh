#!/usr/bin/env bash
# Memory of a training step with each mechanism in the encoder: examples/configs/long.yaml (2+2 layers, width 128) on a source
# of WINDOW bytes and a target of 8,192, layers recomputed in backward. The peak is that of all ranks together.
#
#   scripts/bench-encoders.sh [RANKS [WINDOW [MECHANISM ...]]]     default: 2 ranks, 1048576 bytes, all linear mechanisms
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1-} in
-h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0" && exit 0 ;;
-*) echo "bench-encoders.sh: unknown option $1 (see --help)" >&2 && exit 2 ;;
esac
ranks=${1:-2} window=${2:-1048576}
shift $(($# < 2 ? $# : 2))
[ $# -gt 0 ] || set -- local abc nystrom performer lara cosformer probsparse s4d longshort
[ -x "$root/build/longspan" ] || "$root/scripts/build.sh" >&2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

data=$root/data/kjv-web/window-$window
if [ ! -f "$data.h5" ]; then
  "$root/scripts/data/kjv-web.sh" --window "$window" "$data" >"$scratch/log"
  "$root/build/longspan" pack --train "$data/train.tsv" --valid "$data/valid.tsv" --out "$data.h5" >"$scratch/log"
fi
printf '| encoder | source | seconds of a step | peak GiB, %s ranks |\n|---|---|---|---|\n' "$ranks"
for mechanism in "$@"; do
  rm -rf "$scratch/run"
  "$root/scripts/mpirun.sh" -n "$ranks" "$root/build/longspan" train "$root/examples/configs/long.yaml" \
    --set data.path="$data.h5" --set data.max_target=8191 --set run.directory="$scratch/run" \
    --set model.encoder.mechanism="$mechanism" --set train.recompute=true --set train.steps=1 \
    --set train.evaluate_every=0 --set train.evaluate_documents=1 --set train.save_every=0 >"$scratch/log" 2>&1 ||
    { cat "$scratch/log" >&2; exit 1; }
  python3 - "$scratch/run/metrics.jsonl" "$mechanism" "$window" <<'EOP'
import json, sys
step = next(x for x in map(json.loads, open(sys.argv[1])) if "loss" in x)
print(f"| {sys.argv[2]} | {sys.argv[3]} | {step['seconds']:.1f} | {step['peak_memory_bytes'] / 2**30:.2f} |")
EOP
done
