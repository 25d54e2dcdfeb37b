"""Checks of a config's data before anything runs: rejected rows, near duplicates across splits, lengths, scripts.

The data stages run as they would in a run, with the policy's tokenizer and without its weights, and nothing is stored.
"""

import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from jobs.winnow import alone
from pipeline.config.plan import Plan, Step
from pipeline.stage import signature_of
from schemas import Model, WinnowError, table_name
from stages.data.rows import Row
from stages.data.texts import conversation_of, words_of_user
from stages.network.models import replace_chat_templates, write_template_options

DATA_STAGES = ("prompts", "preferences", "own_candidates")
HELD_OUT = {"heldout": "held-out", "validation": "validation"}  # splits that are not trained on, as they are called
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
SCRIPTS = 5  # most frequent ones that are listed
EXAMPLE = 80  # characters
# Scripts without spaces between words are read character by character; Thai, Lao and Khmer are not.
WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[{WITHOUT_SPACES}]|[^\\W{WITHOUT_SPACES}]+")
MOST_COMMON = 200  # prompts of one n-gram that are compared, else a template of all prompts would pair all with all
COLUMNS = pa.schema(
    [
        pa.field("step", pa.string()),
        pa.field("check", pa.string()),
        pa.field("item", pa.string()),
        pa.field("value", pa.int64()),
        pa.field("share", pa.float64()),
        pa.field("example", pa.string()),
    ]
)


class Finding(NamedTuple):
    """Row of the result: a count, or a number of tokens; the share of what was counted; the first case."""

    step: str
    check: str
    item: str
    value: int
    share: float | None = None
    example: str | None = None


def inspect_data(plans: Sequence[Plan], words: int, overlap: float) -> pa.Table:
    """Return what the data of plans look like, a row per finding; a step that plans share is read once.

    words, overlap: two prompts are near duplicates if the share of word n-grams of this length that both have, of those
    that either has (Jaccard), is at least `overlap`; of a chat, what its users say is compared. Raise WinnowError if a
    plan reads no data.
    """
    steps: dict[str, Step] = {}  # by the name in the result, which of a step that differs between plans has the plan's
    for plan in plans:
        of_plan = [step for step in plan.steps if step.stage in DATA_STAGES]
        if not of_plan:
            raise WinnowError(f"{plan.name}: no step reads prompts or preferences ({', '.join(DATA_STAGES)})")
        for step in of_plan:
            is_other = step.name in steps and steps[step.name].key != step.key
            steps[f"{step.name} of {plan.name}" if is_other else step.name] = step
    findings: list[Finding] = []
    prompts: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, step) in enumerate(steps.items()):
            tables, rejects = _tables_and_rejects(step, Path(folder) / str(number))
            prompts[name] = tables["prompts"].select(["prompt_id", "text", "chat", "split"]).to_pylist()
            findings += _row_counts(name, prompts[name], tables, rejects)
            findings += _lengths(name, tables)
            findings += _scripts(name, [row["text"] for row in prompts[name]])
    texts = {(name, split): [_words_of_user(row) for row in rows if row["split"] == split]
             for name, rows in prompts.items() for split in ("train", *HELD_OUT)}  # fmt: skip
    for held in prompts:
        for trained in prompts:
            for split in HELD_OUT:
                check = f"{HELD_OUT[split]} prompts like train of {trained}"
                findings += _duplicates(held, check, texts[held, split], texts[trained, "train"], words, overlap)
    return pa.Table.from_pylist([finding._asdict() for finding in findings], COLUMNS)


def _tables_and_rejects(step: Step, folder: Path) -> tuple[dict[str, pa.Table], pa.Table]:
    """Return the tables of a data step by name, and what it rejects."""
    signature = signature_of(step.entry)
    ctx = alone(folder)
    inputs = {name: _tokenizer_of(source, folder / name) for name, source in step.inputs.items()}
    context = {signature.context_parameter: ctx} if signature.context_parameter else {}
    with step.entry.failures():
        result = step.entry.fn(**inputs, **context, **step.options)
    tables = result if isinstance(result, tuple) else (result,)
    return {table_name(schema): table for schema, table in zip(signature.outputs, tables, strict=True)}, ctx.rejects


def _tokenizer_of(step: Step, folder: Path) -> Model:
    """Return the tokenizer and config of the model that a step makes, which a trained one has from where it starts."""
    while step.stage not in ("model", "untrained"):
        source = step.inputs.get("init") or step.inputs.get("policy")
        if source is None:
            raise WinnowError(f"{step.name}: the tokenizer of stage {step.stage} is only known once it has run")
        step = source
    if step.stage == "untrained":
        with step.entry.failures():
            model: Model = step.entry.fn(alone(folder), **step.options)
        return model
    options = step.options
    folder.mkdir(parents=True)
    for origin in (options["path"], options["adapter"]):
        files = origin.path.iterdir() if origin is not None else ()
        for file in files:
            is_read = file.suffix in (".json", ".jinja", ".model", ".txt") and "adapter" not in file.name
            if file.is_file() and is_read and (origin is options["path"] or file.name != "config.json"):
                shutil.copyfile(file, folder / file.name)
    if options["chat_template"] is not None:
        replace_chat_templates(folder, options["chat_template"].path)
    write_template_options(folder, options["date"], options["chat_template_kwargs"])
    return Model(folder, options["path"].digest)


def _row_counts(
    name: str, prompts: list[dict[str, Any]], tables: dict[str, pa.Table], rejects: pa.Table
) -> Iterator[Finding]:
    """Yield the number of rows of each table and split, and of those rejected by reason, the first place with it."""
    total = len(prompts)
    for split, count in sorted(Counter(row["split"] for row in prompts).items()):
        yield Finding(name, "rows", f"{split} prompts", count, count / total)
    for table in ("pairs", "candidates"):
        if table in tables:
            yield Finding(name, "rows", table, tables[table].num_rows)
    reasons = Counter(rejects.column("reason").to_pylist())
    columns = (reversed(rejects.column(column).to_pylist()) for column in ("reason", "place"))
    place_by_reason = dict(zip(*columns, strict=True))
    for reason, count in reasons.most_common():
        yield Finding(name, "rejected", reason, count, None, place_by_reason[reason])


def _lengths(name: str, tables: dict[str, pa.Table]) -> Iterator[Finding]:
    """Yield quantiles of lengths in tokens; of pairs, those of both sides and how often the chosen one is longer."""
    lengths = {"prompt": [len(ids) for ids in tables["prompts"].column("token_ids").to_pylist()]}
    demonstrations = tables["prompts"].column("demonstration_ids").drop_null().to_pylist()
    lengths["demonstration"] = [len(ids) for ids in demonstrations]
    longer = None
    if "pairs" in tables:
        columns = (tables["candidates"].column(column).to_pylist() for column in ("candidate_id", "n_tokens"))
        tokens = dict(zip(*columns, strict=True))
        for side in ("chosen", "rejected"):
            lengths[side] = [tokens[row] for row in tables["pairs"].column(f"{side}_id").to_pylist()]
        both = list(zip(lengths["chosen"], lengths["rejected"], strict=True))
        longer = [(chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in both]
    elif "candidates" in tables:
        lengths["response"] = tables["candidates"].column("n_tokens").to_pylist()
    for what, values in lengths.items():
        if values:
            quantiles = np.quantile(values, list(QUANTILES.values()), method="higher").tolist()
            for quantile, value in zip(QUANTILES, quantiles, strict=True):
                yield Finding(name, f"tokens of {what}", quantile, value)
    if longer:
        yield Finding(name, "pairs", "the chosen one is longer (half of the equal ones)", round(sum(longer)),
                      sum(longer) / len(longer))  # fmt: skip


def _scripts(name: str, texts: list[str]) -> Iterator[Finding]:
    """Yield the number of letters of each script, with the first prompt that has one of them."""
    letters: Counter[str] = Counter()
    for character, count in Counter("".join(texts)).items():
        if character.isalpha():
            letters[_script(character)] += count
    for script, count in letters.most_common(SCRIPTS):
        first = next(text for text in texts if any(c.isalpha() and _script(c) == script for c in text))
        yield Finding(name, "letters", script.lower(), count, count / letters.total(), _cut(first))


@cache
def _script(character: str) -> str:
    """Return the first word of a letter's name in Unicode, which is its script: LATIN, CYRILLIC, CJK, HANGUL."""
    return unicodedata.name(character, "unknown").partition(" ")[0]


def _words_of_user(prompt: Row) -> str:
    conversation = conversation_of(prompt)
    return words_of_user(conversation.content) if conversation else str(prompt["text"])


def _duplicates(
    held: str, check: str, heldout: list[str], train: list[str], words: int, overlap: float
) -> Iterator[Finding]:
    """Yield how many held-out prompts have a copy, or a near duplicate, among the prompts to train on."""
    if not heldout or not train:
        return
    matches = near_duplicates(heldout, train, words, overlap)
    exact = [row for row in matches if row[2] == 1.0 and _split_words(heldout[row[0]]) == _split_words(train[row[1]])]
    near = [row for row in matches if row not in exact]
    for item, rows in (("the same words", exact), (f"at least {overlap:g} of {words}-grams of words", near)):
        example = None
        if rows:
            first = max(rows, key=lambda row: (row[2], -row[0]))
            example = f"{first[2]:.2f}: {_cut(heldout[first[0]])} | {_cut(train[first[1]])}"
        yield Finding(held, check, item, len(rows), len(rows) / len(heldout), example)


def near_duplicates(heldout: list[str], train: list[str], words: int, overlap: float) -> list[tuple[int, int, float]]:
    """Return (held-out text, its nearest training text, Jaccard of their n-grams of words) of those with `overlap`.

    A join on the rarest n-grams of a text: two sets with a Jaccard of t share one of the first |a| - ceil(t |a|) + 1 of
    each, in any common order (the prefix filter of Chaudhuri, Ganti and Kaushik, ICDE 2006). Of an n-gram in more than
    MOST_COMMON texts of a side, as many are compared: the result is then a lower bound. Texts of fewer words are one
    n-gram.
    """
    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    for name, texts in (("heldout", heldout), ("train", train)):
        connection.register("incoming", _grams(texts, words))
        connection.execute(f"CREATE TABLE {name} AS SELECT DISTINCT text, gram FROM incoming")
        connection.unregister("incoming")
    for name, other in (("heldout", "train"), ("train", "heldout")):
        connection.execute(f"""
            CREATE TABLE {name}_sizes AS SELECT text, count(*) AS size FROM {name} GROUP BY text;
            CREATE TABLE {name}_prefix AS
            WITH frequency AS (SELECT gram, count(*) AS n FROM (FROM heldout UNION ALL FROM train) GROUP BY gram),
            ranked AS (
                SELECT text, gram, size, row_number() OVER (PARTITION BY text ORDER BY n, gram) AS place
                FROM {name} JOIN frequency USING (gram) JOIN {name}_sizes USING (text)
            )
            SELECT text, gram, size FROM ranked SEMI JOIN {other} USING (gram)
            WHERE place <= size - ceil({overlap} * size - 1e-9) + 1
            QUALIFY row_number() OVER (PARTITION BY gram ORDER BY text) <= {MOST_COMMON}
        """)
    rows = connection.execute(f"""
        WITH candidates AS (
            SELECT DISTINCT a.text AS held, b.text AS trained, a.size AS held_size, b.size AS trained_size
            FROM heldout_prefix AS a JOIN train_prefix AS b USING (gram)
            WHERE least(a.size, b.size) >= {overlap} * greatest(a.size, b.size) - 1e-9
        ),
        shared AS (
            SELECT held, trained, any_value(held_size) + any_value(trained_size) AS sizes, count(*) AS n
            FROM candidates JOIN heldout AS a ON a.text = held
            JOIN train AS b ON b.text = trained AND b.gram = a.gram
            GROUP BY held, trained
        )
        SELECT held, arg_max(trained, (n / (sizes - n), -trained)), max(n / (sizes - n)) AS jaccard
        FROM shared GROUP BY held HAVING jaccard >= {overlap} - 1e-9 ORDER BY held
    """).fetchall()
    connection.close()
    return [(int(held), int(trained), float(jaccard)) for held, trained, jaccard in rows]


def _split_words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _grams(texts: list[str], words: int) -> pa.Table:
    """Return a row per n-gram of words: the number of its text, and a hash of 64 bits."""
    numbers, grams = [], []
    for number, text in enumerate(texts):
        hashes = np.array([_word_hash(word) for word in _split_words(text)], dtype=np.uint64)
        size = min(words, len(hashes))
        count = len(hashes) - size + 1 if size else 0
        # A polynomial in the hashes of the words, modulo 2^64.
        gram = np.full(count, size, dtype=np.uint64)
        for offset in range(size):
            gram = gram * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
        numbers.append(np.full(count, number, dtype=np.int64))
        grams.append(gram)
    empty = np.empty(0, dtype=np.uint64)
    return pa.table({
        "text": np.concatenate([np.empty(0, dtype=np.int64), *numbers]), "gram": np.concatenate([empty, *grams])
    })  # fmt: skip


@cache
def _word_hash(word: str) -> int:
    """Return a hash of 64 bits that is the same in every process."""
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE else f"{line[: EXAMPLE - 3]}..."
