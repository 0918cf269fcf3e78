"""Programs that run in processes of their own, forked from one that has imported torch, which takes a second."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path

SERVER = """
import importlib, json, os, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    call = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.environ.clear()
    os.environ.update(call["environment"])
    for number, file in enumerate((os.devnull, call["stdout"], call["stderr"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.argv[1:] = call["words"]
    exec(call["program"], {"__name__": "__main__"})
    sys.exit()
"""


class ForkServer:
    """`imported` are the modules that all programs find imported; none of them may have read the environment."""

    def __init__(self, environment: dict[str, str], *imported: str) -> None:
        command = [sys.executable, "-c", SERVER, *imported]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def run(
        self, program: str, words: list[str], environment: dict[str, str], folder: Path, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of `python -c program *words`; `folder` takes what it prints.

        Raises `TimeoutError` where it takes longer than `seconds`; the server is of no use after that.
        """
        files = {name: str(folder / name) for name in ("stdout", "stderr")}
        for file in files.values():
            Path(file).write_text("")
        call = {"program": program, "words": words, "environment": environment, **files}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"no end after {seconds} s: {Path(files['stderr']).read_text()}")
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(Path(file).read_text() for file in files.values()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
