#!/usr/bin/env python3
"""What `longspan bench` prints and writes, on tiny shapes: bench.py LONGSPAN LONGSPAN_WITH_GPU SCRATCH_FOLDER

Every figure is a positive number, every share too; columns are where scripts look for them; products are counted the same
however ranks share the work; and what cannot be measured is refused. The second program has a GPU, in the suite an
emulated one; of the first it is only known that it may have none.
"""
import csv
import math
import os
import shlex
import shutil
import subprocess
import sys

if len(sys.argv) != 4:
    sys.exit(__doc__)
cpu, gpu, scratch = sys.argv[1:]
MPIRUN = shlex.split(os.environ.get("MPIRUN", "mpirun --oversubscribe --allow-run-as-root --bind-to none"))
TINY = ["--length", "65", "--embed-dim", "32", "--heads", "2", "--repeat", "1"]
MODEL = """
model: {embed_dim: 32, ffn_dim: 48, num_heads: 2, encoder_layers: 1, decoder_layers: 1,
        encoder: {mechanism: performer}, decoder: {mechanism: softmax}, cross: {mechanism: abc}}
train: {batch: 2}
"""
# in this order since the first figures were written; new columns come behind
COLUMNS = """mechanism pattern options length ranks batch embed_dim heads core_forward core_backward layer_forward
    layer_backward projections sgemm_seconds_per_gflop peak_memory_bytes bytes_sent messages device copy_seconds_per_gbyte
    share_of_product_rate share_of_bandwidth share_of_bandwidth_forward share_of_bandwidth_backward precision
    layer_over_projections""".split()
SHARES = COLUMNS[-6:-2]
STEPS = """config device source target batch ranks step_seconds labels_and_sources product_gflop products
    products_alone_seconds square_gflop_per_second share_of_square share_alone""".split()


def fail(sentence):
    sys.exit(f"bench: FAILED: {sentence}")


def run(program, arguments, ranks=1):
    command = (MPIRUN + ["-n", str(ranks)] if ranks > 1 else []) + [program, "bench"] + arguments
    result = subprocess.run(command, capture_output=True, text=True)
    result.name = " ".join(command)
    return result


def figures(program, arguments, ranks=1):
    """(what was printed, columns, rows) of a run that must succeed."""
    path = os.path.join(scratch, "figures.csv")
    result = run(program, arguments + ["--csv", path], ranks)
    if result.returncode != 0:
        fail(f"{result.name}: exit code {result.returncode}: {result.stderr}")
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        return result.stdout, reader.fieldnames, list(reader)


def positive(row, names):
    for name in names:
        if not 0 < float(row[name]) < math.inf:
            fail(f"{row}: {name} is not a positive number")


def check_attentions(program, device, ranks, precision="float32"):
    printed, columns, rows = figures(program, TINY + ["--device", device, "--precision", precision], ranks)
    if columns != COLUMNS:
        fail(f"columns are {columns}")
    names = {(row["mechanism"], row["pattern"]) for row in rows}
    if len(rows) != len(names) or len(names) < 25 or len({m for m, _ in names}) < 10:
        fail(f"{len(rows)} rows of {len(names)} cases")
    if sum(line.split(" ")[0] in {m for m, _ in names} and "|" in line for line in printed.splitlines()) != len(rows):
        fail(f"the table has not the rows of the file:\n{printed}")
    for word in ("sgemm", "copy", "GB/s", "core fwd", "KiB sent"):
        if word not in printed:
            fail(f"the table has no {word}:\n{printed}")
    for row in rows:
        if row["device"] != device or row["precision"] != precision or int(row["ranks"]) != ranks:
            fail(f"{row}: not of {device}, {precision}, {ranks} ranks")
        positive(row, "layer_forward layer_backward projections sgemm_seconds_per_gflop copy_seconds_per_gbyte "
                      "peak_memory_bytes".split())
        layer = float(row["layer_forward"]) + float(row["layer_backward"])  # of one turn
        if abs(float(row["layer_over_projections"]) * float(row["projections"]) / layer - 1) > 1e-4:
            fail(f"{row}: the layer over its projections is not what their times say")
        if ranks > 1 and row["mechanism"] == "softmax":
            positive(row, ["bytes_sent", "messages"])
        if row["mechanism"] == "longshort":  # has no core
            if any(row[name] for name in SHARES):
                fail(f"{row}: a share of a core that is not there")
            continue
        positive(row, ["core_forward", "core_backward"] + SHARES[1:])
        if row["mechanism"] == "softmax":
            positive(row, SHARES[:1])
        elif row[SHARES[0]]:
            fail(f"{row}: a share of products is told of exact softmax alone")
        check_bytes(row)


def check_bytes(row):
    """The share of bandwidth is that of the bytes of the help text: read q, k, v, write out; and back."""
    inputs = 1 if row["mechanism"] == "s4d" else 3
    reals = int(row["length"]) * int(row["batch"]) * int(row["embed_dim"])
    ranks, copy = int(row["ranks"]), float(row["copy_seconds_per_gbyte"])
    for name, tensors in (("forward", inputs + 1), ("backward", 2 * inputs + 1)):
        share = 4e-9 * tensors * reals * copy / ranks / float(row["core_" + name])
        if abs(share / float(row["share_of_bandwidth_" + name]) - 1) > 1e-4:
            fail(f"{row}: the share of bandwidth {name} should be {share}")


def check_steps(program, device, ranks, *arguments):
    path = os.path.join(scratch, "model.yaml")
    with open(path, "w") as file:
        file.write(MODEL)
    lengths = ["--train", path, "--length", "40/30,33", "--repeat", "2", "--device", device, "--products"]
    printed, columns, rows = figures(program, lengths + list(arguments), ranks)
    if columns != STEPS:
        fail(f"columns are {columns}")
    if [(row["source"], row["target"]) for row in rows] != [("40", "30"), ("33", "33")]:
        fail(f"lengths of {rows}")
    for row in rows:
        if row["device"] != device or int(row["ranks"]) != ranks or int(row["labels_and_sources"]) != 2 * (
                int(row["source"]) + int(row["target"]) + 1):
            fail(f"{row}: not of {device}, {ranks} ranks, or of other tokens")
        positive(row, STEPS[6:])
        # all projections and feed-forward nets forward and backward, the latter's first product once more, and logits
        E, hidden, S, T = 32, 48, int(row["source"]), int(row["target"]) + 1
        dense = 3 * (4 * E * E * (S + T) + 2 * E * E * (T + S) + 258 * E * T) + 7 * E * hidden * (S + T)
        if float(row["product_gflop"]) < 2e-9 * 2 * dense:
            fail(f"{row}: less than its dense layers, {4e-9 * dense} Gflop")
    if "(m,n,k)" not in printed or "share" not in printed:
        fail(f"no products:\n{printed}")
    return [float(row["product_gflop"]) for row in rows]


def refused(program, arguments, code, words):
    result = run(program, arguments)
    if result.returncode != code or not any(word in result.stderr for word in words):
        fail(f"{result.name}: exit code {result.returncode}, and says: {result.stderr}")


shutil.rmtree(scratch, ignore_errors=True)
os.makedirs(scratch)
check_attentions(cpu, "cpu", 1)
check_attentions(cpu, "cpu", 2)
check_attentions(gpu, "cuda", 1, "bf16")

alone = check_steps(cpu, "cpu", 1)
shared = check_steps(cpu, "cpu", 2, "--set", "parallel.sequence=1")  # each rank has a sequence of the batch
pieces = check_steps(cpu, "cpu", 1, "--set", "train.accumulation=2")
for other in (shared, pieces):
    if any(abs(x / y - 1) > 1e-6 for x, y in zip(alone, other)):
        fail(f"products of the same batch: {alone} Gflop, but {other}")
check_steps(cpu, "cpu", 2)
check_steps(gpu, "cuda", 1)
check_steps(gpu, "cuda", 2)

model = ["--train", os.path.join(scratch, "model.yaml")]
refused(cpu, ["--length", "40/30"], 2, ["--train"])
refused(cpu, ["--products"], 2, ["--train"])
refused(cpu, ["--device", "tpu"], 2, ["cpu, cuda"])
refused(cpu, ["--precision", "fp8"], 2, ["float32, tf32, bf16"])
refused(cpu, ["--precision", "bf16"], 2, ["is for GPUs"])
refused(cpu, model, 2, ["data.max_source"])
kept = os.path.join(scratch, "kept.csv")
with open(kept, "w") as file:
    file.write("figures of a long day")
for arguments, word in (
        (["--set", "local.window=0", "--mechanism", "abc"], "window = 0 is out of range"),
        (["--set", "abc.num_slots=3x"], "'3x' is not a number"),
        (["--set", "abc.slots=3"], "no option"),
        (["--set", "abc.num_slots=3", "--mechanism", "local"], "abc is not timed"),
        (["--set", "lara.num_landmarks=4", "--pattern", "CC"], "lara is not timed"),
        (["--mechanism", "lara", "--pattern", "CC"], "nothing to time"),
        (["--mechanism", "softmax", "--length", "8K"], "nothing to time"),
        (["--heads", "3"], "not divisible")):
    refused(cpu, TINY + arguments + ["--csv", kept], 2, [word])
with open(kept) as file:
    if file.read() != "figures of a long day":
        fail(f"{kept}: emptied by a command line that was refused")
refused(cpu, TINY + ["--mechanism", "abc", "--pattern", "NS", "--csv", "/dev/full"], 4, ["/dev/full cannot be written"])
for arguments in (["--mechanism", "abc"], ["--embed-dim", "32"], ["--batch", "2"], ["--heads", "2"], ["--softmax-limit", "8K"],
                  ["--ranks", "2"], ["--messages"]):
    refused(cpu, model + arguments, 2, [f"--train takes its model from the configuration, which --set changes: leave out "
                                        f"{arguments[0]}"])
for arguments in (["--mechanism", "abc"], ["--length", "8K"], ["--batch", "2"], ["--set", "abc.num_slots=3"],
                  ["--device", "cpu"]):
    refused(cpu, ["--messages"] + arguments, 2, [f"--messages times no attention: leave out {arguments[0]}"])
refused(cpu, ["--messages", "--csv", kept], 2, ["at least 2 ranks"])
figures(cpu, TINY + ["--mechanism", "abc", "--pattern", "CS", "--set", "abc.num_slots=3"])
refused(cpu, ["--train", os.path.join(scratch, "nothing.yaml")], 4, ["nothing.yaml"])
if run(cpu, TINY + ["--device", "cuda", "--mechanism", "abc"]).returncode == 0:
    check_attentions(cpu, "cuda", 1)  # it was built with CUDA, and there is a GPU
else:
    for what in (TINY, model + ["--length", "8"]):
        refused(cpu, what + ["--device", "cuda"], 2, ["this build has no CUDA backend", "no GPU"])
print("bench: figures are where they belong")
