"""Starts scripts as processes of their own, from a process that has torch and the embedded model loaded already.

Each line of standard input is a job in JSON: script, argv, cwd, output (a file for stdout and stderr), and optionally
die: the process kills itself with SIGKILL just before that many-th call of those that make files last, move or vanish
limit: the largest file that it may write, in bytes

Answers with the process id, and when that process has ended with its exit status (minus the number of its signal).
"""

import itertools
import json
import os
import resource
import signal
import sys
import traceback

import torch

import common
import grpo
import grpo_guard
import nft

SCRIPTS = {"grpo.py": grpo, "grpo_guard.py": grpo_guard, "nft.py": nft}


def die_at(count):
    calls = itertools.count(1)

    def deadly(function):
        def call(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def prepare(job, pipe):
    os.chdir(job["cwd"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [job["script"], *job["argv"]]
    common.load_pipeline = lambda *_: pipe
    if job.get("die"):
        die_at(job["die"])
    if job.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))


def leave(main):
    """Run a script and end as an interpreter would, without joining threads that the fork left behind."""
    status = 0
    try:
        common.start(main)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pipe = common.load_pipeline(common.RunArgs.model, "cpu", torch.float32)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            prepare(job, pipe)
            leave(SCRIPTS[job["script"]].main)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
