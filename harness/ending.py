"""How a script begins and how it ends early: with a line, with a status, and with what continues the run."""

import errno
import os
import signal
import sys
import textwrap
import traceback
from contextlib import suppress

import torch

from common import CannotReplay
from harness.console import warn_once
from harness.fields import refuse, set_by
from harness.machine import out_of_memory
from harness.parallel import processes, rank
from harness.run import Run

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def start(main):
    """Run a script; what ends it early ends it with a line that says how to go on.

    On Ctrl-C or SIGTERM the epoch in hand is finished and saved; the exit status is 130 or 143. A second signal ends
    the process at once, and --resume repeats that epoch. A mistake in a script or a pipeline ends in its traceback.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    warn_once()
    with processes():
        try:
            try:
                main()
            finally:
                sys.stdout.flush()  # not at the interpreter's end
        except BrokenPipeError:  # nobody reads it, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
            line = "error: nobody reads the output any more; continue with:"
            last_words = f"{line} {Run.current.command}" if Run.current else 128 + getattr(signal, "SIGPIPE", 13)
            raise SystemExit(last_words) from None
        except Exception as error:
            run = Run.current
            if run is None:
                raise
            if isinstance(error, torch.OutOfMemoryError):
                raise run.error(out_of_memory(error, run.args)) from error
            if getattr(error, "errno", None) in NO_ROOM or "serializing: I/O error" in str(error):  # of safetensors
                raise run.error(f"cannot write in {run.folder}, where older checkpoints are whole: {error}") from error
            if isinstance(error, CannotReplay):
                refuse("model", run.args.model, error)
            if getattr(error, "in_pipeline_call", False) and len(run.rows) < 2:  # that of epoch 0: nothing was trained
                _refuse_call(error, run)
            raise


def _refuse_call(error, run):
    """Refuse what a pipeline was called with, if it is not the model's own, or it says that it cannot do it."""
    sources = {key: set_by.get(key, "") for key in ("call", "pipeline") if getattr(run.args, key)}
    given = [key for key, source in sources.items() if not source.endswith("defaults.yaml")]
    if not (given or isinstance(error, (ValueError, NameError))):
        return
    key = (given or ["call"])[0]
    path = run.folder / "log.txt"
    with suppress(OSError), open(path, "a") as log:
        traceback.print_exception(error, file=log)
    said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
    package = f" (pip install {error.name} may do)" if isinstance(error, NameError) else ""
    what = textwrap.shorten(f"{type(error).__name__}: {said}", 500)
    refuse(key, getattr(run.args, key), f"the pipeline fails on what it is given: {what}{package} (in full: {path})")


def _interrupt(number, frame):
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    run, name = Run.current, signal.Signals(number).name
    going_on = run is not None and run.in_loop
    line = "finishing and saving the epoch in hand; once more ends at once" if going_on else "ended before training"
    then = f"; continue with: {run.command}" if run else ""
    if rank() == 0:
        os.write(2, f"{name}: {line}{then}\n".encode())  # not print, which this may have interrupted
    if not going_on:
        raise SystemExit(128 + number)
    run.interrupted = number
