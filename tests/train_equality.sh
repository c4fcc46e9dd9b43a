#!/usr/bin/env bash
# Trains a small model in every way that should give the same result: on other rank counts and layouts (the same losses
# up to rounding, the same order of the data), and interrupted and resumed (the same weights, bit for bit).
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: tests/train_equality.sh LONGSPAN SCRATCH_FOLDER" >&2
  exit 2
fi
longspan=$(realpath "$1")
mpirun=${MPIRUN:-mpirun --oversubscribe --allow-run-as-root --bind-to none}
steps=20
rm -rf "$2" && mkdir -p "$2" && cd "$2"

say() { printf 'train_equality: %s\n' "$*"; }
fail() {
  say "FAILED: $*" >&2
  exit 1
}

# ---- a data set: sentences, and their first half in capitals
awk 'BEGIN {
  srand(7); n = split("the cat dog sat on a mat and ran far away from home in winter under stars by river", word, " ")
  for (i = 0; i < 72; i++) {
    length_wanted = 50 + int(rand() * 250); s = ""
    while (length(s) < length_wanted) s = s (s == "" ? "" : " ") word[1 + int(rand() * n)]
    printf "d%d\t%s\t%s\n", i, s, toupper(substr(s, 1, int(length(s) / 2))) > (i < 60 ? "train.tsv" : "valid.tsv")
  }
}'
"$longspan" pack --out data.h5 --train train.tsv --valid valid.tsv >pack.log || fail "pack"
# evaluations and checkpoints at different steps, so that either can be interrupted
cat >run.yaml <<EOF
data: {path: data.h5}
model: {embed_dim: 32, ffn_dim: 64, num_heads: 2, encoder_layers: 2, decoder_layers: 1, dropout: 0.1}
train: {steps: $steps, batch: 8, learning_rate: 3.0e-3, min_learning_rate: 1.0e-4, warmup_steps: 5,
        evaluate_every: 4, save_every: 5}
EOF

# train RANKS DIRECTORY ARGUMENT...: the exit code is in $code, the output in DIRECTORY.log
train() {
  local launch=()
  [ "$1" = 1 ] || launch=($mpirun -n "$1")
  code=0
  timeout 120 "${launch[@]}" "$longspan" train run.yaml --set run.directory="$2" "${@:3}" >>"$2.log" 2>&1 || code=$?
  [ $code -ne 124 ] || fail "$2: no end after 120 seconds"
}
must_train() {
  train "$@"
  [ $code -eq 0 ] || { cat "$2.log" >&2; fail "$2: exit code $code"; }
  check_metrics "$2"
}

# "step loss order" of each step
losses() { sed -n 's/^{"step":\([0-9]*\),.*"loss":\([^,]*\),.*"order":"\([0-9a-f]*\)"}$/\1 \2 \3/p' "$1/metrics.jsonl"; }
# "step nll tokens best" of each evaluation
evaluations() { sed -n 's/^{"step":\([0-9]*\),"valid_nll":\([^,]*\),.*"valid_tokens":\([0-9]*\),.*"best":\(.*\)}$/\1 \2 \3 \4/p' "$1/metrics.jsonl"; }
check_metrics() { # every step once, in order, and every evaluation once
  [ "$(losses "$1" | cut -d' ' -f1 | tr '\n' ' ')" = "$(seq -s' ' 1 $steps) " ] || fail "$1: steps are missing or twice"
  [ "$(grep -c valid_nll "$1/metrics.jsonl")" = $((steps / 4)) ] || fail "$1: evaluations are missing or twice"
}
same_losses() { # A B: within 1e-4 of each other, the same batches
  paste -d' ' <(losses "$1") <(losses "$2") | awk -v a="$1" -v b="$2" '
    { d = $2 > $5 ? ($2 - $5) / $2 : ($5 - $2) / $2; if (d > worst) worst = d }
    $1 != $4 || $3 != $6 || !(d <= 1e-4) { print "step " $1 ": " $0; bad = 1 }
    END { printf "  %-14s %-14s largest relative difference of losses %.1e\n", a, b, worst; exit bad || NR == 0 }' ||
    fail "$1 and $2 differ"
}
digest() { "$longspan" inspect --json "$1" | sed -n 's/^  "\(digest\|best_nll\)": \(.*\),$/\1 \2/p'; }
same_weights() { # A B: parameters, optimizer and best evaluation, bit for bit, at the end and where it was best
  local file
  for file in step-0000$steps.h5 best.h5; do
    local a b
    a=$(digest "$1/$file") b=$(digest "$2/$file")
    [ -n "$a" ] && [ "$a" = "$b" ] || fail "$1/$file and $2/$file differ: $a, $b"
  done
  cmp -s <(losses "$1") <(losses "$2") || fail "$1 and $2: the weights are the same, but not the losses"
  cmp -s <(evaluations "$1") <(evaluations "$2") || fail "$1 and $2: the weights are the same, but not the evaluations"
  say "$2 ends with the weights of $1"
}

# ---- ranks and layouts
must_train 1 one
must_train 2 two
must_train 3 three
must_train 4 two_by_two --set parallel.sequence=2
must_train 3 by_three --set parallel.sequence=1
must_train 1 accumulated --set train.accumulation=4
must_train 1 recomputed --set train.recompute=true
for other in two three two_by_two by_three accumulated recomputed; do same_losses one $other; done
abc=(--set model.encoder.mechanism=abc --set model.decoder.mechanism=abc --set model.cross.mechanism=abc)
must_train 1 abc_one "${abc[@]}"
must_train 4 abc_two_by_two "${abc[@]}" --set parallel.sequence=2
same_losses abc_one abc_two_by_two

# Mechanisms that count padded positions: neither ranks nor pieces decide how far a sequence is padded.
padded=(--set model.encoder.mechanism=lara --set model.cross.mechanism=nystrom --set train.evaluate_every=10)
valid_nll() { sed -n 's/.*"valid_nll":\([^,]*\),.*/\1/p' "$1/metrics.jsonl"; }
train 1 padded_one "${padded[@]}" && train 3 padded_by_three "${padded[@]}" --set parallel.sequence=1 &&
  train 1 padded_accumulated "${padded[@]}" --set train.accumulation=4
for other in padded_by_three padded_accumulated; do
  same_losses padded_one $other
  [ "$(valid_nll $other | wc -l)" = 2 ] || fail "$other: evaluations are missing"
  paste <(valid_nll padded_one) <(valid_nll $other) |
    awk '{ d = ($1 - $2) / $1; if (!(d < 1e-4 && d > -1e-4)) bad = 1 } END { exit bad }' ||
    fail "$other: other evaluations than padded_one"
done
# what a step exchanges is its own: not that of an evaluation before it
exchanged() { sed -n 's/^{"step":9,.*"bytes_exchanged":\([0-9]*\),.*/\1/p' "$1/metrics.jsonl"; }
train 2 two_evaluated --set train.evaluate_every=8
[ "$(exchanged two)" -gt 0 ] && train 2 two_alone --set train.evaluate_every=0 &&
  [ "$(exchanged two_alone)" = "$(exchanged two_evaluated)" ] ||
  fail "bytes exchanged in step 9: $(exchanged two_alone), after an evaluation $(exchanged two_evaluated)"

# ---- killed and resumed: STEP:HOW, see LONGSPAN_TEST_FAIL in trainer/train.c. torn dies in the middle of the next
# ---- checkpoint: after step 9 that is step-000010.h5, after step 11 best.h5
interrupt() { # REFERENCE DIRECTORY RANKS ARGUMENT...
  local reference=$1 directory=$2 ranks=$3 point
  shift 3
  for point in 3:kill 7:kill 9:torn 11:torn 18:kill; do
    # the ranks take turns in dying, but rank 0 is the one that writes
    local rank=$((${point%:*} % ranks))
    [ "${point#*:}" = kill ] || rank=0
    LONGSPAN_TEST_FAIL=$rank:$point train "$ranks" "$directory" --resume auto "$@"
    [ $code -ne 0 ] || fail "$directory was not interrupted at $point"
  done
  must_train "$ranks" "$directory" --resume auto "$@"
  same_weights "$reference" "$directory"
  local left
  left=$(find "$directory" -name '.*tmp*')
  [ -z "$left" ] || fail "$directory: left behind: $left"
}
interrupt one one_again 1
interrupt two_by_two two_by_two_again 4 --set parallel.sequence=2

# ---- stopped by a signal within an evaluation, of which one rank alone knows: before the second of its two batches,
# ---- after it, before the first, in that of the last step; and killed after one that was made again
stop() { # REFERENCE DIRECTORY RANKS ARGUMENT...
  local reference=$1 directory=$2 ranks=$3 point step
  shift 3
  for point in 4:stop2 8:stop3 12:stop1 20:stop2; do
    step=${point%:*}
    LONGSPAN_TEST_FAIL=$((step / 4 % ranks)):$point train "$ranks" "$directory" --resume auto "$@"
    [ $code -eq 0 ] || fail "$directory, stopped at $point: exit code $code"
    grep -q "^stopped by a signal after step $step of $steps, before it was evaluated" "$directory.log" ||
      fail "$directory was not stopped at $point"
    [ "$(evaluations "$directory" | cut -d' ' -f1)" = "$(seq 4 4 $((step - 1)))" ] ||
      fail "$directory, stopped at $point: evaluations of $(evaluations "$directory")"
    [ -f "$directory/step-$(printf %06d "$step").h5" ] || fail "$directory, stopped at $point: no checkpoint"
    [ "$step" -eq 4 ] || continue
    [ ! -e "$directory/best.h5" ] || fail "$directory: the best of an evaluation that was cut short"
    LONGSPAN_TEST_FAIL=0:5:kill train "$ranks" "$directory" --resume auto "$@"
    [ "$(digest "$directory/step-000004.h5")" = "$(digest "$directory/best.h5")" ] ||
      fail "$directory: the step that was evaluated when the run went on does not know of it"
  done
  must_train "$ranks" "$directory" --resume auto "$@"
  same_weights "$reference" "$directory"
  train "$ranks" "$directory" --resume auto "$@"
  tail -n 1 "$directory.log" | grep -q '^nothing to do' || fail "$directory: something to do at the end"
}
stop one one_stopped 1
stop by_three by_three_stopped 3 --set parallel.sequence=1
stop two_by_two two_by_two_stopped 4 --set parallel.sequence=2

# ---- signals from outside
wait_for_lines() { # DIRECTORY LINES PID
  while [ "$(cat "$1/metrics.jsonl" 2>/dev/null | wc -l)" -lt "$2" ] && kill -0 "$3" 2>/dev/null; do sleep 0.01; done
}
for signal in KILL USR1 TERM; do
  directory=by_$signal code=0
  "$longspan" train run.yaml --set run.directory=$directory >$directory.log 2>&1 &
  wait_for_lines $directory 4 $!
  kill -$signal $!
  wait $! 2>/dev/null || code=$?
  if [ $signal = KILL ]; then
    [ $code -eq 137 ] || fail "kill -9 came too late: exit code $code"
  else
    [ $code -eq 0 ] && grep -q 'stopped by a signal after step' $directory.log || fail "$signal: exit code $code"
  fi
  must_train 1 $directory --resume auto
  same_weights one $directory
done

# ---- from one rank count to another
LONGSPAN_TEST_FAIL=1:12:kill train 2 moved
[ $code -ne 0 ] || fail "moved was not interrupted"
must_train 3 moved --resume auto
same_losses one moved
say "all the same"
