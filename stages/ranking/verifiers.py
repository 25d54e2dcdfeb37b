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
from functools import cache, lru_cache
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any

from pipeline import Range
from stages.ranking.instructions import followed, instructions_of
from stages.ranking.rankers import verifier

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

Seconds = Annotated[float, Range(gt=0, le=3600)]
Megabytes = Annotated[int, Range(ge=64, le=10**6)]
DELIMITED = re.compile(r"\$.+\$|\\boxed|\\\(|\\\[", re.DOTALL)  # LaTeX that says where it begins
NUMBER = re.compile(r"[-+]?[$€£]?(?:\d+|[1-9]\d{0,2}(?:[ ,]\d{3})+)?(?:\.\d*)?\s*%?")
E_NOTATION = re.compile(r"\d[eE][-+]?\d")  # e would be Euler's number
TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|sf)|mbox)\b")
COMMAND = re.compile(r"\\[A-Za-z]+")
OPTION_LETTER = re.compile(r"[\s(){}.]*[A-Z][\s(){}.]*")
VARIABLES = re.compile("[a-d]+|[k-n]+|[p-t]+|[w-z]+")  # of a product without signs, such as xyz

# Runs in the sandboxed process. What was given is read before any code runs; the token is written only if it ends: at
# the end of the last source, or by an exit with code 0 that is reached in that source alone, as in `unittest.main()`.
RUNNER = """
import json, os, resource, sys, traceback, types
given = json.load(sys.stdin)
for name, limit in given["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
main = sys.modules["__main__"] = types.ModuleType("__main__")  # which unittest.main() searches
*programs, tests = given["sources"]
for source in programs:
    exec(compile(source, "<program>", "exec"), main.__dict__)
try:
    exec(compile(tests, "<tests>", "exec"), main.__dict__)
except SystemExit as end:
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(end.__traceback__)}
    if end.code not in (None, 0) or "<program>" in files:
        raise
os.write(given["pipe"], given["token"].encode())
"""
CHECK_SECONDS, CHECK_MEGABYTES = 10.0, 1024  # of tests without a program
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
# Ends a program with the thread that started it, which waits for it: also where that is killed.
ENDING = ("setpriv", "--pdeathsig", "KILL")


@lru_cache(maxsize=4096)
def _reference_answer(text: str, limit: int | None) -> Any:
    """Return a reference answer as math-verify reads it in `\\boxed`; empty if it cannot, or is no mathematics."""
    from math_verify import parse, verify

    text = text.rpartition("####")[2].strip()  # GSM8K writes its answer after this mark
    if DELIMITED.search(text) or NUMBER.fullmatch(text):
        return parse(text, parsing_timeout=limit)
    # As LaTeX: of a text without delimiters, it would read the last number only, 3 of 3\sqrt{13}.
    boxed = parse(rf"\boxed{{{text}}}", parsing_timeout=limit)
    answer = boxed[0] if boxed else None  # a text where only the text was read
    if E_NOTATION.search(text) or answer is None or isinstance(answer, str):
        return []
    if _has_words(text) and answer.free_symbols:  # which it reads as products of variables
        return []
    return boxed if verify([answer], [answer], timeout_seconds=limit) else []


def _has_words(text: str) -> bool:
    """Return whether letters of a LaTeX text are words, or one that names an option, and not variables."""
    plain = COMMAND.sub(" ", TEXT_COMMAND.sub(" ", text))
    if OPTION_LETTER.fullmatch(plain):
        return True
    runs = re.findall("[A-Za-z]{2,}", plain)
    return any(
        bool(set(run.lower()) & set("eiou")) or (len(run) > 2 and not VARIABLES.fullmatch(run.lower())) for run in runs
    )


def _parsing_limit() -> int | None:
    return 5 if threading.current_thread() is threading.main_thread() else None  # it is kept by a signal


def check_answer(fields: Mapping[str, str], *, column: str) -> None:
    """Raise ValueError if the reference answer cannot be parsed."""
    if not _reference_answer(fields[column], _parsing_limit()):
        raise ValueError(f"{column} is no answer that math-verify can parse, such as a number or LaTeX, and no word")


@verifier(columns=("column",), check=check_answer, requires="math_verify", label_threshold=0.5, version=3)
def math_answer(prompt: str, response: str, fields: Mapping[str, str], *, column: str = "answer") -> float:
    r"""Return 1 if the response's last answer equals the one in the kept column, by math-verify, else 0.

    `1/2`, `0.5` and `\frac{1}{2}` are equal. A reference answer is LaTeX, with or without `$`, or the number after
    `####`; of a response, `\boxed{}`, the LaTeX between `$`, or else the last number is read. Responses are rejected if
    the reference answer cannot be parsed, or is a word, the letter of an option, or in the notation `1e5`. A comparison
    may take 5 seconds, outside the main thread without a limit.
    """
    from math_verify import parse, verify

    limit = _parsing_limit()
    reference = _reference_answer(fields[column], limit)
    return float(verify(reference, parse(response, parsing_timeout=limit), timeout_seconds=limit))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _parse_json(text: str) -> Any:
    """Return the value of a JSON text; raise ValueError or RecursionError for NaN, Infinity and 1e400 too."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite)


@lru_cache(maxsize=4096)
def _validator(schema: str) -> Any:
    """Return the validator of a JSON schema; raise ValueError if it is none, or refers to what it does not hold."""
    from jsonschema_rs import RegexOptions, validator_for

    def retrieve(address: str) -> Any:
        raise ValueError("references to other documents are not fetched")

    return validator_for(_parse_json(schema), retriever=retrieve, pattern_options=RegexOptions())


def check_schema(fields: Mapping[str, str], *, column: str) -> None:
    """Raise ValueError if the column is no JSON schema, or one with a reference or a pattern that cannot be read."""
    try:
        _validator(fields[column])
    except (ValueError, RecursionError) as error:
        (line, *_) = str(error).splitlines() or [""]
        raise ValueError(f"{column} is no JSON schema ({line})") from None


@verifier(columns=("column",), check=check_schema, requires="jsonschema_rs", label_threshold=0.5, version=3)
def json_schema(prompt: str, response: str, fields: Mapping[str, str], *, column: str = "schema") -> float:
    """Return 1 if the response, or its last block fenced as code, is JSON that fits the schema in the column, else 0.

    Responses are rejected if the column is no JSON schema, refers to another document, which is not fetched, or to a
    part that it lacks, or has a pattern that takes more than linear time (look-around, back-references). NaN, Infinity
    and numbers beyond float64 are no JSON.
    """
    try:
        return float(_validator(fields[column]).is_valid(_parse_json(_last_block(response))))
    except (ValueError, RecursionError):
        return 0.0


def _tests_of(text: str) -> str:
    """Return the Python of a column of tests; a JSON list of texts, as MBPP has it, is joined by line breaks."""
    with suppress(ValueError, RecursionError):
        items = json.loads(text)
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return "\n".join(items)
    return text


@lru_cache(maxsize=4096)
def _decides_nothing(tests: str) -> bool:
    return runs_to_its_end(["", tests], CHECK_SECONDS, CHECK_MEGABYTES)


def check_tests(fields: Mapping[str, str], *, column: str) -> None:
    """Raise ValueError if no program passes the tests, or an empty one does: they are functions that nobody calls."""
    try:
        compile(_tests_of(fields[column]), "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{column} is no Python ({error})") from None
    if _decides_nothing(_tests_of(fields[column])):
        raise ValueError(f"{column} is no test that an empty program fails: it must call the code itself")


@verifier(columns=("column",), check=check_tests, label_threshold=0.5, version=2)
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

    A column with a JSON list of texts is one program of these lines. Tests that an empty program passes decide nothing,
    and reject responses: a function that a test runner would call, as those of pytest, must be called in the column
    (`unittest.main()`, `check(solution)`). An exit with code 0 that the tests themselves call is success.

    They run in a process of their own, in an empty folder, with at most `timeout` seconds, `memory` MB of address
    space and 16 MB in a file, and without network where the machine allows `unshare`. This stops accidents, and not an
    attack: the code reads what its user can read, and one that looks for it can feign success. Against hostile code
    run the worker itself in a container.
    """
    return float(runs_to_its_end([_last_block(response), _tests_of(fields[column])], timeout, memory))


def check_instructions(fields: Mapping[str, str], *, ids: str, arguments: str) -> None:
    """Raise ValueError for an unknown instruction, or arguments that it cannot read."""
    instructions_of(fields[ids], fields[arguments])


@verifier(columns=("ids", "arguments"), check=check_instructions, label_threshold=0.5, version=2)
def instructions(
    prompt: str,
    response: str,
    fields: Mapping[str, str],
    *,
    ids: str = "instruction_id_list",
    arguments: str = "kwargs",
) -> float:
    """Return 1 if the response follows all instructions of its row, else 0: IFEval's strict accuracy per prompt.

    See arXiv:2311.07911. The columns are those of google/IFEval. Of its 25 kinds of instructions, one is not known, the
    language of a response, because to detect it takes a model; responses to prompts with it are rejected by name.
    Sentences are counted by their marks, and capitals and small letters in any language.
    """
    return float(all(followed(response, fields[ids], fields[arguments])))


@verifier(columns=("ids", "arguments"), check=check_instructions, version=2)
def instruction_share(
    prompt: str,
    response: str,
    fields: Mapping[str, str],
    *,
    ids: str = "instruction_id_list",
    arguments: str = "kwargs",
) -> float:
    """Return the share of its row's instructions that the response follows, as `instructions` reads them."""
    results = followed(response, fields[ids], fields[arguments])
    return sum(results) / len(results)


@cache
def _fence_parser() -> "MarkdownIt":
    """Return a parser of fenced blocks, in any indentation, as inside of a list; its import takes 30 ms."""
    from markdown_it import MarkdownIt

    return MarkdownIt("zero").enable("fence")


def _last_block(response: str) -> str:
    """Return the last block that is fenced as code, by ``` or ~~~ as Markdown has it, or the response if it has none.

    A block that is not closed goes to the end; a fence at the end of its last line, no fence in Markdown, closes it.
    """
    blocks = [token for token in _fence_parser().parse(response) if token.type == "fence"]
    return blocks[-1].content.rstrip().removesuffix(blocks[-1].markup) if blocks else response


@cache
def _prefix() -> tuple[str, ...]:
    """Return the command that takes network and other processes away, and ends what it runs with this process.

    Where the machine does not allow one of the two, it is the other, or nothing.
    """
    for prefix in ((*ENDING, *UNSHARE), UNSHARE, ENDING):
        with suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*prefix, "true"], capture_output=True, timeout=10).returncode == 0:
                return prefix
    return ()


def runs_to_its_end(sources: list[str], timeout: float, memory: int) -> bool:
    """Return whether Python sources run one after the other in one process without an exception or an early exit.

    All processes of its group are killed at the end; those that leave the group only where `unshare` is allowed.
    """
    token = token_hex(16)
    read, write = os.pipe()
    limits = {"RLIMIT_CPU": math.ceil(timeout), "RLIMIT_AS": memory << 20, "RLIMIT_FSIZE": 16 << 20, "RLIMIT_CORE": 0}
    runner_input = json.dumps({"sources": sources, "token": token, "pipe": write, "limits": limits})
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
                    process.communicate(runner_input, timeout=timeout)
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
