#!/usr/bin/env bash
# Bad input through the program, on 1 and on 3 ranks: one clear sentence, the right exit code, nothing written, no hang.
#   faults.sh LONGSPAN SCRATCH_FOLDER
set -uo pipefail
[ $# -eq 2 ] || { echo "usage: tests/faults.sh LONGSPAN SCRATCH_FOLDER" >&2; exit 2; }
longspan=$(realpath "$1") scripts=$(CDPATH= cd -- "$(dirname "$0")/../scripts" && pwd)
mpirun="mpirun --oversubscribe --allow-run-as-root --bind-to none"
rm -rf "$2" && mkdir -p "$2" && cd "$2" || exit 1
passed=0 failed=0
complain() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$*"; sed 's/^/    /' stderr | head -n 20; }

# refuse NAME CODE FRAGMENT -- ARGUMENT...: on 1 and 3 ranks the program ends with CODE, its only line on standard error that
# begins with "longspan:" holds FRAGMENT, and the folder `out` (where every case may write) stays empty.
refuse() {
  local name=$1 code=$2 fragment=$3 ranks launch got lines
  shift 4
  for ranks in 1 3; do
    rm -rf out && mkdir out
    launch=()
    [ $ranks = 1 ] || launch=($mpirun -n $ranks)
    got=0
    timeout 60 "${launch[@]}" "$longspan" "$@" >stdout 2>stderr </dev/null || got=$?
    lines=$(grep -c '^longspan: ' stderr)
    if [ $got -ne "$code" ]; then complain "$name on $ranks ranks: exit code $got, not $code"
    elif [ "$lines" -ne 1 ]; then complain "$name on $ranks ranks: $lines sentences"
    elif ! grep '^longspan: ' stderr | grep -F -- "$fragment" >/dev/null; then complain "$name on $ranks ranks: no \"$fragment\""
    elif [ -n "$(ls -A out)" ]; then complain "$name on $ranks ranks: left $(ls -A out)"
    else passed=$((passed + 1)); fi
  done
}

# ---- what is well: a data set, a configuration, a checkpoint
for i in $(seq 12); do printf 'd%d\tthe cat %d sat on the mat\tTHE CAT %d\n' "$i" "$i" "$i"; done >good.tsv
"$longspan" pack --train good.tsv --valid good.tsv --out good.h5 >/dev/null || { echo "FAILED: pack"; exit 1; }
cat >good.yaml <<'EOF'
data: {path: good.h5}
model: {embed_dim: 16, ffn_dim: 16, num_heads: 2, encoder_layers: 1, decoder_layers: 1}
train: {steps: 2, batch: 2, warmup_steps: 1, evaluate_every: 0, save_every: 1}
run: {directory: out/run}
EOF
mkdir -p out
"$longspan" train good.yaml --set run.directory=well >/dev/null || { echo "FAILED: train"; exit 1; }
good=well/step-000002.h5

# a copy with one byte changed: flip FILE OFFSET COPY
flip() {
  cp "$1" "$3"
  local byte
  byte=$(od -An -tu1 -j "$2" -N 1 "$1")
  printf "\\x$(printf %x $((byte ^ 16)))" | dd of="$3" bs=1 seek="$2" conv=notrunc status=none
}
cut_to() { head -c $(($(stat -c %s "$1") * $2 / 100)) "$1" >"$3"; }

# ---- command line and configuration
refuse "no subcommand" 2 "subcommand" --
refuse "unknown subcommand" 2 "did you mean train?" -- trian
refuse "unknown option" 2 "" -- train good.yaml --stepz 3
refuse "an option with one dash" 2 "unknown option -set (did you mean --set?)" -- train -set train.steps=3 good.yaml
refuse "configuration missing" 4 "nowhere.yaml" -- train nowhere.yaml
printf 'model: {embed_dimm: 16}\n' >typo.yaml
refuse "misspelt key" 2 "typo.yaml:1: model.embed_dimm: unknown key (did you mean embed_dim?)" -- train typo.yaml
printf 'model:\n  embed_dim: wide\n' >type.yaml
refuse "wrong type" 2 "type.yaml:2: model.embed_dim" -- train type.yaml
refuse "out of range" 2 "train.batch" -- train good.yaml --set train.batch=0
printf 'model.embed_dim: 16\n' >dotted.yaml
refuse "a key with dots" 2 "dotted.yaml:1: model.embed_dim: in a file the parts of a key are nested" -- train dotted.yaml
printf '"train\\0x": {steps: 3}\n' >zero.yaml
refuse "a key with a zero byte" 2 "zero.yaml:1: a key must be a word" -- train zero.yaml
refuse "a configuration without an end" 2 "/dev/zero: has more than 1048576 bytes" -- train /dev/zero
refuse "unknown key in --set" 2 "model.heads" -- train good.yaml --set model.heads=2
refuse "heads do not divide the width" 2 "model.num_heads=3" -- train good.yaml --set model.num_heads=3
refuse "unknown mechanism" 2 "attention9" -- train good.yaml --set model.encoder.mechanism=attention9
refuse "option of another mechanism" 2 "num_slots" -- train good.yaml --set model.encoder.options.num_slots=8
refuse "scale where there are no logits" 2 "model.encoder.scale: 0.5 has no effect" -- train good.yaml \
  --set model.encoder.mechanism=s4d --set model.encoder.scale=0.5
refuse "sequences longer than max_len" 2 "model.encoder.options.max_len: 5 is less than the" -- train good.yaml \
  --set model.encoder.mechanism=cosformer --set model.encoder.options.max_len=5
refuse "epsilon that is 0 in float32" 2 "train.epsilon" -- train good.yaml --set train.epsilon=1e-46
refuse "dropout where there are no probabilities" 2 "abc" -- train good.yaml --set model.encoder.mechanism=abc \
  --set model.encoder.dropout=0.1
refuse "ranks that do not divide" 2 "parallel.sequence" -- train good.yaml --set parallel.sequence=2
if ! "$longspan" info | grep 'cuda 0:' >/dev/null; then # a build without CUDA, or a machine without a GPU
  refuse "no GPU" 2 "cuda" -- train good.yaml --set device=cuda
fi
refuse "no NCCL" 2 "nccl" -- train good.yaml --set parallel.transport=nccl
refuse "batch not divisible" 2 "accumulation" -- train good.yaml --set train.accumulation=3

# ---- data sets
refuse "data missing" 4 "nowhere.h5" -- train good.yaml --set data.path=nowhere.h5
refuse "data is a directory" 4 "out" -- train good.yaml --set data.path=out
refuse "data is not HDF5" 3 "good.tsv" -- train good.yaml --set data.path=good.tsv
refuse "data is a checkpoint" 3 "$good" -- train good.yaml --set data.path=$good
for percent in 10 50 90 99; do
  cut_to good.h5 $percent cut.h5
  refuse "data cut to $percent%" 3 "cut.h5" -- train good.yaml --set data.path=cut.h5
done
token=$(LC_ALL=C grep -abo -P 't\x00h\x00e\x00 \x00c' good.h5 | head -n 1 | cut -d: -f1)
[ -n "$token" ] || { echo "FAILED: no text in good.h5"; exit 1; }
flip good.h5 "$token" flipped.h5
refuse "data with a flipped bit" 3 "flipped.h5" -- train good.yaml --set data.path=flipped.h5
flip good.h5 $((token + 1)) range.h5
refuse "token out of range, digest wrong" 3 "range.h5" -- train good.yaml --set data.path=range.h5

# ---- checkpoints
refuse "checkpoint missing" 4 "nowhere.h5" -- generate nowhere.h5 --input good.tsv
refuse "checkpoint is not HDF5" 3 "good.tsv" -- generate good.tsv --input good.tsv
refuse "checkpoint is a data set" 3 "good.h5" -- generate good.h5 --input good.tsv
for percent in 10 50 99; do
  cut_to $good $percent cut.h5
  refuse "checkpoint cut to $percent%" 3 "cut.h5" -- generate cut.h5 --input good.tsv
  refuse "resume from a checkpoint cut to $percent%" 3 "cut.h5" -- train good.yaml --resume cut.h5
done
size=$(stat -c %s $good)
for percent in 30 60 80; do
  flip $good $((size * percent / 100)) flipped.h5
  refuse "checkpoint with a bit flipped at $percent%" 3 "flipped.h5" -- train good.yaml --resume flipped.h5
done
refuse "a directory that holds a run" 2 "resume" -- train good.yaml --set run.directory=well
mkdir alone broken && cp well/best.h5 alone && cp $good broken/step-000001.h5 && cut_to $good 50 broken/step-000002.h5
refuse "a directory that holds only best.h5" 2 "alone/best.h5 is there already" -- train good.yaml --set run.directory=alone
refuse "resume from a damaged checkpoint beside a whole one" 3 "broken/step-000001.h5 is whole" -- \
  train good.yaml --set run.directory=broken --resume auto
refuse "resume with another batch" 2 "train.batch=2, the configuration has 4" -- train good.yaml --resume $good \
  --set train.batch=4
refuse "resume with another model" 2 "model.embed_dim" -- train good.yaml --resume $good --set model.embed_dim=32
refuse "evaluate as another model" 2 "model.num_heads=2, the configuration has 4" -- eval $good --set model.num_heads=4
head -n 5 good.tsv >fewer.tsv
"$longspan" pack --train fewer.tsv --valid fewer.tsv --out other.h5 >/dev/null || complain "pack fewer.tsv"
mv good.h5 aside.h5 && cp other.h5 good.h5
refuse "evaluate on data that changed" 2 "is not the data set any more that $good was trained on" -- eval $good
"$longspan" eval $good --data good.h5 >stdout || complain "evaluate on data that changed, by its name"
mv aside.h5 good.h5
"$longspan" eval $good >stdout || complain "evaluate"
refuse "bench: a length beyond 64 bits" 2 "is no length" -- bench --length 18014398509481985K
refuse "bench: a list where one length is taken" 2 "is no length" -- bench --softmax-limit 1K,4K
refuse "bench: a max_len below the length" 2 "cosformer.max_len=10 is shorter than --length 64" -- \
  bench --mechanism cosformer --pattern CS --length 64 --set cosformer.max_len=10
refuse "bench: a length beyond max_len" 2 "max_len" -- bench --train good.yaml --length 64 --repeat 1 \
  --set model.encoder.mechanism=cosformer --set model.encoder.options.max_len=20
refuse "generate: an unknown key" 2 "model.width" -- generate $good --set model.width=3 --input good.tsv
refuse "generate: a seed without draws" 2 "--seed" -- generate $good --seed 3 --input good.tsv
refuse "generate: a long prefix" 2 "prefix" -- generate $good --prefix four --max-bytes 3 --input good.tsv
refuse "generate: a search that draws" 2 "--beams" -- generate $good --beams 2 --top-k 3 --input good.tsv
refuse "generate: a penalty without a search" 2 "--length-penalty" -- generate $good --length-penalty 1 --input good.tsv
refuse "generate: too many beams" 2 "1025" -- generate $good --beams 1025 --input good.tsv
"$longspan" generate $good --beams 3 --prefix the --max-bytes 9 --input good.tsv >one_rank &&
  $mpirun -n 3 "$longspan" generate $good --beams 3 --prefix the --max-bytes 9 --input good.tsv >three_ranks
if ! cmp -s one_rank three_ranks || [ "$(head -c 3 one_rank)" != the ]; then complain "beams: $(cat one_rank) is not $(cat three_ranks)"
else passed=$((passed + 1)); fi
refuse "empty source" 2 "empty" -- generate $good --input /dev/null

"$longspan" train good.yaml --set run.directory=short --set model.decoder.mechanism=cosformer \
  --set model.decoder.options.max_len=20 >/dev/null || complain "training with max_len"
refuse "more bytes than max_len" 2 "--max-bytes 21 is more than the 20 positions of max_len" -- \
  generate short/step-000002.h5 --input good.yaml --max-bytes 21
"$longspan" generate short/step-000002.h5 --input good.yaml >stdout &&
  [ "$(wc -c <stdout)" -le 20 ] || complain "as many bytes as max_len"

"$longspan" train good.yaml --dry-run --set model.encoder.mechanism=nystrom --set model.encoder.options.init=1 >stdout
grep -q '^warning: with these options of nystrom .*train.accumulation' stdout || complain "nothing is said of rows that mix"

# ---- places that cannot be written (a file in the way: root may write anywhere else)
refuse "run directory below a file" 4 "good.tsv" -- train good.yaml --set run.directory=good.tsv/run
refuse "run directory below a file, dry" 4 "good.tsv" -- train good.yaml --set run.directory=good.tsv/run --dry-run
refuse "data set below a file" 4 "good.tsv" -- pack --train good.tsv --out good.tsv/x.h5

# ---- text that cannot be packed
printf 'a\tb\n\tc\n' >empty.tsv
refuse "empty document" 3 "empty.tsv" -- pack --train empty.tsv --out out/x.h5
printf 'a\tb\tc\td\n' >columns.tsv
refuse "too many columns" 3 "columns.tsv" -- pack --train columns.tsv --out out/x.h5
printf 'a\tb\\q\n' >escape.tsv
refuse "unknown escape" 3 "escape.tsv" -- pack --train escape.tsv --out out/x.h5

# ---- during the run: a rank that fails alone, a loss that is not a number
during() { # NAME CODE FRAGMENT HOW RANK
  local got=0
  rm -rf out && mkdir out
  LONGSPAN_TEST_FAIL=$5:2:$4 timeout 60 $mpirun -n 3 "$longspan" train good.yaml >stdout 2>stderr </dev/null || got=$?
  if [ $got -ne "$2" ]; then complain "$1: exit code $got, not $2"
  elif ! grep '^longspan: ' stderr | grep -F -- "$3" >/dev/null; then complain "$1: no \"$3\""
  elif [ ! -f out/run/step-000001.h5 ] || [ -f out/run/step-000002.h5 ]; then complain "$1: checkpoints $(ls out/run)"
  else passed=$((passed + 1)); fi
}
during "a rank without memory" 6 "rank 2" memory 2
during "a loss that is not a number" 5 "step 2" nan 1
during "a rank that the others do not hear of" 1 "rank 1: step 2" lost 1

# ---- memory that whoever started the program had is not the program's
rm -rf out && mkdir out
python3 -c 'import os, sys; held = bytearray(600 << 20); os.execv(sys.argv[1], sys.argv[1:])' "$longspan" train good.yaml \
  >stdout 2>stderr </dev/null || complain "training started by a large process: $(cat stderr)"
peak=$(sed -n 's/.*"peak_memory_bytes":\([0-9]*\).*/\1/p' out/run/metrics.jsonl | tail -n 1)
if [ "${peak:-0}" -lt 1000000 ] || [ "$peak" -ge $((600 << 20)) ]; then complain "peak_memory_bytes is $peak"
else passed=$((passed + 1)); fi

# ---- ranks that were started with other arguments
rm -rf out && mkdir out
timeout 60 $mpirun -n 1 "$longspan" train good.yaml : -n 1 "$longspan" train good.yaml --set train.learning_rate=1e-4 \
  >stdout 2>stderr </dev/null && got=0 || got=$?
if [ $got -ne 2 ] || ! grep -q '^longspan: rank 1: it was started with --set where rank 0 has no more arguments' stderr ||
  [ -n "$(ls -A out)" ]; then complain "other arguments on rank 1: exit code $got"
else passed=$((passed + 1)); fi

# ---- the lines of another run are kept
rm -rf out && mkdir out
"$longspan" train good.yaml >stdout 2>stderr && cp out/run/metrics.jsonl before && rm out/run/*.h5 &&
  "$longspan" train good.yaml --resume $good --set train.steps=3 >stdout 2>stderr && got=0 || got=$?
if [ $got -ne 0 ]; then complain "a directory with another run's lines: exit code $got"
elif ! cmp -s before out/run/metrics-1.jsonl; then complain "another run's lines are lost"
elif grep -q '^{"step":1,' out/run/metrics.jsonl; then complain "another run's lines are among those of this one"
elif ! grep -q 'metrics.jsonl is of another run, and is out/run/metrics-1.jsonl now' stdout; then complain "nothing is said of it"
else passed=$((passed + 1)); fi

# ---- the best of another directory, or of other documents, is no bar: weights that stay as they are become the best
rm -rf out && mkdir out
still=(train good.yaml --set train.learning_rate=0 --set train.evaluate_every=1)
"$longspan" "${still[@]}" --set train.steps=3 --resume $good >stdout 2>stderr && [ -f out/run/best.h5 ] &&
  "$longspan" "${still[@]}" --set train.steps=4 --set train.evaluate_documents=12 --resume auto >stdout 2>stderr &&
  "$longspan" "${still[@]}" --set train.steps=5 --set data.max_source=1 --resume auto >stdout 2>stderr && got=0 || got=$?
best=$(sed -n 's/.*"valid_nll".*"best":\(.*\)}/\1/p' out/run/metrics.jsonl | tr '\n' ' ')
if [ $got -ne 0 ]; then complain "best.h5 in a directory of its own: exit code $got, $(ls out/run)"
elif [ "$best" != "true false false true " ]; then complain "the best by another measure: $best"
else passed=$((passed + 1)); fi

# ---- two trainings in one directory; Ctrl-C, which saves and leaves the evaluation that is due to the next run
rm -rf out && mkdir out
long=(train good.yaml --set train.steps=1000000 --set train.evaluate_every=1 --set train.save_every=0)
"$longspan" "${long[@]}" >long 2>&1 &
pid=$!
while [ "$(cat out/run/metrics.jsonl 2>/dev/null | wc -l)" -lt 4 ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
timeout 20 "$longspan" "${long[@]}" --resume auto >stdout 2>stderr && got=0 || got=$?
if [ $got -ne 2 ] || ! grep -q '^longspan: .*another training is running in out/run' stderr; then
  complain "a second training in a directory: exit code $got"
else passed=$((passed + 1)); fi
kill -INT $pid
wait $pid && got=0 || got=$?
cp long stderr
step=$(sed -n 's/^stopped by a signal after step \([0-9]*\) .*/\1/p' long)
evaluations() { grep -c "^{\"step\":$step,\"valid_nll\"" out/run/metrics.jsonl; }
if [ $got -ne 0 ] || [ ! -f "$(printf 'out/run/step-%06d.h5' "$step")" ]; then complain "Ctrl-C: exit code $got"
elif [ "$(evaluations)" -ne 0 ]; then complain "Ctrl-C: step $step was evaluated first"
elif ! "$longspan" train good.yaml --set train.steps=$((step + 1)) --set train.evaluate_every=1 --resume auto >stdout 2>stderr ||
  [ "$(evaluations)" -ne 1 ]; then complain "after Ctrl-C: $(evaluations) evaluations of step $step"
else passed=$((passed + 1)); fi

# ---- standard streams that were closed: their numbers do not go to something else; and one whose reader has left
"$longspan" generate $good --input good.tsv --max-bytes 9 <&- >&- 2>stderr && got=0 || got=$?
if [ $got -ne 4 ] || ! grep -q '^longspan: .*standard output cannot be written' stderr; then
  complain "standard output closed: exit code $got"
else passed=$((passed + 1)); fi
timeout 20 "$longspan" generate $good --max-bytes 9 <&- >stdout 2>stderr && got=0 || got=$?
if [ $got -ne 4 ] || ! grep -q '^longspan: standard input: cannot be read' stderr; then
  complain "standard input closed: exit code $got"
else passed=$((passed + 1)); fi
rm -rf out && mkdir out
{ "$longspan" train good.yaml --set train.steps=50 2>stderr; echo $? >code; } | true
if [ "$(cat code)" -ne 4 ] || [ ! -f out/run/step-000050.h5 ]; then complain "nobody reads the progress: exit code $(cat code)"
else passed=$((passed + 1)); fi

# ---- a directory that was moved away: where another run has its name now, that is left alone
rm -rf out && mkdir out
"$longspan" train good.yaml --set train.steps=1000000 --set train.save_every=0 >stdout 2>stderr &
pid=$!
while [ ! -s out/run/metrics.jsonl ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
kill -STOP $pid
mv out/run out/moved && mkdir out/run && touch out/run/.lock
kill -CONT $pid && kill -INT $pid
wait $pid && got=0 || got=$?
if [ $got -ne 4 ] || ! grep -q '^longspan: run.directory: out/run was moved' stderr || [ "$(ls -A out/run)" != .lock ]; then
  complain "a directory that was moved: exit code $got, $(ls out/run)"
else passed=$((passed + 1)); fi

# ---- a signal within a long evaluation, here that of the last step: the run does not wait for its end, tells nothing of it,
# ---- and makes it when it goes on, though there is no step to take
awk 'BEGIN { for (i = 0; i < 20000; i++) printf "v%d\tthe cat %d sat on the mat\tTHE CAT %d\n", i, i, i }' >many.tsv
"$longspan" pack --train good.tsv --valid many.tsv --out many.h5 >/dev/null || { echo "FAILED: pack"; exit 1; }
for ranks in 1 3; do
  rm -rf out && mkdir out
  launch=() signal=INT
  [ $ranks = 1 ] || launch=($mpirun -n $ranks) signal=USR1 # what mpirun passes on
  long=(train good.yaml --set data.path=many.h5 --set train.batch=3 --set train.steps=1 --set parallel.sequence=1)
  "${launch[@]}" "$longspan" "${long[@]}" >stderr 2>&1 &
  pid=$!
  while [ ! -s out/run/metrics.jsonl ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
  kill -$signal $pid
  wait $pid && got=0 || got=$?
  name="a signal within an evaluation on $ranks ranks"
  if [ $got -ne 0 ]; then complain "$name: exit code $got"
  elif ! grep -q '^stopped by a signal after step 1 of 1, before it was evaluated' stderr; then complain "$name: it was not heard"
  elif grep -q valid_nll out/run/metrics.jsonl; then complain "$name: the evaluation was told of"
  elif [ "$(ls out/run)" != "$(printf 'config.yaml\nmetrics.jsonl\nstep-000001.h5')" ]; then complain "$name: $(ls out/run)"
  elif ! "${launch[@]}" "$longspan" "${long[@]}" --resume auto >stdout 2>stderr; then complain "$name: it does not go on"
  elif ! grep -q '^done: step 1, valid [0-9.]* nats per token, [0-9.]* bits per byte; the results' stdout; then
    complain "$name: $(cat stdout)"
  elif [ "$(grep -c '"valid_documents":20000' out/run/metrics.jsonl)" -ne 1 ]; then complain "$name: not evaluated as a whole"
  else passed=$((passed + 1)); fi
done

# ---- a limit on the size of files, which MPI itself can live with
printf 'd\t%05000000d\t1\n' 0 >large.tsv
rm -rf out && mkdir out
(ulimit -f 8192 && exec "$longspan" pack --train large.tsv --out out/x.h5) >stdout 2>stderr && got=0 || got=$?
if [ $got -ne 4 ] || ! grep -q '^longspan: .*File too large' stderr || [ -n "$(ls -A out)" ]; then
  complain "a file that may not grow: exit code $got, left $(ls -A out)"
else passed=$((passed + 1)); fi

# ---- what is told before it costs time; every script says what it does, without doing it
if ! "$longspan" train good.yaml --dry-run --set model.decoder.mechanism=probsparse 2>stderr |
  grep -q '^warning: model.decoder.mechanism: probsparse cannot decode'; then complain "no warning of a decoder without steps"
else passed=$((passed + 1)); fi
"$longspan" info --json --markdown >stdout 2>stderr && got=0 || got=$?
if [ $got -ne 2 ]; then complain "info --json --markdown: exit code $got"; else passed=$((passed + 1)); fi
for script in "$scripts"/*.sh "$scripts"/data/*.sh "$scripts"/plot-bench "$scripts"/scaling; do
  timeout 10 "$script" --help >stdout 2>stderr </dev/null && got=0 || got=$?
  if [ $got -ne 0 ] || [ ! -s stdout ]; then complain "$script --help: exit code $got"; else passed=$((passed + 1)); fi
  [ "${script##*/}" != mpirun.sh ] || continue # its options are mpirun's
  timeout 10 "$script" --frobnicate >stdout 2>stderr </dev/null && got=0 || got=$?
  if [ $got -ne 2 ] || [ ! -s stderr ]; then complain "$script --frobnicate: exit code $got"; else passed=$((passed + 1)); fi
done

printf '%d passed, %d failed\n' $passed $failed
[ $failed -eq 0 ] && [ $passed -gt 0 ]
