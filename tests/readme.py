#!/usr/bin/env python3
"""The tables of README.md are those that the program prints: readme.py LONGSPAN README.md [--update]

Each stands behind a line <!-- table N of longspan info --markdown -->. Without --update it is only compared.
"""
import re
import subprocess
import sys

if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["--update"]):
    sys.exit(__doc__)
program, path = sys.argv[1:3]
printed = subprocess.run([program, "info", "--markdown"], check=True, capture_output=True, text=True).stdout
tables = [table.strip() for table in printed.strip().split("\n\n")]
text = open(path, encoding="utf-8").read()
wrong = 0
for number, table in enumerate(tables, 1):
    mark = f"<!-- table {number} of longspan info --markdown -->\n"
    here = re.search(re.escape(mark) + r"((?:\|.*\n)*)", text)
    if not here:
        sys.exit(f"{path}: there is no line {mark.strip()}")
    if here.group(1).strip() == table:
        continue
    wrong += 1
    for line in sorted(set(here.group(1).splitlines()) ^ set(table.splitlines())):
        print(("README only: " if line in here.group(1).splitlines() else "program only: ") + line)
    text = text[: here.start(1)] + table + "\n" + text[here.end(1) :]
if wrong and sys.argv[3:]:
    open(path, "w", encoding="utf-8").write(text)
    print(f"{path}: {wrong} of {len(tables)} tables brought up to date")
elif wrong:
    sys.exit(f"{path}: {wrong} of {len(tables)} tables differ: tests/readme.py LONGSPAN README.md --update")
else:
    print(f"{path}: {len(tables)} tables are what the program prints")
