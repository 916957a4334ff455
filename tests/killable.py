"""The command line in processes that can be killed: ``python killable.py``, a request a line on its input.

The process imports mclip once and computes nothing itself. For each request it forks a child, which runs one command
and gets SIGKILL at a given place, as if the machine had failed there: no ``finally``, no flush, no exit handler.

A request is JSON: "arguments" of the command line, "place" where it dies (a key of PLACES, or "any"; none lets it
end), and "step", the optimiser step at or after which. The answer is the child's exit status: -9 if it was killed.
"any" is a kill from outside: once the record of the step is in the file "log", and "delay" seconds later.
"""

import gc
import json
import math
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mclip.cli.main import main, parse
from mclip.text_encoder import _byte_pairs

PLACES = {
    "drawing": "mclip.scenes.world:captions_of",  # the cache's folder holds the pictures and lacks the captions
    "targets": "mclip.targets:embed_pictures",  # it holds the teacher's captions and lacks the pictures
    "beginning": "mclip.checkpoints:atomic_path",  # settings are written, the log is not yet
    "between": "mclip.steps:Stepper.take",  # two steps
    "gradient": "lightning_fabric:Fabric.clip_gradients",  # a step has its gradient and has not moved yet
    "line": "mclip.checkpoints:RunState.record",  # half a line of the log is written
    "half": "torch:save",  # half of a checkpoint is written
    "whole": "torch:save",  # all of it, but it has no name yet
    "named": "mclip.checkpoints:RunState.checkpoints",  # it has, but a third one is still there
    "validation": "mclip.recipes:embed_texts",
    "model": "mclip.model:write_json",  # weights are written, config.json is not
}
ANY_STEP = ("drawing", "targets", "beginning", "model")
LIMIT = 120  # seconds for one command


def die() -> None:
    """End this process, with no chance to do anything more."""
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace what ``name``, as "module:function" or "module:Class.function", stands for."""
    module, _, inside = name.partition(":")
    owner, _, function = inside.rpartition(".")
    place = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
    setattr(place, function, wrapper(getattr(place, function)))


def set_trap(place: str, step: int) -> None:
    """Make this process die at ``place`` of optimiser step ``step``, or at the first one after it."""
    now = -math.inf

    def count(take: Callable) -> Callable:
        def counted(stepper: Any, pieces: Any, number: int, *rest: Any) -> Any:
            nonlocal now
            now = number
            return take(stepper, pieces, number, *rest)

        return counted

    def trap(function: Callable) -> Callable:
        def trapped(*arguments: Any, **keys: Any) -> Any:
            if place in ANY_STEP or now >= step:
                finish(function, *arguments, **keys)
                die()
            return function(*arguments, **keys)

        return trapped

    def finish(function: Callable, *arguments: Any, **keys: Any) -> None:
        """What is still done of the function that the process dies in."""
        if place == "line":
            with (arguments[0].folder / "log.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(arguments[1])[:40])
        if place in ("half", "whole"):
            function(*arguments, **keys)
        if place == "half":
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)

    wrap(PLACES[place], trap)
    wrap(PLACES["between"], count)  # after the trap, so that it is counted before it


def kill_after(child: int, log: Path, step: int, delay: float) -> None:
    """Kill ``child`` ``delay`` seconds after the record of ``step`` is in ``log``, or once it has ended."""
    while not (log.exists() and f'{{"step": {step}, "phase"' in log.read_text(encoding="utf-8")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def attempt(arguments: list[str], place: str = "", step: int = -1, delay: float = 0.0, log: str = "") -> int:
    """Run the command in a child and return its exit status; what it prints goes to standard error."""
    child = os.fork()
    if not child:
        try:
            os.dup2(2, 1)
            signal.alarm(LIMIT)  # a command that hangs ends with status -14
            if place in PLACES:
                set_trap(place, step)
            os._exit(main(arguments))
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    if place == "any":
        kill_after(child, Path(log), step, delay)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for name in ("train", "distill"):
        parse(name, [])  # imports what a command needs
    _byte_pairs()
    gc.freeze()  # the collector would touch, and so copy, every page that the children share
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(attempt(**json.loads(line))), flush=True)
