#!/usr/bin/env bash
# Trains a small model on the CPU and on a GPU (the second program; in the suite one that emulates it): the same losses up
# to rounding, on one rank, on two that share the GPU and on two that speak by NCCL, and checkpoints that move from one to
# the other and back. With LONGSPAN_TEST_GPU=1 the GPU is a real one: 100 steps more, without NCCL; where there is none the
# status is 77.
set -euo pipefail
if [ $# -ne 3 ]; then
  echo "usage: tests/train_device.sh LONGSPAN LONGSPAN_WITH_GPU SCRATCH_FOLDER" >&2
  exit 2
fi
cpu=$(realpath "$1") gpu=$(realpath "$2")
mpirun=${MPIRUN:-mpirun --oversubscribe --allow-run-as-root --bind-to none}
rm -rf "$3" && mkdir -p "$3" && cd "$3"

say() { printf 'train_device: %s\n' "$*"; }
fail() {
  say "FAILED: $*" >&2
  exit 1
}

# grep -q would leave before info has written all, which then fails
if [ "${LONGSPAN_TEST_GPU-}" = 1 ] && ! "$gpu" info | grep '^ *cuda 0:' >/dev/null; then
  say "skipped: no GPU is visible on this machine"
  exit 77
fi

awk 'BEGIN {
  srand(11); n = split("the cat dog sat on a mat and ran far away from home in winter under stars", word, " ")
  for (i = 0; i < 24; i++) {
    s = ""; length_wanted = 30 + int(rand() * 50)
    while (length(s) < length_wanted) s = s (s == "" ? "" : " ") word[1 + int(rand() * n)]
    printf "d%d\t%s\t%s\n", i, s, toupper(substr(s, 1, int(length(s) / 2))) > (i < 20 ? "train.tsv" : "valid.tsv")
  }
}'
"$cpu" pack --out data.h5 --train train.tsv --valid valid.tsv >pack.log || fail "pack"
cat >run.yaml <<EOF
data: {path: data.h5}
model: {embed_dim: 16, ffn_dim: 32, num_heads: 2, encoder_layers: 1, decoder_layers: 1, dropout: 0.1,
        encoder: {mechanism: performer}, decoder: {mechanism: abc}, cross: {mechanism: softmax}}
train: {steps: 6, batch: 2, learning_rate: 3.0e-3, warmup_steps: 2, evaluate_every: 6, save_every: 3, keep: 9}
EOF

train() { # RANKS PROGRAM DIRECTORY ARGUMENT...
  local launch=()
  [ "$1" = 1 ] || launch=($mpirun -n "$1")
  "${launch[@]}" "$2" train run.yaml --set run.directory="$3" "${@:4}" >"$3.log" 2>&1 || {
    local code=$?
    cat "$3.log" >&2
    fail "$3: exit code $code"
  }
}
losses() { sed -n 's/^{"step":\([0-9]*\),.*"loss":\([^,]*\),.*"grad_norm":\([^,]*\),.*/\1 \2 \3/p' "$1/metrics.jsonl"; }
same() { # A B: losses and norms of the gradient of the same steps, within 1e-4
  paste -d' ' <(losses "$1") <(losses "$2") | awk -v a="$1" -v b="$2" '
    function off(x, y) { return x > y ? (x - y) / x : (y - x) / y }
    { d = off($2, $5); e = off($3, $6); if (d > worst) worst = d; if (e > norm) norm = e }
    $1 != $4 || !(d <= 1e-4) || !(e <= 1e-3) { print "step " $1 ": " $0; bad = 1 }
    END { printf "  %-10s %-10s largest relative difference of losses %.1e, of norms %.1e\n", a, b, worst, norm
          exit bad || NR != 6 }' || fail "$1 and $2 differ"
}

train 1 "$cpu" cpu
train 1 "$gpu" gpu --set device=cuda
train 2 "$gpu" gpu_two --set device=cuda
same cpu gpu
same cpu gpu_two

# ---- a longer way, where it does not take minutes: 1e-3
if [ "${LONGSPAN_TEST_GPU-}" = 1 ]; then
  long=(--set train.steps=100 --set train.evaluate_every=0 --set train.save_every=0)
  train 1 "$cpu" cpu_long "${long[@]}"
  train 1 "$gpu" gpu_long "${long[@]}" --set device=cuda
  paste -d' ' <(losses cpu_long) <(losses gpu_long) | awk '
    { d = ($2 > $5 ? $2 - $5 : $5 - $2) / $2; if (d > worst) worst = d }
    END { printf "  100 steps: largest relative difference of losses %.1e\n", worst; exit NR != 100 || !(worst <= 1e-3) }' ||
    fail "100 steps on the CPU and on the GPU differ"
fi

# ---- bf16: near float32, and not the same; on two ranks, too
near() { # A B
  paste -d' ' <(losses "$1") <(losses "$2") | awk -v a="$1" -v b="$2" '
    { d = ($2 > $5 ? $2 - $5 : $5 - $2) / $2; if (d > worst) worst = d }
    $1 != $4 || !(d <= 2e-2) { print "step " $1 ": " $0; bad = 1 }
    END { printf "  %-10s %-10s largest relative difference of losses %.1e\n", a, b, worst
          exit bad || NR != 6 || !(worst > 1e-5) }' || fail "$1 and $2 differ, or are the same"
}
train 1 "$gpu" bf16 --set device=cuda --set train.precision=bf16
train 2 "$gpu" bf16_two --set device=cuda --set train.precision=bf16
near gpu bf16
near gpu bf16_two
"$cpu" train run.yaml --set run.directory=refused --set train.precision=bf16 >refused.log 2>&1 && fail "bf16 on the CPU"
grep -q 'train.precision: bf16 is for GPUs' refused.log || fail "bf16 on the CPU: $(cat refused.log)"
"$cpu" eval bf16/best.h5 --split valid | grep '^result' >/dev/null || fail "eval of a bf16 checkpoint without a GPU"
"$gpu" eval bf16/best.h5 --split valid --set device=cpu | grep '^result' >/dev/null || fail "eval of a bf16 checkpoint on the CPU"
"$gpu" eval bf16/best.h5 --split valid | grep '^result' >/dev/null || fail "eval in bf16"

# ---- NCCL, emulated: ranks that share a sequence, and ranks that do not; a connection that is lost, and one that takes
# too long, in the midst of a step. Those who share a GPU are told so.
if [ "${LONGSPAN_TEST_GPU-}" != 1 ]; then
  nccl=(--set device=cuda --set parallel.transport=nccl)
  for sharing in 2 1; do
    LONGSPAN_EMULATOR_GPUS=1 train 2 "$gpu" "nccl_$sharing" "${nccl[@]}" --set parallel.sequence=$sharing
    same cpu "nccl_$sharing"
  done
  breaks() { # NAME EXIT_CODE FRAGMENT: on 2 ranks
    local code=0
    timeout 60 $mpirun -n 2 "$gpu" train run.yaml --set run.directory="$1" "${nccl[@]}" >"$1.log" 2>&1 || code=$?
    [ $code -eq "$2" ] || fail "$1: exit code $code, not $2: $(cat "$1.log")"
    [ "$(grep -c "^longspan: .*$3" "$1.log")" -eq 1 ] || fail "$1: no single \"$3\": $(cat "$1.log")"
  }
  breaks shared 2 "two ranks share GPU"
  export LONGSPAN_EMULATOR_GPUS=1 LONGSPAN_NCCL_TIMEOUT=1
  LONGSPAN_EMULATOR_NCCL=1:20:lost breaks lost 7 "failed on rank 1 of 2: remote process exited.*connection is lost"
  LONGSPAN_EMULATOR_NCCL=1:20:stuck breaks stuck 7 "took more than 1 s on rank 1 of 2"
  unset LONGSPAN_EMULATOR_GPUS LONGSPAN_NCCL_TIMEOUT
fi

# ---- a checkpoint of one device goes on on the other
for way in "cpu cpu gpu cuda" "gpu gpu cpu cpu"; do
  read -r from _ to device <<<"$way"
  program=$cpu && [ "$to" = cpu ] || program=$gpu
  mkdir -p "moved_$to" && cp "$from/step-000003.h5" "moved_$to/" && head -n 3 "$from/metrics.jsonl" >"moved_$to/metrics.jsonl"
  train 1 "$program" "moved_$to" --resume auto --set device="$device"
  same cpu "moved_$to"
done

# ---- and is read alike
a=$("$cpu" eval cpu/best.h5 --split valid --set device=cpu | grep '^result') || fail "eval on the CPU"
b=$("$gpu" eval cpu/best.h5 --split valid --set device=cuda | grep '^result') || fail "eval on the GPU"
say "eval: CPU $a; GPU $b"
awk -v a="$a" -v b="$b" 'BEGIN { split(a, x, " +"); split(b, y, " +"); d = x[2] - y[2]; exit !(d < 1e-4 && d > -1e-4) }' ||
  fail "eval differs"
"$cpu" eval gpu/best.h5 --split valid | grep '^result' >/dev/null || fail "eval of a GPU's checkpoint on the CPU"
for device in cpu cuda; do
  printf 'the cat ran home' | "$gpu" generate gpu/best.h5 --max-bytes 12 --set device=$device >"written_$device" ||
    fail "generate with device=$device"
done
cmp written_cpu written_cuda || fail "generate writes another text on the GPU than on the CPU"

# ---- memory of the GPU is counted, and two ranks that share a sequence have less of it each
device_memory() { sed -n 's/.*"peak_device_memory_bytes":\([0-9]*\),.*/\1/p' "$1/metrics.jsonl" | tail -n 1; }
read -r none one two < <(echo "$(device_memory cpu) $(device_memory gpu) $(device_memory gpu_two)")
say "memory of GPUs: $none, $one, $two bytes on the CPU, on one rank, on two"
[ "$none" -eq 0 ] && [ "$one" -gt 100000 ] && [ "$two" -gt "$one" ] && [ "$two" -lt $((2 * one)) ] || fail "memory of GPUs"
say "the same on both"
