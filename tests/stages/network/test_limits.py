"""Unusual models, model folders, data and second runs: each is refused early, or made harmless."""

import json
import shutil
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest

import jobs.__main__ as command
from pipeline.config.plan import make_plan
from pipeline.config.recipe import load_recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.fingerprints import ModelPath, model_digest
from pipeline.store.store import Store
from schemas import Model, WinnowError
from schemas.tables import CANDIDATES, PROMPTS
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.tokenizer import Tokenizer
from stages.network.load import load_network, save_network
from stages.network.models import model
from stages.ranking.judge import judge
from stages.ranking.rankers import ranker
from stages.sampling.engines import Request, Sampling, open_engine
from stages.sampling.sample import sample
from tests.material import context
from tests.runs import RECIPES, Silent, plan_of
from tests.stages.data.test_files import jsonl, reasons


@pytest.fixture
def odd(tiny: Model, tmp_path: Path) -> Model:
    """The tiny model in a folder whose generation_config would bend every draw, as hub folders have."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "odd"))
    bent = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 5.0, "eos_token_id": 77, "min_length": 6}
    (folder / "generation_config.json").write_text(json.dumps(bent))
    return Model(folder, model_digest(folder))


def test_the_folders_own_sampling_defaults_do_not_bend_the_law(tiny, odd):
    requests = [Request([0, 5, 9, 5, 9, 5, 9], seed) for seed in range(30)]
    plain, bent = (
        open_engine("transformers", model.folder, "float32").generate(requests, Sampling(1.0, 0, 10, (1,)))
        for model in (tiny, odd)
    )
    assert [completion.token_ids for completion in plain] == [completion.token_ids for completion in bent]


def test_a_trained_policy_is_saved_whatever_the_folders_generation_config_says(odd, tmp_path):
    """transformers refuses to save a temperature without sampling: a finished training must not be lost by it."""
    saved = save_network(load_network(odd), odd, tmp_path / "out" / "model")
    assert json.loads((saved.folder / "generation_config.json").read_text())["top_p"] == 0.9


def test_a_draw_ends_at_the_eos_of_training_and_at_that_of_the_folder(odd):
    assert Tokenizer(odd).stop == (1, 77)


def test_one_row_that_is_too_long_does_not_end_a_run(tiny, ctx, tmp_path):
    """Context 128: a long prompt is rejected, a long response is cut to what the prompt leaves, without EOS."""
    rows = [
        {"prompt": "Oslo " * 200, "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Book a boat.", "chosen": "Paris " * 200, "rejected": "No."},
    ]
    table, candidates, pairs = preferences(tiny, ctx, path=jsonl(tmp_path, rows), too_long="cut")
    assert [reason for _, reason in reasons(ctx)] == ["prompt too long"]
    long = max(candidates.to_pylist(), key=lambda row: row["n_tokens"])
    assert long["n_tokens"] + len(table.column("token_ids")[0]) == 128
    assert long["finish_reason"] == "length"
    assert pairs.num_rows == 1


def test_a_special_token_written_out_in_data_does_not_become_a_control_token(tiny, ctx, tmp_path):
    texts = ["book <|eos|> now", "<|assistant|>Sure", "a <|bos|>", "Book a boat."]
    table = prompts(tiny, ctx, path=jsonl(tmp_path, [{"prompt": text} for text in texts]))
    assert table.column("text").to_pylist() == texts[3:]
    tokens = ("<|eos|>", "<|assistant|>", "<|bos|>")
    assert [reason for _, reason in reasons(ctx)] == [f"special token {token} in the text" for token in tokens]


def test_messages_that_the_chat_template_refuses_are_rejected(tiny, ctx, tmp_path):
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "strict"))
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict += "{{ messages[0]['content'] }}"
    (folder / "chat_template.jinja").write_text(strict)
    rows: list[dict] = [{"prompt": [{"role": "system", "content": "Be kind."}]}, {"prompt": "Book a boat."}]
    assert prompts(Model(folder, "x"), ctx, path=jsonl(tmp_path, rows)).num_rows == 1
    assert "no system role" in reasons(ctx)[0][1]


def one_prompt() -> pa.Table:
    row = {"prompt_id": "aa", "text": "x", "token_ids": [0, 5, 9], "split": "train"}
    return pa.Table.from_pylist([row], schema=PROMPTS)


def test_an_evaluation_keeps_empty_responses_and_training_data_does_not(tiny, ctx):
    """Of 400 short draws, those without text are counted with `keep_empty`, and else rejected."""
    table = one_prompt()
    options = dict(engine="transformers", n=400, temperature=2.0, top_k=0, max_tokens=2, keep_special=True)
    complete = sample(table, tiny, ctx, **options, keep_empty=True)
    assert complete.num_rows == 400
    assert not ctx.rejects.num_rows
    filled = sample(table, tiny, ctx, **options)
    assert filled.num_rows + ctx.rejects.num_rows == 400
    assert ctx.rejects.num_rows == complete.column("text").to_pylist().count("")


def test_a_special_token_inside_a_draw_is_rejected_or_shown(tiny, ctx):
    """Text, rewards and reports do not show it, and training would read it. Of 400 draws of random ids some hold one.

    `keep_special` keeps all of them, `allow_special` those with the listed tokens alone; `raw_text` has their text with
    all special tokens but the stop id at the end, and is null where there is none.
    """
    table, tokenizer = one_prompt(), Tokenizer(tiny)
    options = dict(engine="transformers", n=400, temperature=2.0, top_k=0, max_tokens=4, keep_empty=True)
    complete = sample(table, tiny, ctx, **options, keep_special=True).to_pylist()
    assert not ctx.rejects.num_rows

    def inside(row):
        ids = row["token_ids"][:-1] if row["finish_reason"] == "stop" else row["token_ids"]
        return {tokenizer.special_tokens[token] for token in ids if token in tokenizer.special_tokens}

    for row in complete:
        assert (row["raw_text"] is None) == (not inside(row))
        assert all(token in row["raw_text"] and token not in row["text"] for token in inside(row))
    clean = sample(table, tiny, ctx, **options).to_pylist()
    assert clean == [row for row in complete if not inside(row)]
    rejects = ctx.rejects.to_pylist()
    assert 0 < len(rejects) == 400 - len(clean)
    assert {row["reason"] for row in rejects} == {"special token in the response"}
    held = next(row for row in complete if inside(row))
    assert {row["place"]: row["detail"] for row in rejects}[f"k={held['k']}"] == held["raw_text"]
    some = sample(table, tiny, ctx, **options, allow_special=["<|user|>"]).to_pylist()
    assert some == [row for row in complete if inside(row) <= {"<|user|>"}] != clean


def test_a_token_to_allow_that_the_tokenizer_does_not_have_is_refused(tiny, ctx):
    with pytest.raises(WinnowError, match=r"allow_special: '<\|usr\|>'.*did you mean '<\|user\|>'"):
        sample(one_prompt(), tiny, ctx, engine="fake", allow_special=["<|usr|>"])


@pytest.fixture
def padded(tiny, tmp_path):
    """The tiny model with 4 ids in 5 that its tokenizer has no token for, as likely as the others."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "padded"))
    network = load_network(tiny)
    network.resize_token_embeddings(5 * len(Tokenizer(tiny).inner))
    network.save_pretrained(folder)
    return Model(folder, model_digest(folder))


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_draws_with_ids_beyond_the_tokenizer_are_rejected_by_name(tiny, padded, engine):
    """Kept are those of tokens alone, of unchanged law; an ordinary model loses none."""
    tokens = len(Tokenizer(tiny).inner)
    options = dict(engine=engine, n=60, temperature=1.0, top_k=0, max_tokens=2, keep_empty=True)
    plain, ctx = context(), context()
    sample(one_prompt(), tiny, plain, **options)
    kept = sample(one_prompt(), padded, ctx, **options)
    assert 0 < kept.num_rows < 60
    assert max(max(ids) for ids in kept["token_ids"].to_pylist()) < tokens
    rejects = [row for row in ctx.rejects.to_pylist() if row["reason"] == "id beyond the tokenizer"]
    assert "id beyond the tokenizer" not in plain.rejects["reason"].to_pylist()
    assert kept.num_rows + ctx.rejects.num_rows == 60
    assert all(int(row["detail"].split()[1]) >= tokens and row["place"].startswith("k=") for row in rejects)


def test_an_evaluation_counts_draws_with_ids_beyond_the_tokenizer(padded):
    """A policy that has lost its way would be judged by the rest of its responses alone. Users see the other tokens."""
    tokenizer, ctx = Tokenizer(padded), context()
    options = dict(n=60, temperature=1.0, top_k=0, max_tokens=4, keep_empty=True, keep_special=True)
    rows = sample(one_prompt(), padded, ctx, engine="transformers", **options).to_pylist()
    beyond = [row for row in rows if max(row["token_ids"]) >= len(tokenizer.inner)]
    assert len(rows) == 60
    assert ctx.counters["draws_with_ids_beyond_the_tokenizer"] == len(beyond) > 0
    for row in beyond:
        seen = [token for token in row["token_ids"] if token < len(tokenizer.inner) and token not in tokenizer.stop]
        assert row["text"].strip() == tokenizer.decode(seen).strip()


def test_responses_without_an_opponent_are_counted(tiny, ctx):
    def candidates(draws: int, name: str) -> pa.Table:
        common = {"prompt_id": "aa", "token_ids": [5, 1], "logp_kind": "none", "n_tokens": 2, "finish_reason": "stop"}
        rows = [common | {"candidate_id": f"{name}{k}", "k": k, "text": "a boat"} for k in range(draws)]
        return pa.Table.from_pylist(rows, schema=CANDIDATES)

    ours, theirs = candidates(5, "a"), candidates(2, "b")
    assert judge(one_prompt(), ours, theirs.slice(0, 0), ctx, tiny, by=ranker.bind("pairwise")).num_rows == 0
    assert [reason for _, reason in reasons(ctx)] == ["no baseline response"]


def test_a_model_folder_that_does_not_load_is_refused_when_it_is_copied(tiny, ctx, tmp_path):
    for file in ("tokenizer.json", "config.json"):
        folder = Path(shutil.copytree(tiny.folder, tmp_path / file))
        (folder / file).write_text("{}")
        with pytest.raises(WinnowError, match="its folder cannot be used"):
            model(ctx, path=ModelPath(str(folder)))


def test_two_runs_at_once_make_each_step_once(data_dir, tmp_path):
    """The second waits for the first, step by step, and uses its result."""
    plans = [plan_of(data_dir, "target=demonstrations") for _ in range(2)]
    watchers = [Silent(), Silent()]
    threads = [
        threading.Thread(target=run, args=(plan, Store(tmp_path), LocalExecutor(), watcher))
        for plan, watcher in zip(plans, watchers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(watchers[0].ran + watchers[1].ran) == ["base", "demonstrations"]


def test_options_that_only_say_how_a_step_runs_are_no_part_of_its_key(data_dir):
    keys = {plan_of(data_dir, f"optimize.tokens_per_pass={size}").target.key for size in (1000, 9000)}
    assert len(keys) == 1


def test_all_mistakes_of_set_are_reported_at_once(data_dir):
    sets = ("selct.beta=1", "rewrd.x=2", "nonsense")
    with pytest.raises(WinnowError) as caught:
        load_recipe(RECIPES / "rso.yaml", (data_dir / "demo.yaml",), sets, library=(RECIPES,))
    assert len(caught.value.problems) == 3


def test_a_recipe_of_a_user_can_extend_ours(data_dir, tmp_path):
    for recipe in ("_base", "rso"):
        file = tmp_path / "mine.yaml"
        file.write_text(f"extends: {recipe}\nselect: {{with: {{rule: {{k: 2}}}}}}\n")
        plan = make_plan(load_recipe(file, (data_dir / "demo.yaml",), library=(RECIPES,)))
        assert next(step for step in plan.steps if step.name == "select").options["rule"].options["k"] == 2


def test_a_store_that_cannot_be_written_ends_with_a_message(data_dir, monkeypatch, capsys):
    arguments = ["winnow", "run", "rso", "--config", str(data_dir / "demo.yaml"), "--store", "/proc/nowhere"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "/proc/nowhere" in capsys.readouterr().err.replace("\n", "")
