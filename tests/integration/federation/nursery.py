"""Process that forks others, so that they need not import torch again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Nursery:
    """Process that has imported torch, and forks others, which start immediately."""

    def __init__(self) -> None:
        program = Path(__file__).parent / "crash_injection.py"
        self._process = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(
        self, argv: list[Any], cwd: Path, log: str, kill_at: int | str | None = None, **env: str
    ) -> dict[str, int]:
        request = {"argv": list(map(str, argv)), "cwd": str(cwd), "env": env, "log": log, "kill_at": kill_at}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
