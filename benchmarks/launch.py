"""Run commands in parallel, and print their cost as JSON, with the fields of `measure.Cost`.

This is a small separate process: the peak memory that the kernel reports for a child includes that of its parent.
"""

import json
import os
import sys
import time

commands: list[list[str]] = json.loads(sys.argv[1])
devnull = os.open(os.devnull, os.O_RDWR)
quiet = [(os.POSIX_SPAWN_DUP2, devnull, 0), (os.POSIX_SPAWN_DUP2, devnull, 1)]
cpu, peak, written, failed = 0.0, 0, 0, []
began = time.perf_counter()
running = {os.posix_spawnp(command[0], command, os.environ, file_actions=quiet): command for command in commands}
while running:
    process, status, usage = os.wait4(-1, 0)
    command = running.pop(process)
    cpu += usage.ru_utime + usage.ru_stime
    peak = max(peak, usage.ru_maxrss * 1024)
    written += usage.ru_oublock * 512
    if status:
        failed.append(f"{' '.join(command)[:300]}: exit code {os.waitstatus_to_exitcode(status)}")
seconds = time.perf_counter() - began
if failed:
    sys.exit("\n".join(failed))
print(json.dumps([seconds, cpu, peak, written]))
