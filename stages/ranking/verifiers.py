"""Verifiable rewards: programs that compare a response with what its prompt's row of the data file says is right.

They read columns that `prompts` keeps (option `keep`), return 1 for right and 0 for wrong, and are rankers (`by`) and
gold rewards (`gold`) by one name. A library that one needs is part of the extra `verifiers`.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from secrets import token_hex
from typing import Annotated, Any

from pipeline import Range
from stages.ranking.rankers import verifier

Seconds = Annotated[float, Range(gt=0, le=3600)]
Megabytes = Annotated[int, Range(ge=64, le=10**6)]
FENCE = re.compile(r"```([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)

# Runs in the sandboxed process. What was given is read before any code runs; the token is written only if it ends.
RUNNER = """
import json, os, resource, sys
given = json.load(sys.stdin)
for name, limit in given["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
space = {"__name__": "__main__"}
for source in given["sources"]:
    exec(compile(source, "<program>", "exec"), space)
os.write(given["pipe"], given["token"].encode())
"""
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


@verifier(columns=("column",), requires="math_verify", label_threshold=0.5)
def math_answer(prompt: str, response: str, fields: Mapping[str, str], *, column: str = "answer") -> float:
    r"""Return 1 if the response's last answer equals the one in the kept column, by math-verify, else 0.

    `1/2`, `0.5` and `\frac{1}{2}` are equal. A reference answer that cannot be parsed gives nan, which rejects the
    candidate, and ends `evaluate`. A comparison may take 5 seconds, outside the main thread without a limit.
    """
    from math_verify import parse, verify

    limit = 5 if threading.current_thread() is threading.main_thread() else None  # it is kept by a signal
    text = fields[column].rpartition("####")[2].strip()  # GSM8K writes its answer after this mark
    reference = parse(text, parsing_timeout=limit) or parse(f"${text}$", parsing_timeout=limit)
    if not reference:
        return math.nan
    return float(verify(reference, parse(response, parsing_timeout=limit), timeout_seconds=limit))


@verifier(columns=("column",), requires="jsonschema", label_threshold=0.5)
def json_schema(prompt: str, response: str, fields: Mapping[str, str], *, column: str = "schema") -> float:
    """Return 1 if the response, or its last block fenced as code, is JSON that fits the schema in the column, else 0.

    A column that is no JSON schema gives nan, which rejects the candidate, and ends `evaluate`. References to other
    documents are not fetched: they count as wrong.
    """
    from jsonschema import exceptions, validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        expected = json.loads(fields[column])
        kind: Any = validators.validator_for(expected)
        kind.check_schema(expected)
    except (ValueError, exceptions.SchemaError):
        return math.nan
    try:
        return float(kind(expected, registry=Registry()).is_valid(json.loads(_last_block(response))))
    except (ValueError, RecursionError, Unresolvable):
        return 0.0


@verifier(columns=("column",), label_threshold=0.5)
def code_tests(
    prompt: str,
    response: str,
    fields: Mapping[str, str],
    *,
    column: str = "tests",
    timeout: Seconds = 10.0,
    memory: Megabytes = 1024,
) -> float:
    """Return 1 if the response's last block fenced as code runs, and then the Python of the kept column, else 0.

    They run in a process of their own, in an empty folder, with at most `timeout` seconds, `memory` MB of address
    space and 16 MB in a file, and without network where the machine allows `unshare`. This stops accidents, and not an
    attack: the code reads what its user can read, and one that looks for it can feign success. Against hostile code
    run the worker itself in a container.
    """
    return float(runs_to_its_end([_last_block(response), fields[column]], timeout, memory))


def _last_block(response: str) -> str:
    """Return the last block that is fenced as code, or the response if it has none."""
    return next((str(match[2]) for match in reversed(list(FENCE.finditer(response)))), response)


@cache
def _prefix() -> tuple[str, ...]:
    """Return the command that takes network and other processes away; nothing where the machine does not allow it."""
    try:
        allowed = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        allowed = False
    return UNSHARE if allowed else ()


def runs_to_its_end(sources: list[str], timeout: float, memory: int) -> bool:
    """Return whether Python sources run one after the other in one process without an exception or an early exit.

    All processes of its group are killed at the end; those that leave the group only where `unshare` is allowed.
    """
    token = token_hex(16)
    read, write = os.pipe()
    limits = {"RLIMIT_CPU": math.ceil(timeout), "RLIMIT_AS": memory << 20, "RLIMIT_FSIZE": 16 << 20, "RLIMIT_CORE": 0}
    given = json.dumps({"sources": sources, "token": token, "pipe": write, "limits": limits})
    try:
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [*_prefix(), sys.executable, "-I", "-c", RUNNER],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
                pass_fds=[write],
                start_new_session=True,
                text=True,
            )
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(given, timeout=timeout)
            finally:
                with suppress(ProcessLookupError):  # all of it has ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        os.set_blocking(read, False)
        try:
            return os.read(read, len(token)).decode(errors="replace") == token
        except BlockingIOError:
            return False
    finally:
        os.close(read)
        os.close(write)
