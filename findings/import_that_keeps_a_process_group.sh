#!/usr/bin/env bash
# torch: whether a process group ends depends on whether `torch._dynamo` was imported before it began.
#
# After `destroy_process_group()`, once the last DistributedDataParallel is collected, gloo's threads are gone, if
# something had imported `torch._dynamo` before the group was made. DistributedDataParallel imports it when it is built;
# where that is the first import, Python objects no longer refer to the group, and still it is never freed: its threads
# run until the process ends. A script that imports transformers' Trainer first does not see this, a plain one does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import gc
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

imported_before = sys.argv[1] == "before"
if imported_before:
    import torch._dynamo


def gloo_threads() -> int:
    return sum("gloo" in each.read_text() for each in Path("/proc/self/task").glob("*/comm"))


def train(group: dist.ProcessGroup) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), process_group=group)
    model(torch.ones(1, 2)).sum().backward()


dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
train(dist.group.WORLD)
dist.destroy_process_group()
gc.collect()
kept, threads = group() is not None, gloo_threads()
referrers = len(gc.get_referrers(group())) if kept else 0
print(f"torch._dynamo imported before the group: {imported_before}; group still alive: {kept}, "
      f"Python objects that refer to it: {referrers}, gloo threads: {threads}")
assert kept != imported_before
assert (threads > 0) == kept
assert referrers == 0
PY
"$folder/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
"$folder/venv/bin/python" "$folder/look.py" before
"$folder/venv/bin/python" "$folder/look.py" after
# Seen on 2026-11-30:
#   torch 2.13.0+cpu
#   torch._dynamo imported before the group: True; group still alive: False, Python objects that refer to it: 0, gloo threads: 0
#   torch._dynamo imported before the group: False; group still alive: True, Python objects that refer to it: 0, gloo threads: 3
