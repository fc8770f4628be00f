"""A process that imports SimpleTuner's trainer once and forks a child for every run that a test asks for.

The import takes most of a minute; a forked run starts at once. It reads one JSON object per line:
{"cwd", "out", "log", "environment", "script", "argv", "setup"}, runs `script` in the child, or SimpleTuner's own
train.py (after `setup`, a "file.py:function" of the tests, if given), with `out` as its stdout and `log` as its stderr,
and answers {"pid"} at once and {"pid", "code"} at the end.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import threading


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import simpletuner
    import simpletuner.helpers.models.flux.model
    import simpletuner.helpers.models.sd3.model
    import simpletuner.helpers.training.trainer
    import torch._inductor.cudagraph_trees  # noqa: F401  imported by the first step of every training

    train = os.path.join(os.path.dirname(simpletuner.__file__), "train.py")
    lock = threading.Lock()

    def answer(**values: object) -> None:
        with lock:
            print(json.dumps(values), file=answers, flush=True)

    def wait_for(pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        answer(pid=pid, code=os.waitstatus_to_exitcode(status))

    answer(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(job, train)
        answer(pid=pid)
        threading.Thread(target=wait_for, args=(pid,), daemon=True).start()
    os._exit(0)  # taking thousands of modules down takes seconds


def run(job: dict, train: str) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if job["out"] else log, 1)
    os.dup2(log, 2)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    script = job["script"] or train
    sys.argv = [os.path.basename(script), *job["argv"]]
    sys.path[0] = os.path.dirname(script)
    code = 1
    try:
        if job["script"]:
            # Whoever runs the tests in the background leaves it ignored, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ["SIMPLETUNER_LAYERPROBE"] != "0":
            import simpletuner_layerprobe.training.autoload  # noqa: F401
        if job["setup"]:
            path, function = job["setup"].rsplit(":", 1)
            sys.path.insert(0, os.path.dirname(path))
            runpy.run_path(path)[function]()
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
