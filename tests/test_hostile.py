"""Input that is broken, or meant to break: each case is refused in words, rejected with a reason, or read as it is.

Cases are data: what is given, and facts of the message that a user gets. They go through the narrowest seam that gives
that message, and none takes long, needs much memory or runs code.
"""

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.commands.run import _write_new
from jobs.commands.verify import _problem, _without_plugins
from jobs.console import ProgressReporter, VisibleConsole, as_table, visible
from jobs.output import interruptible
from pipeline import AdapterPath, DataPath, ModelPath, TemplatePath
from pipeline.config.recipe import load_recipe, name_problems
from pipeline.config.yaml import parse, read_yaml
from pipeline.context import Mirror
from pipeline.plugins import unload_plugins
from pipeline.sql.catalog import open_catalog, query
from pipeline.stage import stages
from pipeline.store.store import Store
from schemas import Model, WinnowError
from stages.data.file_rows import _batch_rows, column_names, file_rows
from stages.data.files import DataSource
from stages.data.preferences import preferences
from stages.data.texts import messages_of, number_of, prompt_of, reply_of, text_of, tools_of
from stages.data.tokenizer import Tokenizer
from stages.network.load import read_network
from stages.network.models import _check_model
from stages.sampling.engines.options import _check as checked_engine_options
from stages.training.checkpoints import Checkpoints
from stages.training.distributed import Distributed
from tests.catalogs import link, put, rewards
from tests.conftest import write_jsonl


def refusal(call, *args) -> str:
    """Return the message of a call that must be refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((WinnowError, ValueError)) as caught:
            call(*args)
    return str(caught.value)


def assert_facts(message: str, facts) -> None:
    assert all(fact in message for fact in facts), message
    assert "Traceback" not in message
    assert len(message) < 3000


# YAML

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)
MAP_BOMB = "a: &a {k: v, l: w}\n" + "".join(
    f"{c}: &{c} {{{', '.join(f'{n}: *{b}' for n in 'pqrstuvwx')}}}\n"
    for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {k: v}\n" + "".join(
    f"{c}: &{c} {{<<: [{', '.join([f'*{b}'] * 9)}]}}\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)
ALIAS_CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))
YAML = [
    (BOMB, ["100,000"]),
    (MAP_BOMB, ["100,000"]),
    (MERGE_BOMB, ["100,000"]),
    (ALIAS_CHAIN, ["100", "aliases"]),
    ("a: &a [*a]", ["contains itself"]),
    ("a: &a {b: *a}", ["contains itself"]),
    ("a: &a {<<: *a}", ["contains itself"]),
    ("a: &a {<<: [*a]}", ["contains itself"]),
    ("a: " + "[" * 2000 + "]" * 2000, ["100 collections"]),
    ("a: " + "{b: " * 2000 + "1" + "}" * 2000, ["100 collections"]),
    ("- " * 2000 + "a", ["100 collections"]),
    ("a: " + "[" * 100_000, ["100 collections"]),
    ("".join(f"{' ' * n}a:\n" for n in range(2000)), ["100 collections"]),
    ("null: {}", ["key null", "quote"]),
    ("~: {}", ["key ~", "quote"]),
    ("? \n: 1", ["key", "not text"]),
    ("1: {}", ["key 1"]),
    ("1.5: {}", ["key 1.5"]),
    ("true: {}", ["key true"]),
    ("[a]: 1", ["key"]),
    ("{a: 1}: 1", ["key"]),
    ("a: 1\na: 2", ["'a'", "twice"]),
    ("a: {b: 1, b: 1}", ["'b'", "twice"]),
    ("a: !!python/object/apply:os.system [ls]", ["python/object"]),
    ("a: !!python/name:os.system", ["python/name"]),
    ("a: !!python/module:os", ["python/module"]),
    ("a: !ENV x", ["!ENV"]),
    ("a: !!binary aGk=", ["binary"]),
    ("a: !!timestamp 2026-01-01", ["timestamp"]),
    ("a: !!set {b}", ["set"]),
    ("a: !!omap [b: 1]", ["omap"]),
    ("a: !!int x", ["'x'"]),
    ("a: !!float x", ["'x'"]),
    ("a: !!null x", ["'x'"]),
    ("a: !!map [1]", ["mapping"]),
    ("a: *b", ["undefined alias"]),
    ("a: [1", ["line"]),
    ("a: 'b", ["line"]),
    ('a: "\\q"', ["line 1"]),
    ("a: b: c", ["line 1"]),
    ("\ta: 1", ["line 1"]),
    ("a: 1\n---\nb: 2", ["document"]),
    ("a: \x00", ["character"]),
    ("a: \x1b[31m", ["character"]),
    ("a: \x85\x07", ["character"]),
    ("%YAML 3.0\n---\na: 1", ["line 1"]),
    ("a: " + "9" * 5000, ["digits"]),
    ("<<: 1", ["line 1"]),
    ("a: {<<: [1]}", ["line 1"]),
]


@pytest.mark.parametrize(("text", "facts"), YAML, ids=range(len(YAML)))
def test_yaml_is_refused_in_one_line(text, facts):
    message = refusal(parse, text, "recipe x.yaml")
    assert_facts(message, ["recipe x.yaml: not YAML: ", *facts])
    assert "\n" not in message


def make_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.yaml")
    return folder / "pipe.yaml"


def make_loop(folder: Path) -> Path:
    (folder / "a.yaml").symlink_to(folder / "b.yaml")
    (folder / "b.yaml").symlink_to(folder / "a.yaml")
    return folder / "a.yaml"


def make_file(content: bytes, name: str = "x.yaml"):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def make_link(target: str, name: str = "x.yaml"):
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


RECIPE_FILES = [
    (make_pipe, ["pipe.yaml", "pipe"]),
    (make_loop, ["a.yaml", "cannot be read"]),
    (make_link("/dev/zero"), ["x.yaml", "device"]),
    (make_link("/dev/null"), ["x.yaml", "device"]),
    (make_link("/nowhere/x.yaml"), ["x.yaml", "no such file"]),
    (make_file(b"a: x\n" * 300_000), ["x.yaml", "1,048,576 bytes"]),
    (make_file("a: ä".encode("latin-1")), ["x.yaml", "cannot be read"]),
    (make_file("a: 1".encode("utf-16")), ["x.yaml", "cannot be read"]),
    (lambda folder: folder, ["folder", "YAML file"]),
    (lambda folder: folder / "none.yaml", ["none.yaml", "no such file"]),
    (lambda folder: folder / ("x" * 300), ["cannot be read"]),
    (lambda folder: folder / "a\0b.yaml", ["cannot be read"]),
]


@pytest.mark.parametrize(("make", "facts"), RECIPE_FILES, ids=range(len(RECIPE_FILES)))
def test_a_file_that_is_no_recipe_is_refused(tmp_path, make, facts):
    assert_facts(refusal(read_yaml, make(tmp_path), "recipe"), facts)


# Recipes

RECIPES = [
    ("", ["mapping of step names"]),
    ("[]", ["mapping of step names"]),
    ("just text", ["mapping of step names"]),
    ("5", ["mapping of step names"]),
    ("a: 1", ["a", "mapping"]),
    ("a: []", ["a", "mapping"]),
    ("a: {use: []}", ["a.use"]),
    ("a: {use: 3}", ["a.use"]),
    ("a: {with: 3}", ["a.with"]),
    ("a: {from: 3}", ["a.from"]),
    ("a: {from: {x: []}}", ["a.from.x"]),
    ("a: {from: {x: {first: b, last: c}}}", ["a.from.x"]),
    ("a: {from: {x: {first: b, then: c}}}", ["no step 'b'"]),
    ("a: {like: a}", ["cycle"]),
    ("a: {like: b}\nb: {like: c}\nc: {like: a}", ["cycle"]),
    ("a: {like: zzz}", ["no step 'zzz'"]),
    ("a: {uze: x}", ["a.uze"]),
    ("a@2: {use: x}", ["'@'"]),
    ("'': {use: x}", ["step's name"]),
    ("'  ': {use: x}", ["step's name"]),
    ('"a\\eb": {use: x}', ["step's name", "printed"]),
    ('"a\\nb": {use: x}', ["step's name", "printed"]),
    ('"a\\u202eb": {use: x}', ["step's name", "printed"]),
    (f"{'x' * 200}: {{use: x}}", ["step's name", "150"]),
    ("shards: 0", ["shards"]),
    ("shards: -1", ["shards"]),
    ("shards: 99999", ["shards", "4096"]),
    ("shards: 1e30", ["shards"]),
    ("shards: 1.5", ["shards"]),
    ("shards: .inf", ["shards"]),
    ("shards: yes", ["shards"]),
    ("shards: '8'", ["shards"]),
    ("shards: [8]", ["shards"]),
    ("rounds: 0", ["rounds"]),
    ("rounds: 1000000000", ["rounds", "99"]),
    ("rounds: 1e30", ["rounds"]),
    ("rounds: .nan", ["rounds"]),
    ("rounds: {}", ["rounds"]),
    ("rounds: [1]", ["rounds"]),
    ("rounds: [{zzz: {with: {a: 1}}}]", ["zzz"]),
    ("dtype: float16", ["dtype"]),
    ("dtype: 32", ["dtype"]),
    ("target: 3", ["target"]),
    ("target: []", ["target"]),
    ("about: [1]", ["about"]),
    ("plugins: x.py", ["plugins"]),
    ("plugins: [3]", ["plugins"]),
    ("evaluations: evaluate", ["evaluations"]),
    ("track: tensorboard", ["track"]),
    ("extends: zzz", ["extends", "zzz"]),
    ("extends: ../../../../etc/passwd", ["extends"]),
    ("extends: 5", ["extends"]),
    ("extends: [a]", ["extends"]),
    ("extends: hostile", ["extends", "cycle"]),
    ('extends: "a\\0b"', ["extends"]),
]


@pytest.mark.parametrize(("text", "facts"), RECIPES, ids=range(len(RECIPES)))
def test_a_recipe_is_refused(tmp_path, text, facts):
    (tmp_path / "hostile.yaml").write_text(text, encoding="utf-8")
    message = refusal(load_recipe, tmp_path / "hostile.yaml")
    assert_facts(message, facts)
    assert message.isprintable() or "\n" in message
    assert "\x1b" not in message


OPTIONS = [
    ("optimize", {"learning_rate": float("inf")}, ["learning_rate"]),
    ("optimize", {"learning_rate": float("nan")}, ["learning_rate"]),
    ("optimize", {"learning_rate": -1e-6}, ["learning_rate"]),
    ("optimize", {"learning_rate": 10**400}, ["learning_rate"]),
    ("optimize", {"learning_rate": "1e-6"}, ["learning_rate"]),
    ("optimize", {"learning_rate": True}, ["learning_rate"]),
    ("optimize", {"learning_rate": [1e-6]}, ["learning_rate"]),
    ("optimize", {"learning_rate": None}, ["learning_rate"]),
    ("optimize", {"batch_size": 0}, ["batch_size"]),
    ("optimize", {"batch_size": 1e30}, ["batch_size"]),
    ("optimize", {"batch_size": 10**30}, ["batch_size"]),
    ("optimize", {"batch_size": -(10**30)}, ["batch_size"]),
    ("optimize", {"batch_size": 2.5}, ["batch_size"]),
    ("optimize", {"seed": -1}, ["seed"]),
    ("optimize", {"seed": 2**80}, ["seed"]),
    ("optimize", {"epochs": float("nan")}, ["epochs"]),
    ("optimize", {"epochs": 1e300}, ["epochs"]),
    ("optimize", {"warmup_ratio": 2}, ["warmup_ratio"]),
    ("optimize", {"max_grad_norm": float("-inf")}, ["max_grad_norm"]),
    ("optimize", {"lora_r": -1}, ["lora_r"]),
    ("optimize", {"world_size": 0}, ["world_size"]),
    ("optimize", {"objective": "nothing"}, ["objective"]),
    ("optimize", {"objective": {}}, ["objective"]),
    ("optimize", {"objective": {"name": ["hinge"]}}, ["objective"]),
    ("optimize", {"objective": {"name": "hinge", "zzz": 1}}, ["zzz"]),
    ("optimize", {"objective": {"name": "hinge", "delta": float("nan")}}, ["delta"]),
    ("optimize", {"lr": 1e-6}, ["lr", "learning_rate"]),
    ("optimize", {"": 1}, ["optimize"]),
    ("optimize", {"a\x1b[31m": 1}, ["optimize"]),
    ("sample", {"n": 0}, ["n"]),
    ("sample", {"n": 1e30}, ["n"]),
    ("sample", {"n": 10**30}, ["n"]),
    ("sample", {"temperature": -1}, ["temperature"]),
    ("sample", {"temperature": 0}, ["temperature", "top_k"]),
    ("sample", {"temperature": float("nan")}, ["temperature"]),
    ("sample", {"temperature": float("inf")}, ["temperature"]),
    ("sample", {"top_p": 0}, ["top_p"]),
    ("sample", {"top_p": 1.1}, ["top_p"]),
    ("sample", {"min_p": -0.1}, ["min_p"]),
    ("sample", {"max_tokens": 0}, ["max_tokens"]),
    ("sample", {"stop": [3]}, ["stop"]),
    ("sample", {"stop": [""]}, ["stop"]),
    ("sample", {"logit_bias": {"a": 1}}, ["logit_bias"]),
    ("sample", {"repetition_penalty": 0}, ["repetition_penalty"]),
    ("sample", {"engine": "nothing"}, ["engine"]),
    ("sample", {"engine": "/bin/sh"}, ["engine"]),
    ("select", {"rule": {"name": "rejection_sample", "k": 0}}, ["k"]),
    ("select", {"rule": {"name": "rejection_sample", "beta": -1}}, ["beta"]),
    ("select", {"rule": {"name": "rejection_sample", "beta": float("nan")}}, ["beta"]),
    ("select", {"rule": 5}, ["rule"]),
    ("prompts", {"heldout": 1.5}, ["heldout"]),
    ("prompts", {"heldout": float("nan")}, ["heldout"]),
    ("prompts", {"max_tokens": -5}, ["max_tokens"]),
    ("prompts", {"keep": "answer"}, ["keep"]),
    ("prompts", {"prompt": 3}, ["prompt"]),
    ("prompts", {"path": ""}, ["path", "empty"]),
    ("prompts", {"path": "  "}, ["path", "empty"]),
    ("prompts", {"path": "~nobody-of-this-name/x.jsonl"}, ["path", "~nobody"]),
    ("prompts", {"path": "a\0b"}, ["path"]),
    ("prompts", {"path": "x" * 5000}, ["path"]),
    ("prompts", {"path": "/dev/zero"}, ["path", "device"]),
    ("prompts", {"path": "/dev/stdin"}, ["path"]),
    ("prompts", {"path": "/nowhere/at/all"}, ["path", "no such file"]),
    ("prompts", {"path": 3}, ["path"]),
    ("prompts", {"path": ["a"]}, ["path"]),
    ("model", {"path": ""}, ["path", "empty"]),
    ("model", {"path": "/dev/zero"}, ["path"]),
    ("model", {"path": "/etc"}, ["path", "config.json"]),
    ("model", {"path": "../../../../../etc/passwd"}, ["path"]),
    ("model", {"path": "~nobody-of-this-name"}, ["path"]),
]


@pytest.mark.parametrize(("stage", "options", "facts"), OPTIONS, ids=range(len(OPTIONS)))
def test_options_are_refused_by_name(stage, options, facts):
    message = refusal(stages.find(stage).validate, options, stage)
    assert_facts(message, facts)
    assert visible(message).replace("\n", "").isprintable()


RUN_NAMES = ["", " ", "a ", " a", "-a", "--force", ".a", "..", "a/b", "/a", "a\nb", "a\x1b[31m", "a\u202eb", "a\u2028b",
             "a\0b", "a@2", "@", "x" * 151, "ä" * 80, "a\x9bb", "a\u200bb"]  # fmt: skip


@pytest.mark.parametrize("name", RUN_NAMES, ids=range(len(RUN_NAMES)))
def test_a_name_of_a_run_is_refused(name):
    assert name_problems(name)


ENGINE_OPTIONS = [
    ({"trust_remote_code": True}, ["code"]),
    ({"worker_cls": "os.system"}, ["worker_cls", "code"]),
    ({"worker_extension_cls": "evil.Worker"}, ["worker_extension_cls", "code"]),
    ({"scheduler_cls": "evil.Scheduler"}, ["scheduler_cls", "code"]),
    ({"io_processor_plugin": "evil"}, ["io_processor_plugin", "code"]),
    ({"reasoning_parser_plugin": "/tmp/evil.py"}, ["reasoning_parser_plugin", "code"]),
    ({"kv_transfer_config": {"kv_connector_module_path": "evil"}}, ["kv_transfer_config", "code"]),
    ({"log_config_file": "/tmp/evil.json"}, ["log_config_file", "code"]),
    ({"distributed_executor_backend": "evil.Executor"}, ["distributed_executor_backend", "code"]),
    ({"compilation_config": {"backend": "evil.compile"}}, ["compilation_config", "code"]),
    ({"load_format": "dummy"}, ["load_format", "random"]),
    ({"load_format": "pt"}, ["load_format", "pickle"]),
    ({"model": "other"}, ["model"]),
    ({"hf_token": "secret"}, ["hf_token"]),
    ({"max_model_len": 1e30}, ["max_model_len"]),
    ({"hf_overrides": float("nan")}, ["JSON"]),
    ({"hf_overrides": object()}, ["JSON"]),
]


@pytest.mark.parametrize(("options", "facts"), ENGINE_OPTIONS, ids=range(len(ENGINE_OPTIONS)))
def test_engine_options_that_run_code_or_change_the_model_are_refused(options, facts):
    assert_facts(refusal(checked_engine_options, options), facts)


# Data files: name, bytes, and either facts of the refusal or (rows read, reasons of rejects).

GOOD = b'{"prompt": "a"}\n'
DEEP = b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"


def rejecting_to(reasons: list[str]) -> Any:
    """Return what a source of rows needs of a stage's context: it notes the reasons of rejects."""
    return SimpleNamespace(reject=lambda reason, **_: reasons.append(reason))


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


TWICE = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
INVALID = pa.table({"prompt": pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")])})  # fmt: skip
DATA = [
    ("a.jsonl", b"", (0, [])),
    ("a.jsonl", b"\n\n \n", (0, [])),
    ("a.jsonl", GOOD + b"not JSON\n" + GOOD, (2, ["not JSON"])),
    ("a.jsonl", GOOD + b'{"prompt": "cut\n', (1, ["not JSON"])),
    ("a.jsonl", GOOD + b"[1]\n3\nnull\n", (1, ["not a JSON object"] * 3)),
    ("a.jsonl", GOOD + b'{"prompt": "a", "prompt": "b"}\n', (1, ["a key twice"])),
    ("a.jsonl", GOOD + b'{"prompt": {"a": 1, "a": 2}}\n', (1, ["a key twice"])),
    ("a.jsonl", GOOD + b'{"prompt": "\xff"}\n', (1, ["bad UTF-8"])),
    ("a.jsonl", GOOD + DEEP, (1, ["not JSON"])),
    ("a.jsonl", GOOD + b'{"prompt": ' + b"9" * 5000 + b"}\n", (1, ["not JSON"])),
    ("a.jsonl", b"\xef\xbb\xbf" + GOOD, (1, [])),
    ("a.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, (2, [])),
    ("a.jsonl", b'{"prompt": "a\\u0000b"}\n', (1, [])),
    ("a.jsonl", b'{"prompt": "a\\ud800"}\n', (1, [])),
    ("a.jsonl", b'{"prompt": "\xe2\x80\xa8"}\n', (1, [])),
    ("a.jsonl", b"[" + GOOD + b"]", ["a.jsonl", "JSON list", ".json"]),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["a.jsonl", "git lfs pull"]),
    ("a.jsonl", b"<!DOCTYPE html><html>", ["a.jsonl", "web page"]),
    ("a.jsonl", b"<html><body>", ["a.jsonl", "web page"]),
    ("a.jsonl", gzip.compress(GOOD), ["a.jsonl", ".gz"]),
    ("a.jsonl", parquet(pa.table({"prompt": ["a"]})), ["a.jsonl", "Parquet"]),
    ("a.jsonl", b"PK\x03\x04rest", ["a.jsonl", "zip"]),
    ("a.jsonl", b"\x28\xb5\x2f\xfdrest", ["a.jsonl", "zstd"]),
    ("a.jsonl", b"ARROW1\x00\x00", ["a.jsonl", "Arrow"]),
    ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), ["a.jsonl", "UTF-16"]),
    ("a.jsonl.gz", gzip.compress(GOOD * 2)[:-9], ["a.jsonl.gz", "cut short"]),
    ("a.jsonl.gz", GOOD, ["a.jsonl.gz", "damaged"]),
    ("a.jsonl.gz", gzip.compress(GOOD) + b"rest", ["a.jsonl.gz", "damaged"]),
    ("a.json", b"[" + GOOD + b",", ["a.json"]),
    ("a.json", b"[" + GOOD + b"]rest", ["a.json"]),
    ("a.json", b"[" + GOOD + GOOD + b"]", ["a.json"]),
    ("a.json", b"[" * 100_000, ["a.json"]),
    ("a.json", b'[{"prompt": "a"}, 3, null]', (1, ["not a JSON object"] * 2)),
    ("a.json", b'[{"prompt": "a"}, {"prompt": "b", "prompt": "c"}]', (1, ["a key twice"])),
    ("a.json", b"[]", (0, [])),
    ("a.csv", b"", (0, [])),
    ("a.csv", b"prompt\n", (0, [])),
    ("a.csv", b"prompt,b\n1,2\n1,2,3\n", (1, ["more cells than columns"])),
    ("a.csv", b"prompt,prompt\n1,2\n", ["a.csv", "'prompt'"]),
    ("a.csv", b'prompt,b\n"1,2\n', ["a.csv"]),
    ("a.csv", b'prompt,b\n1,2\n3,"4\n5,6\n7,"8"\n', ["a.csv"]),
    ("a.csv", b'prompt,b\n1,"2\n3,4\n5,6\n7,8"\n9,10\n', (1, ["a cell with whole rows in it: a quote is missing"])),
    ("a.csv", b'a,b,c\n1,2,"x\n3,4,5\n6,7,8"\n', (0, ["a cell with whole rows in it: a quote is missing"])),
    ("a.csv", b'a,b,c\n"x\n3,4,5\n6,7,8\n7",b,c\n', (0, ["a cell with whole rows in it: a quote is missing"])),
    ("a.csv", b'prompt,b\n1,"Roses are red,\nviolets are blue,\nfine"\n', (1, [])),
    ("a.csv", b'prompt,b\n1,"def f(a, b):\n    return a, b\n"\n', (1, [])),
    ("a.csv", b"prompt,b\n1,\xff\n2,3\n", (1, ["bad UTF-8"])),
    ("a.csv", b"prompt,b\n1,a\x00b\n", (1, [])),
    ("a.tsv", b"prompt\tb\n1\t2\t3\n", (0, ["more cells than columns"])),
    ("a.parquet", b"", ["a.parquet"]),
    ("a.parquet", b"PAR1", ["a.parquet"]),
    ("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", ["a.parquet"]),
    ("a.parquet", parquet(pa.table({"prompt": ["a"] * 9}))[:-20], ["a.parquet"]),
    ("a.parquet", parquet(TWICE), ["a.parquet", "'prompt'", "rename"]),
    ("a.parquet", parquet(INVALID), (1, ["bad UTF-8"])),
    ("a.parquet", b"version https://git-lfs", ["a.parquet", "git lfs pull"]),
    ("a.parquet", GOOD, ["a.parquet"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), DATA, ids=range(len(DATA)))
def test_a_data_file_is_refused_or_its_rows_rejected(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    reasons: list[str] = []

    def read():
        columns = column_names(tmp_path / name)
        source = DataSource(path=DataPath(str(tmp_path / name)))
        return list(source.rows(rejecting_to(reasons), columns[:1] if columns else []))

    if isinstance(expected, list):
        assert_facts(refusal(read), expected)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = read()
        assert (len(rows), reasons) == expected


# Values of a row: a function of the texts, the row, and the reason for the rejects table.

VALUES = [
    (text_of, {}, "no prompt"),
    (text_of, {"prompt": None}, "no prompt"),
    (text_of, {"prompt": 3}, "not text"),
    (text_of, {"prompt": ["a"]}, "not text"),
    (text_of, {"prompt": ""}, "empty prompt"),
    (text_of, {"prompt": " \n\t"}, "empty prompt"),
    (text_of, {"prompt": "\u200b\u200d\ufeff"}, "empty prompt"),
    (text_of, {"prompt": "\x00\x1b"}, "empty prompt"),
    (text_of, {"prompt": "a\ud800"}, "Unicode"),
    (text_of, {"prompt": "\udc80a"}, "Unicode"),
    (prompt_of, {"prompt": "[{'role': 'user'"}, "cannot be parsed"),
    (prompt_of, {"prompt": []}, "empty prompt"),
    (prompt_of, {"prompt": [1]}, "not text"),
    (prompt_of, {"prompt": [{}]}, "no role"),
    (prompt_of, {"prompt": [{"role": "user"}]}, "no content"),
    (prompt_of, {"prompt": [{"role": "user", "content": 3}]}, "content is not text"),
    (prompt_of, {"prompt": [{"role": "user", "content": ""}]}, "empty content"),
    (prompt_of, {"prompt": [{"role": 3, "content": "a"}]}, "role is not text"),
    (prompt_of, {"prompt": [{"role": "", "content": "a"}]}, "no role"),
    (prompt_of, {"prompt": [{"role": "user\n\nassistant", "content": "a"}]}, "role is no word"),
    (prompt_of, {"prompt": [{"role": "user<|im_end|>", "content": "a"}]}, "role is no word"),
    (prompt_of, {"prompt": [{"role": "user: do\x0bthis", "content": "a"}]}, "role is no word"),
    (prompt_of, {"prompt": [{"role": "{{ 7 * 7 }}", "content": "a"}]}, "role is no word"),
    (prompt_of, {"prompt": [{"role": "x" * 200, "content": "a"}]}, "role is no word"),
    (prompt_of, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "content of type image"),
    (prompt_of, {"prompt": [{"role": "user", "content": [3]}]}, "content of type"),
    (prompt_of, {"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "content of type"),
    (messages_of, {"prompt": "a"}, "not text"),
    (messages_of, {}, "no prompt"),
    (reply_of, {"prompt": [{"role": "user", "content": "a"}]}, "assistant turn"),
    (reply_of, {"prompt": [{"role": "assistant", "tool_calls": "{"}]}, "tool_calls is not JSON"),
    (reply_of, {"prompt": [{"role": "assistant", "tool_calls": "[" * 100_000}]}, "tool_calls is not JSON"),
    (reply_of, {"prompt": [{"role": "assistant", "tool_calls": [3]}]}, "not a list of calls"),
    (reply_of, {"prompt": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "not JSON"),
    (tools_of, {"tools": "{"}, "tools is not JSON"),
    (tools_of, {"tools": "[" * 100_000}, "tools is not JSON"),
    (tools_of, {"tools": "{}x"}, "tools is not JSON"),
    (tools_of, {"tools": '{"a": 1}'}, "not a list"),
    (tools_of, {"tools": [1]}, "not a list"),
    (number_of, {"prompt": "1_0"}, "not a number"),
    (number_of, {"prompt": "0x10"}, "not a number"),
    (number_of, {"prompt": "\u0661"}, "not a number"),
    (number_of, {"prompt": True}, "not a number"),
    (number_of, {"prompt": None}, "not a number"),
    (number_of, {"prompt": 10**400}, "not a number"),
    (number_of, {"prompt": [1]}, "not a number"),
]


@pytest.mark.parametrize(("read", "row", "reason"), VALUES, ids=range(len(VALUES)))
def test_a_value_of_a_row_is_rejected_with_a_reason(read, row, reason):
    message = refusal(read, row, "tools" if read is tools_of else "prompt")
    assert_facts(message, [reason])
    assert len(message) < 200


# Model folders: a change to a folder of three layers, and facts of the plan's refusal.


def of_weights(change):
    """Return a change to a folder: its weights as `change` leaves them."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def of_json(name: str, **changes):
    """Return a change to a folder: keys of a JSON file, those that are None removed."""

    def apply(folder: Path) -> None:
        file = folder / name
        content = (json.loads(file.read_text()) if file.exists() else {}) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return apply


def of_file(name: str, content: bytes | None):
    """Return a change to a folder: a file with other content, or none."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return apply


def drop(*ends: str):
    def change(weights: dict) -> None:
        for name in [name for name in weights if name.endswith(ends)]:
            del weights[name]

    return of_weights(change)


def put_in(name: str, value: float):
    def change(weights: dict) -> None:
        weights[name].view(-1)[0] = value

    return of_weights(change)


def reshape(name: str, *shape: int):
    return of_weights(lambda weights: weights.update({name: torch.zeros(shape)}))


def as_pipe(name: str):
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


def stale(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")


def elsewhere(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LAYER = "model.layers.1."
TWO = "of two models"
MODELS = [
    (drop(f"{LAYER}mlp.down_proj.weight"), ["mlp.down_proj.weight", "layer 1", TWO]),
    (drop(f"{LAYER}self_attn.k_proj.weight"), ["self_attn.k_proj.weight", "layer 1"]),
    (drop(f"{LAYER}input_layernorm.weight"), ["input_layernorm.weight", "layer 1"]),
    (drop("layers.2.mlp.up_proj.weight", "layers.2.mlp.gate_proj.weight"), ["layer 2", "2 such weights"]),
    (of_weights(lambda w: [w.pop(n) for n in list(w) if n.startswith(LAYER)]), ["lack layer 1", TWO]),
    (of_json("config.json", num_hidden_layers=4), ["lack layer 3", TWO]),
    (of_json("config.json", num_hidden_layers=2), ["have layer 2", TWO]),
    (of_json("config.json", vocab_size=10**6), ["vocab_size 1000000", TWO]),
    (of_json("config.json", vocab_size=300), ["rows", "vocab_size 300", TWO]),
    (of_json("config.json", hidden_size=128), ["columns", "128", TWO]),
    (of_json("config.json", tie_word_embeddings=False), ["lack the head", TWO]),
    (drop("embed_tokens.weight"), ["lack the embedding"]),
    (reshape(f"{LAYER}mlp.up_proj.weight", 4, 64), ["mlp.up_proj.weight", "[4, 64]", "layer 1"]),
    (reshape(f"{LAYER}input_layernorm.weight", 63), ["input_layernorm.weight", "[63]"]),
    (put_in("model.norm.weight", float("nan")), ["1 weights of model.norm.weight", "not finite"]),
    (put_in("model.norm.weight", float("inf")), ["model.norm.weight", "not finite"]),
    (put_in(f"{LAYER}mlp.up_proj.weight", float("-inf")), ["mlp.up_proj.weight", "not finite"]),
    (of_weights(lambda w: w.update({n: t.bfloat16() * float("nan") for n, t in w.items()})), ["not finite"]),
    (of_weights(lambda w: w.update({n: t.half() * float("nan") for n, t in w.items()})), ["not finite"]),
    (of_weights(lambda w: w.update({n: t.to(torch.int8) for n, t in w.items()})), ["I8", "quantization_config"]),
    (of_weights(lambda w: w.clear()), ["weights"]),
    (of_file("model.safetensors", POINTER), ["git lfs pull"]),
    (of_file("tokenizer.json", POINTER), ["git lfs pull"]),
    (of_file("config.json", POINTER), ["git lfs pull"]),
    (of_file("tokenizer.model", POINTER), ["git lfs pull"]),
    (of_file("model.safetensors", b""), ["truncated"]),
    (of_file("model.safetensors", b"\xff" * 100), ["truncated"]),
    (of_file("model.safetensors", (10).to_bytes(8, "little") + b"not header"), ["not a safetensors file"]),
    (of_file("model.safetensors", b"\x80\x02cos\nsystem\n(S'ls'\ntR."), ["not a safetensors file"]),
    (of_file("model.safetensors", None), ["weights as *.safetensors"]),
    (of_file("config.json", None), ["config.json"]),
    (of_file("config.json", b"{"), ["config.json", "not a JSON object"]),
    (of_file("config.json", b"[1]"), ["config.json", "not a JSON object"]),
    (of_file("config.json", b"[" * 100_000), ["config.json", "not a JSON object"]),
    (of_file("config.json", b"\xff\xfe"), ["config.json", "not a JSON object"]),
    (of_file("tokenizer_config.json", b"3"), ["tokenizer_config.json"]),
    (of_file("generation_config.json", b"[]"), ["generation_config.json"]),
    (of_json("config.json", model_type=None), ["model_type"]),
    (of_json("config.json", model_type="evil"), ["model_type evil"]),
    (of_json("config.json", model_type="evil", auto_map={"AutoConfig": "me/evil--x.Y"}), ["me/evil", "not run"]),
    (of_json("config.json", architectures=["EvilForCausalLM"]), ["EvilForCausalLM"]),
    (of_json("config.json", vocab_size="400"), ["vocab_size"]),
    (of_json("config.json", eos_token_id=10**9), ["eos_token_id"]),
    (of_json("config.json", vision_config={}), ["text models"]),
    (
        of_json(
            "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["me/x--t.T", None]}
        ),
        ["me/x--t.T", "not run", "EvilTokenizer"],
    ),
    (of_json("tokenizer_config.json", tokenizer_class=None, auto_map={"AutoTokenizer": ["t.T", None]}), ["not run"]),
    (of_json("tokenizer_config.json", tokenizer_class="os.system", auto_map=["t.T", None]), ["not run"]),
    (of_file("chat_template.jinja", b"{% for %}"), ["chat_template.jinja", "line 1"]),
    (of_file("chat_template.jinja", b"{{ x"), ["chat_template.jinja"]),
    (of_file("chat_template.jinja", b""), ["chat_template.jinja", "empty"]),
    (of_file("chat_template.jinja", b"\xff"), ["chat_template.jinja", "UTF-8"]),
    (as_pipe("model.safetensors"), ["weights"]),
    (as_pipe("config.json"), ["config.json"]),
    (stale, ["two sets of weights"]),
    (elsewhere, ["../other/model.safetensors"]),
    (of_file("model.safetensors.index.json", b"{"), ["weight_map"]),
    (of_file("model.safetensors.index.json", b'{"weight_map": 3}'), ["weight_map"]),
    (of_file("model.safetensors.index.json", b'{"weight_map": {"a": null}}'), ["names None"]),
    (of_file("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'), ["/etc/passwd"]),
]


@pytest.fixture(scope="module")
def three_layers(tiny, tmp_path_factory) -> Path:
    """The tiny model with a third layer, so that two say what the third lacks."""
    folder = tmp_path_factory.mktemp("three") / "model"
    shutil.copytree(tiny.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in weights.items() if "layers.1" in name
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    of_json("config.json", num_hidden_layers=3)(folder)
    return folder


def plan_model(folder: Path) -> None:
    """Check a folder as a plan does; raise WinnowError with its problems."""
    if problems := _check_model(stages.find("model").validate({"path": str(folder)}, "model"), {}):
        raise WinnowError(*problems)


def test_the_folder_that_the_cases_change_is_planned(three_layers):
    plan_model(three_layers)


@pytest.mark.parametrize(("change", "facts"), MODELS, ids=range(len(MODELS)))
def test_a_model_folder_is_refused_when_the_plan_is_made(three_layers, tmp_path, change, facts):
    folder = tmp_path / "model"
    shutil.copytree(three_layers, folder)
    change(folder)
    assert_facts(refusal(plan_model, folder), facts)


PATHS = [
    (AdapterPath, lambda folder: folder, ["adapter_config.json"]),
    (AdapterPath, lambda folder: "", ["empty"]),
    (ModelPath, lambda folder: folder, ["config.json"]),
    (ModelPath, lambda folder: make_file(b"x")(folder), ["config.json"]),
    (TemplatePath, lambda folder: folder, ["is a folder"]),
    (TemplatePath, lambda folder: make_file(b"{% if %}", "x.jinja")(folder), ["x.jinja", "line 1"]),
    (TemplatePath, lambda folder: make_file(b"\xff", "x.jinja")(folder), ["UTF-8"]),
    (TemplatePath, lambda folder: make_pipe(folder), ["pipe"]),
    (DataPath, lambda folder: make_pipe(folder), ["pipe"]),
    (DataPath, lambda folder: make_loop(folder), ["a.yaml"]),
    (DataPath, lambda folder: make_link("/dev/zero")(folder), ["device"]),
    (DataPath, lambda folder: folder / "x" / ".." / "none", ["none"]),
]


@pytest.mark.parametrize(("kind", "make", "facts"), PATHS, ids=range(len(PATHS)))
def test_a_path_is_refused(tmp_path, kind, make, facts):
    assert_facts(refusal(kind, str(make(tmp_path))), facts)


# SQL

SQL = [
    ("", ["one SELECT"]),
    ("SELECT 1; SELECT 2", ["one SELECT"]),
    ("SELECT '\ud800'", ["Unicode"]),
    ("PIVOT", ["sql"]),
    ("COPY (PIVOT runs ON step) TO '/tmp/winnow-hostile.csv'", ["one SELECT"]),
    ("CREATE TABLE x AS PIVOT runs ON step", ["one SELECT"]),
    ("EXPLAIN COPY runs TO '/tmp/winnow-hostile.csv'", ["one SELECT"]),
    ("EXPLAIN ANALYZE COPY runs TO '/tmp/winnow-hostile.csv'", ["one SELECT"]),
    ("EXPLAIN (FORMAT json) SELECT 1", ["one SELECT"]),
    ("EXPLAIN EXPLAIN SELECT 1", ["sql"]),
    ("EXPLAIN SELECT 1; DROP TABLE runs", ["one SELECT"]),
    ("SELECT * FROM read_text('{store}/runs/one.json')", ["files of tables"]),
    ("SELECT * FROM read_blob('{store}/reward/2222/manifest.json')", ["files of tables"]),
    ("SELECT * FROM read_text('{store}/reward/2222/model/config.json')", ["files of tables"]),
    ("SELECT * FROM read_json('{store}/runs/one.json')", ["files of tables"]),
    ("SELECT * FROM read_csv('{store}/**')", ["sql"]),
    ("SELECT * FROM '{store}/runs/one.json'", ["files of tables"]),
    ("SELECT " + "(" * 5000 + "1" + ")" * 5000, ["sql"]),
    (" UNION ALL ".join(["SELECT 1"] * 20_000), ["sql"]),
    ("SELECT * FROM runs WHERE step = '[/x]' AND", ["sql"]),
    ('SELECT "[/x]" FROM runs', ["[/x]"]),
]
ANSWERED = [
    ("PIVOT runs ON step USING count(*)", 1),
    ("SELECT * FROM (PIVOT runs ON step IN ('reward') USING count(*))", 1),
    ("EXPLAIN SELECT * FROM rewards", 1),
    ("explain\nselect 1", 1),
    ("SELECT * FROM rewards", 1),
    ("SUMMARIZE rewards", None),
    ("DESCRIBE rewards", None),
    ("SELECT '[/x]' AS \"[/y]\"", 1),
]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("hostile") / "store")
    put(store, "reward", "2222", [rewards(0.5)])
    link(store, "one", reward=("reward", "2222"))
    (store.root / "reward" / "2222" / "model").mkdir()
    (store.root / "reward" / "2222" / "model" / "config.json").write_text("{}")
    return open_catalog(store)


@pytest.mark.parametrize(("statement", "facts"), SQL, ids=range(len(SQL)))
def test_a_statement_is_refused(catalog, statement, facts):
    message = refusal(lambda: query(catalog, statement.replace("{store}", str(catalog.root))))
    assert all(fact in message for fact in facts), message[:500]
    assert not Path("/tmp/winnow-hostile.csv").exists()


@pytest.mark.parametrize(("statement", "rows"), ANSWERED, ids=range(len(ANSWERED)))
def test_a_statement_is_answered(catalog, statement, rows):
    result = query(catalog, statement)
    assert rows in (None, result.num_rows)
    VisibleConsole(file=io.StringIO()).print(as_table(result))


# The terminal

TEXTS = ["[/x]", "[/]", "[INST]", "[/INST]", "[red]a[/blue]", "[link=http://a.b]x[/link]", "[@click=f]x", "a]b[",
         "\\[/x]", "\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x08\x08", "a\rb"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_that_is_not_ours_is_neither_markup_nor_control(text):
    """As a column, a cell and a title, and in a message that forgot to escape it."""
    file = io.StringIO()
    console = VisibleConsole(file=file, width=200, force_terminal=False, soft_wrap=True)
    console.print(as_table(pa.table({text: [text]}), text))
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
    assert file.getvalue().count(shown) == 3
    console.print(text)
    assert not set(file.getvalue()) & set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))


def test_a_step_is_named_as_it_is_while_it_runs():
    file = io.StringIO()
    reporter = ProgressReporter(VisibleConsole(file=file, width=200))
    step: Any = SimpleNamespace(name="[/x]", key="k")
    reporter.step_cached(step)
    reporter.step_started(step, 0, 1)
    reporter.progress(step, 1, 2, "[/unit]")
    reporter.step_waiting(step, "[/why]")
    reporter.close()
    assert file.getvalue().count("[/x]") == 3
    assert "[/why]" in file.getvalue()


# Rows and files that are too long


def test_a_text_of_too_many_characters_is_rejected_without_being_tokenised(tiny, ctx, tmp_path, monkeypatch):
    """50 MB in one cell took minutes and gigabytes."""
    longest = 0
    encode = Tokenizer.encode

    def noted(self, text):
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    long = "a" * 10**6
    rows = [{"prompt": long, "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": long, "rejected": "c"},
            {"prompt": "Please", "chosen": "b", "rejected": "c"}]  # fmt: skip
    path = DataPath(str(write_jsonl(tmp_path / "long.jsonl", rows)))
    _, _, pairs = preferences(tiny, ctx, path=path, max_tokens=64)
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == ["prompt too long", "response too long"]
    assert (pairs.num_rows, longest < 100_000) == (1, True)


@pytest.mark.parametrize(("name", "reasons", "rows"), [
    ("a.jsonl", ["a line of more than 0 MiB"], 2), ("a.jsonl.gz", ["a line of more than 0 MiB"], 2),
    ("a.csv", None, 0), ("a.json", None, 0),
])  # fmt: skip
def test_a_line_without_end_is_read_over_or_ends_the_file(tmp_path, monkeypatch, name, reasons, rows):
    """A gzip file of 300 kB may hold a line of 300 MB."""
    monkeypatch.setattr("stages.data.file_rows.LONGEST_ROW", 1000)
    monkeypatch.setattr("stages.data.file_rows.PIECE", 100)
    long = json.dumps({"prompt": "x" * 5000})
    text = {
        "a.csv": f"prompt\na\n{'x' * 5000}\nb\n",
        "a.json": f'[{{"prompt": "a"}}, {long}]',
    }.get(name, f'{{"prompt": "a"}}\n{long}\n{{"prompt": "b"}}\n')
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    source, rejected = DataSource(path=DataPath(str(tmp_path / name))), list[str]()
    context = rejecting_to(rejected)
    if reasons is None:
        assert_facts(refusal(lambda: list(source.rows(context, ["prompt"]))), [name, "1,000 characters"])
    else:
        assert (len(list(source.rows(context, ["prompt"]))), rejected) == (rows, reasons)


def test_parquet_of_large_rows_is_read_few_at_a_time(tmp_path):
    pq.write_table(pa.table({"prompt": ["x" * 10_000_000] * 2 + ["y"] * 2}), tmp_path / "a.parquet", row_group_size=2,
                   compression="none", use_dictionary=False)  # fmt: skip
    assert _batch_rows(pq.ParquetFile(tmp_path / "a.parquet").metadata) == 6
    assert len(list(file_rows(tmp_path / "a.parquet", ["prompt"], lambda *a, **k: None))) == 4


def test_a_bad_line_is_rejected_alike_in_a_file_and_in_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"prompt": "a"}\nnot JSON\n{"prompt": "b"}\n')
    results = []
    for path in (tmp_path / "data", tmp_path / "data" / "a.jsonl"):
        rejected = list[str]()
        rows = [row for _, row in DataSource(path=DataPath(str(path))).rows(rejecting_to(rejected), ["prompt"])]
        results.append((rows, rejected))
    assert results[0] == results[1] == ([{"prompt": "a"}, {"prompt": "b"}], ["not JSON"])


def test_a_folder_with_brackets_in_its_name_is_read(tmp_path):
    """`datasets` takes its name for a pattern, in which `[n=8]` is one character."""
    folder = tmp_path / "run[n=8]" / "data"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"prompt": "a"}\n')
    source = DataSource(path=DataPath(str(folder)))
    assert source.check(["prompt"]) == []
    assert [row for _, row in source.rows(rejecting_to([]), ["prompt"])] == [{"prompt": "a"}]


# Code of others


@pytest.fixture
def touching(tmp_path):
    """A plugin that writes a file where it is run."""
    (tmp_path / "mine.py").write_text(
        f"from pathlib import Path\n\nPath({str(tmp_path / 'ran')!r}).touch()\n\n\n"
        "def graded(prompt, response):\n    return 1.0\n"
    )
    yield tmp_path / "ran"
    unload_plugins()


@pytest.mark.parametrize(
    "text", ["plugins: [./mine.py]\n", "evaluate: {with: {gold: {name: python, file: ./mine.py, function: graded}}}\n"]
)
def test_a_config_runs_no_code_that_the_command_does_not_name(winnow, data_dir, tmp_path, touching, text):
    """As a plugin, and as the file of a function; named, it runs."""
    (tmp_path / "theirs.yaml").write_text(text)
    words = ("plan", "rso", "--config", data_dir / "demo.yaml", "--config", "theirs.yaml")
    code, said = winnow(*words)
    assert (code, touching.exists()) == (2, False)
    assert_facts(said, [str(tmp_path / "mine.py"), "--plugin", "Python code"])
    code, said = winnow(*words, "--plugin", "other.py")
    assert (code, "no such file" in said, touching.exists()) == (2, True, False)
    code, said = winnow(*words, "--plugin", "mine.py")
    assert (code, touching.exists()) == (0, True), said


@pytest.mark.parametrize(
    "words", [["gc", "--yes"], ["run", "rso", "--store", "/other"], ["run", "rso"], ["sql", "x"], []]
)
def test_repair_calls_no_command_of_a_store_but_one_that_makes_its_results(tmp_path, words):
    assert _problem({"words": words, "folder": str(tmp_path)}, Store(str(tmp_path / "theirs")))
    assert not _problem({"words": ["run", "rso"], "folder": str(tmp_path)}, Store(str(tmp_path / "store")))


def test_repair_runs_no_plugin_that_only_the_store_names():
    words = ["run", "rso", "--plugin", "evil.py", "--plugin=worse.py", "--set", "a.b=1"]
    assert _without_plugins(words) == ["run", "rso", "--set", "a.b=1"]


class Evil:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["WINNOW_EVIL"]),)


def test_a_checkpoint_is_read_without_pickle(tmp_path, monkeypatch):
    """torch's own checkpoints have a pickle, `.metadata`, which is not looked at."""
    monkeypatch.setenv("WINNOW_EVIL", str(tmp_path / "ran"))
    network = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(Mirror(tmp_path, tmp_path), Distributed())
    checkpoints.save_best(1, network)
    weight = network.weight.detach().clone()
    for name in (".metadata", "weights.pt", "pytorch_model.bin"):
        (tmp_path / "checkpoint" / "best-00000001" / name).write_bytes(pickle.dumps(Evil()))
    network.weight.data.zero_()
    checkpoints.load_best(1, network)
    assert torch.equal(network.weight, weight)
    assert not (tmp_path / "ran").exists()


TEMPLATES = ["{{ 1 // 0 }}", "{{ [][0].x }}", "{{ none + 1 }}", "{{ 'a' * (0).bit_length(1) }}",
             "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('no') }}"]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_chat_template_that_fails_is_one_line(tiny, tmp_path, template):
    """It is a program: what it raises may be anything."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    (folder / "chat_template.jinja").write_text(template)
    assert_facts(refusal(Tokenizer(Model(folder, "")).prompt_ids, "Hello!"), ["chat template"])


def test_a_tokenizer_that_names_code_is_loaded_without_it(tiny, tmp_path):
    """transformers would ask whether to run it, and `y` would."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    of_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})(folder)
    of_json("config.json", auto_map={"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"})(folder)
    assert Tokenizer(Model(folder, "")).encode("Hello")
    read_network(folder, torch.float32, device_map="meta")
    assert not (tmp_path / "ran").exists()


# What a user's own files and terminal are safe from


def test_the_demo_writes_over_no_file_of_a_users_own(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("mine")
    (tmp_path / "report.html").write_text("mine")
    contents = {"prompts.jsonl": b"demo", "new.jsonl": b"demo"}
    assert_facts(
        refusal(_write_new, tmp_path, contents, [tmp_path / "report.html"]),
        ["prompts.jsonl", "report.html", "--folder"],
    )
    assert {file.name for file in tmp_path.iterdir()} == {"prompts.jsonl", "report.html"}
    _write_new(tmp_path / "demo", contents)
    _write_new(tmp_path / "demo", contents)  # again, as it was


def test_weights_can_be_read_by_whoever_can_read_their_config(tiny):
    modes = {file.stat().st_mode for file in tiny.folder.iterdir()}
    assert [*modes] == [(tiny.folder / "config.json").stat().st_mode]


def test_a_query_ends_with_its_time_and_leaves_the_catalog_usable(catalog):
    endless = "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM t) SELECT count(*) FROM t"
    assert_facts(refusal(interruptible, catalog, lambda: query(catalog, endless), 0.2), ["--timeout"])
    assert query(catalog, "SELECT 1 AS x").to_pylist() == [{"x": 1}]


def test_a_query_has_part_of_the_machines_memory(catalog):
    limits = []
    before = resource.getrlimit(resource.RLIMIT_DATA)
    interruptible(catalog, lambda: limits.append(resource.getrlimit(resource.RLIMIT_DATA)[0]), 10)
    assert 0 < limits[0] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    statement = "SELECT current_setting('memory_limit') AS m"
    assert query(catalog, statement).to_pylist() != duckdb.connect().sql(statement).to_arrow_table().to_pylist()


def test_there_are_three_hundred_cases():
    tables: list[Any] = [YAML, RECIPE_FILES, RECIPES, OPTIONS, RUN_NAMES, ENGINE_OPTIONS, DATA, VALUES, MODELS, PATHS]
    tables += [SQL, ANSWERED, TEXTS]
    assert sum(map(len, tables)) >= 300
