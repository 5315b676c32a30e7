"""A tiny run and processes to end it in: what the scripts of this folder share.

Programs are forked from this process, which has loaded everything: a start takes a tenth of a second, not ten.
"""

import argparse
import dataclasses
import functools
import gc
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from shared import ROOT, byte_tokenizer, make_config, tiny_model, write_lines

import evaluate
import invert4tvg
import rewards
from engine.model.loading import newest_checkpoint
from engine.program.launch import launch
from engine.words.verbs import verbs


def make(folder, **changes):
    """A configuration whose model answers well-formed now and then, so that its weights move."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    tokenizer = byte_tokenizer()
    tiny_model(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (model / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.3, 0.3, 0.3]}')
    config = make_config(folder, model)
    line = {"video": "AAA", "query": "person runs", "start": 0, "end": 2,
            "completion": "<think>a</think><answer>1 to 2</answer>"}
    demonstrations = write_lines(folder / "demos.jsonl", [line | {"task": task} for task in rewards.TASKS])
    stage = dataclasses.replace(config, demonstrations=demonstrations, micro_batch=4, accumulation=1, iterations=40,
                                lr=1.5e-2, gradient_checkpointing=False, output=str(folder / "babbler"))
    status = wait(start(stage, folder / "babbler.txt"))
    if status != [0]:
        sys.exit(f"the supervised stage ended with status {status}; see {folder / 'babbler.txt'}.")
    verbs("a person opens it")  # loads spaCy, once for all that is forked
    return dataclasses.replace(config, **{"model": str(newest_checkpoint(stage.output)), "max_new_tokens": 40,
                                          "workers": 1, "accumulation": 1} | changes)


def start(settings, log, ranks=1, function=None):
    """Fork a training (of Config) or an evaluation (of EvalSettings) in `ranks` processes -> their ids.

    They are a process group of their own; what they print goes to the file `log`.
    """
    program = evaluate.main if isinstance(settings, evaluate.EvalSettings) else invert4tvg.train
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 70
            gc.freeze()  # process groups that were left before could not be taken apart here, without their threads
            signal.signal(signal.SIGINT, signal.default_int_handler)  # where nohup or & has them ignored
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            try:
                os.setpgid(0, pids[0] if pids else 0)
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(output, stream)
                sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                                   "MASTER_PORT": str(port)}
                if function:
                    function(settings)
                else:
                    launch(program, settings)
                status = 0
            except SystemExit as stop:
                status = stop.code
                if not isinstance(status, int):
                    print(status, file=sys.stderr)
                    status = 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
        try:
            os.setpgid(pid, pids[0])
        except (PermissionError, ProcessLookupError):
            pass  # it has done so itself, or has ended
    return pids


def run_program(*argv, cwd=ROOT):
    """`python *argv` in the folder `cwd` -> (status, what it printed).

    On Linux it is forked from this process. In another folder than ROOT its own top files and papers/ count, not
    ROOT's. Elsewhere it is started anew: libraries of macOS may crash in a fork that uses them again.
    """
    if sys.platform != "linux":
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, text=True, encoding="utf-8",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        return done.returncode, done.stdout
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output.txt"
        [status] = wait(start([*map(str, argv)], log, function=functools.partial(be_program, cwd=cwd)))
        return status, log.read_text(encoding="utf-8")


def be_program(argv, cwd=ROOT):
    """What Python does with these arguments: a script, or -m and a module."""
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    if cwd != ROOT:
        forget_project("papers")
    sys.argv = argv
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.modules.pop(argv[1], None)
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def forget_project(*folders):
    """Let the top files and what is in these folders be imported anew."""
    ours = {*folders, *(path.stem for path in ROOT.glob("*.py"))}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]


def runs(pid):
    """Whether a process that was started has not ended yet; `wait` still gives its status."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait(pids, seconds=300.0):
    """-> the status of each process, negative for a signal; after `seconds` None, and it is killed."""
    ends = time.monotonic() + seconds
    statuses = {}
    while len(statuses) < len(pids) and time.monotonic() < ends:
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in set(pids) - statuses.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [statuses.get(pid) for pid in pids]


def left_behind(group, seconds=5.0):
    """Whether a process of a group still lives after `seconds`; it is killed."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return True


def main(description, campaign, **counts):
    """The command line of a campaign: each of `counts` is an option; the campaign gets a folder, which is removed."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default="", help="keep what is written here")
    arguments = vars(parser.parse_args())
    given = arguments.pop("folder")
    folder = Path(given or tempfile.mkdtemp())
    try:
        failures = campaign(folder, **arguments)
    finally:
        if not given:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if failures else 0)
