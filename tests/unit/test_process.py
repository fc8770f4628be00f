"""The process of a command: closed and full streams, a working folder that is gone, and Ctrl-C at any time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import in_a_process

COMMAND = [sys.executable, "-m", "simpletuner_layerprobe.cli"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


def redirected(how: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The command with a shell's redirections, such as ">&-", which closes its stdout."""
    line = ["sh", "-c", f'exec "$@" {how}', "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_closed_standard_output_is_said_before_anything_is_done(tiny_run: Path, tmp_path: Path) -> None:
    for arguments in (("status", tiny_run), ("export", tiny_run, tmp_path / "x.csv"), ("--help",)):
        done = redirected(">&-", *arguments)
        assert (done.returncode, done.stderr) == (1, "layerprobe: error: standard output is closed\n")
    assert not (tmp_path / "x.csv").exists()
    done = redirected(">&- 2>&-", "status", tiny_run)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_closed_standard_error_leaves_the_exit_code_alone(tiny_run: Path, tmp_path: Path) -> None:
    done = redirected("2>&-", "status", tmp_path / "absent")
    assert (done.returncode, done.stdout) == (1, "")
    done = redirected("2>&-", "--wrong")
    assert (done.returncode, done.stdout) == (2, "")


def test_no_file_takes_the_place_of_a_closed_stream(tiny_run: Path, tmp_path: Path) -> None:
    """What a library prints to descriptor 2 is not to stand in the next file that was opened."""
    code = (
        "import os, sys\nfrom simpletuner_layerprobe.commands.process import open_streams\n"
        "print(open_streams(), open(sys.argv[1]).fileno() > 2); os.write(2, b'nowhere'); print(sys.stdin.read() == '')"
    )
    line = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", code, str(tiny_run / "manifest.json")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True True\nTrue\n")


def test_what_is_written_is_said_though_nobody_reads_the_output(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    process = subprocess.Popen([*COMMAND, "export", tiny_run, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(), said) == (1, f"layerprobe: written: {out}\n")
    assert out.read_text().count("\n") == 401


@needs_full
def test_what_is_written_is_said_though_the_output_is_full(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    done = redirected(f">{FULL}", "export", tiny_run, out)
    assert done.returncode == 1
    assert done.stderr == f"layerprobe: error: No space left on device; written: {out}\n"
    done = redirected(f"2>{FULL}", "status", tmp_path / "absent")
    assert (done.returncode, done.stdout) == (1, "")


def test_records_go_to_standard_output(tiny_run: Path, tmp_path: Path) -> None:
    done = in_a_process("export", str(tiny_run), "-", cwd=tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 400 and done.stdout.startswith('{"timestep": ')
    assert not (tmp_path / "-").exists()


def test_a_deleted_working_folder_is_one_line(tiny_run: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = ["sh", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "sh", gone, *COMMAND, "status", tiny_run]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("layerprobe: error: the working folder cannot be used (")
    assert done.stderr.count("\n") == 1


INTERRUPTED = """
import os, signal, sys, time

class Interrupting:
    '''Sends this process a Ctrl-C when a module is imported for the first time.'''

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            {what}

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)

class Dropped:
    def __del__(self):
        interrupt()

def drop():
    Dropped()
    time.sleep(30)

def convert():
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ImportError("numpy.core.multiarray failed to import") from None

def print_and_convert():
    try:
        interrupt()
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # as PyErr_Print does in numpy's import_array
        raise ImportError("numpy.core.multiarray failed to import") from None

from simpletuner_layerprobe.cli import main

sys.meta_path.insert(0, Interrupting(sys.argv.pop(1)))
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("simpletuner_layerprobe.commands", "interrupt()"),
        ("simpletuner_layerprobe.commands.arguments", "interrupt()"),
        ("simpletuner_layerprobe.commands.trial", "interrupt()"),
        ("numpy", "interrupt()"),
        ("pyarrow", "drop()"),
        ("pyarrow", "convert()"),
        ("pyarrow", "print_and_convert()"),
    ],
)
def test_ctrl_c_at_any_import_is_one_line(tiny_run: Path, module: str, what: str) -> None:
    code = INTERRUPTED.replace("{what}", what)
    command = [sys.executable, "-c", code, module, "status", str(tiny_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (130, "layerprobe: interrupted\n")


def test_ctrl_c_that_is_ignored_stays_so(tiny_run: Path) -> None:
    """As under nohup, and in the background of a script."""
    line = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c"]
    code = INTERRUPTED.replace("{what}", "os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([*line, code, "numpy", "status", str(tiny_run)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "400 samples" in done.stdout


def test_a_command_in_somebody_elses_process_leaves_its_signals_alone(tiny_run: Path) -> None:
    code = (
        "import signal, sys; from simpletuner_layerprobe.cli import main\n"
        "before = signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook\n"
        "main(['status', sys.argv[1]])\n"
        "assert before == (signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook)"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_run], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), os.linesep + done.stderr
