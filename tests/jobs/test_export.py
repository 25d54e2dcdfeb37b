"""What a run trained on, carried out to other trainers: TRL's own code reads the files, and nothing of it is copied."""

import json
import math
import random
import re
import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from jobs import export as exporting
from jobs.export import export
from jobs.export_formats import CUT, OTHER, SIDES, Format, Left, messages_of, trl
from pipeline.config.plan import make_plan
from pipeline.config.recipe import load_recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store
from schemas import Model, WinnowError, prompt_id
from stages.data.tokenizer import Tokenizer, readable
from tests.conftest import answer, ask, write_jsonl
from tests.runs import RECIPES, Silent, plan_of

LN2 = math.log(2)
RUNS = {
    "dpo": ("dpo", "target=examples"),
    "simpo": ("simpo", "target=examples"),
    "twice": ("rso", "rounds=2", "target=examples"),
    "alright": ("alright", "target=optimize"),
    "raft": ("raft", "rounds=1", "target=examples"),
}


class Cached(DPOTrainer):
    """TRL 1.16 reads both columns, but would first compute them again and then refuse two of one name."""

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset


def trainer(kind, data, policy, folder, **options):
    """A trainer with the policy as its model and no reference; everything else is TRL's."""
    args = DPOConfig(
        output_dir=str(folder), precompute_ref_log_probs=True, beta=1.0, bf16=False, use_cpu=True, max_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-6, logging_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no", gradient_checkpointing=False, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(policy.folder, dtype="float32", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(policy.folder, local_files_only=True)
    return kind(model=model, ref_model=None, args=args, train_dataset=data, processing_class=tokenizer)


def losses(made):
    """Of every batch, before the first step."""
    made.model.eval()
    with torch.no_grad():
        return [made.compute_loss(made.model, batch).item() for batch in made.get_train_dataloader()]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def store(world, finished, tmp_path_factory):
    """The finished store with RSO's run `run`, and runs of other recipes as far as their pairs."""
    root = tmp_path_factory.mktemp("export") / "store"
    shutil.copytree(finished, root)
    for name, (recipe, *sets) in RUNS.items():
        plan = plan_of(world, *sets, recipe=recipe)
        plan.name = name
        run(plan, Store(root), LocalExecutor(), Silent())
    return Store(root)


def retokenised(model, folder, *, bos):
    """The model with a tokenizer without chat template, which starts every text with BOS or none."""
    shutil.copytree(model.folder, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if bos:
        pair = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{pair[0]} $A", special_tokens=[pair])
    tokenizer.save_pretrained(folder)
    return Model(folder, "digest")


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def plain(request, world, sharp, tmp_path_factory):
    """DPO's pairs from a policy of plain texts; one response in three runs on from the prompt's last word."""
    folder = tmp_path_factory.mktemp("plain")
    retokenised(sharp, folder / "model", bos=request.param == "BOS")
    slots = [("boat", city, day) for city in ("Oslo", "Rome") for day in ("Monday", "Friday", "Sunday")]
    rows = [
        {"prompt": f"{ask(*slot)}\n\nAssistant:", "chosen": f"{' ' * (n % 3 > 0)}{answer(*slot)}", "rejected": " Um."}
        for n, slot in enumerate(slots)
    ]
    rows += [{"prompt": "Please book a ta", "chosen": "ble for two", "rejected": " Um."}]
    write_jsonl(folder / "preferences.jsonl", rows)
    (folder / "demo.yaml").write_text(
        "shards: 2\ntarget: examples\nsft: {use: model, with: {path: ./model}}\n"
        "preferences: {with: {path: ./preferences.jsonl, heldout: 0.0}}\n"
    )
    plan = make_plan(load_recipe(RECIPES / "dpo.yaml", (folder / "demo.yaml",), (), name="plain"))
    run(plan, Store(folder / "store"), LocalExecutor(), Silent())
    return Store(folder / "store"), len(rows)


# To TRL


@pytest.mark.parametrize("name", ["run", "dpo", "twice"])
def test_the_first_step_of_trl_is_ln_2_from_our_log_probs(name, store, tmp_path):
    """-ln s(beta ((lp - ref)(w) - (lp - ref)(l))) = -ln s(0) = ln 2 where the policy is the reference.

    Of RSO's own samples, of the pairs that people brought, and of a second round, whose reference is the first's
    policy. Every batch, and the step that TRL logs.
    """
    made = export(store, name, "trl", tmp_path / "pairs.parquet")
    data = Dataset.from_parquet(str(made.out), cache_dir=str(tmp_path))
    assert data.column_names == ["prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"]
    theirs = trainer(Cached, data, made.source.policy, tmp_path)
    assert theirs.ref_model is None
    assert len(theirs.train_dataset) == made.rows > 3
    assert losses(theirs) == pytest.approx([LN2] * math.ceil(made.rows / 4), abs=1e-4)
    theirs.train()
    assert theirs.state.log_history[0]["loss"] == pytest.approx(LN2, abs=1e-4)


def test_plain_text_prompts_give_ln_2_and_no_second_bos(plain, tmp_path):
    """Nor is there a prompt whose last word the response goes on with: TRL would tokenise both as one."""
    store, brought = plain
    made = export(store, "plain", "trl", tmp_path / "pairs.jsonl")
    assert 0 < made.rows == brought - made.left[OTHER]
    assert "Assistant: Gladly" in "".join(row["prompt"] + row["chosen"] for row in rows_of(made.out))
    left = rows_of(made.rejects)
    assert [row["reason"] for row in left] == [OTHER] * made.left[OTHER]
    assert "chosen: ble for two" in [row["detail"] for row in left]
    theirs = trainer(Cached, Dataset.from_json(str(made.out), cache_dir=str(tmp_path)), made.source.policy, tmp_path)
    assert losses(theirs) == pytest.approx([LN2] * math.ceil(made.rows / 4), abs=1e-4)


def test_it_is_our_column_that_trl_reads(store, tmp_path):
    """One nat more on each chosen reference: ln(1 + e) = 1.31326 in place of ln 2. And the stock class refuses both."""
    made = export(store, "dpo", "trl", tmp_path / "pairs.parquet")
    table = pq.read_table(made.out)
    changed = [each + 1 for each in table["ref_chosen_logps"].to_pylist()]
    data = Dataset.from_dict(table.to_pydict() | {"ref_chosen_logps": changed})
    found = losses(trainer(Cached, data, made.source.policy, tmp_path))
    assert found == pytest.approx([math.log(1 + math.e)] * len(found), abs=1e-4)
    with pytest.raises(ValueError, match="duplicated"):
        trainer(DPOTrainer, data, made.source.policy, tmp_path)


def any_ids(tokens, rng):
    """A prompt and two responses: written texts, or ids in any order, with EOS or cut."""
    slot = ("boat", rng.choice(["Oslo", "Rome"]), rng.choice(["Monday", "Friday"]))
    written = [tokens.encode(f" {answer(*slot)}"), tokens.encode(" Um.")]
    noise = [[rng.randrange(len(tokens.inner)) for _ in range(rng.randrange(6))] for _ in SIDES]
    ends = [[tokens.stop[0]] * (rng.random() < 0.9) for _ in SIDES]
    chosen, rejected = (
        (ids if rng.random() < 0.7 else other) + end for ids, other, end in zip(written, noise, ends, strict=True)
    )
    prompt = tokens.prompt_ids(ask(*slot)) + (noise[0] if rng.random() < 0.1 else [])
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


@pytest.mark.parametrize("kind", ["template", "no BOS", "BOS"])
def test_what_is_written_is_read_by_trl_as_the_ids_that_were_scored(kind, tiny, tmp_path):
    """TRL's own preparation of 300 rows gives back their ids, all of them; and not everything is left out."""
    tokens = Tokenizer(tiny if kind == "template" else retokenised(tiny, tmp_path / "model", bos=kind == "BOS"))
    rng = random.Random(0)
    rows = [any_ids(tokens, rng) for _ in range(300)]
    refs = {"text": "", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    answers = list(trl([row | refs for row in rows], tokens))
    kept = [(row, answer) for row, answer in zip(rows, answers, strict=True) if not isinstance(answer, Left)]
    theirs = object.__new__(DPOTrainer)
    theirs._tokenizer = tokens.inner
    args = DPOConfig(output_dir=str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none")
    read = theirs._prepare_dataset(Dataset.from_list([answer for _, answer in kept]), tokens.inner, args, "train")
    assert [{name: each[name] for name in row} for (row, _), each in zip(kept, read, strict=True)] == [
        row for row, _ in kept
    ]
    assert len(kept) > 50
    assert {answer.reason for answer in answers if isinstance(answer, Left)} == {CUT, OTHER}


# Nothing lost, nothing doubled


@pytest.mark.parametrize("format", ["trl", "openai-messages", "jsonl"])
def test_every_pair_is_in_the_file_or_in_the_rejects(format, store, tmp_path):
    """In the order of their ids; the rejects' reasons are those that are told."""
    everything = rows_of(export(store, "run", "jsonl", tmp_path / "all.jsonl").out)
    keys = [(row["prompt_id"], row["chosen_id"], row["rejected_id"]) for row in everything]
    assert keys == sorted(keys)
    assert sum(len(row["pairs"]) for row in examples_of(store, "run")) == len(keys)
    made = export(store, "run", format, tmp_path / "pairs.jsonl")
    left = rows_of(made.rejects) if made.left else []
    assert len(rows_of(made.out)) == made.rows == len(keys) - len(left)
    assert Counter(row["reason"] for row in left) == made.left
    assert {(row["prompt_id"], row["chosen_id"], row["rejected_id"]) for row in left} <= set(keys)
    assert made.rejects.exists() == bool(made.left)


def examples_of(store, name):
    from schemas.tables import EXAMPLES

    link = store.runs()[name]["examples"]
    return store.at(link["stage"], link["key"]).read(EXAMPLES).to_pylist()


def test_plain_rows_hold_what_the_policy_was_trained_on(store, tmp_path):
    """Ids, weights, labels and references are those of the examples; rewards those of the two responses."""
    trained = [
        (group["prompt_ids"], chosen["token_ids"], rejected["token_ids"], chosen["ref_logp"], rejected["ref_logp"],
         pair["weight"], pair["label"])
        for group in examples_of(store, "run")
        for pair in group["pairs"]
        for chosen, rejected in [(group["responses"][pair["chosen"]], group["responses"][pair["rejected"]])]
    ]  # fmt: skip
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "weight", "label")
    rows = rows_of(export(store, "run", "jsonl", tmp_path / "pairs.jsonl").out)
    assert sorted(tuple(row[name] for name in names) for row in rows) == sorted(trained)
    assert all(row["gap"] > 0 and row["rule"] == "matches" and row["chosen_reward"] is not None for row in rows)


@pytest.mark.parametrize("file", ["pairs.parquet", "pairs.jsonl"])
def test_the_same_run_gives_the_same_bytes_in_slices_of_any_size(file, store, tmp_path, monkeypatch):
    whole = export(store, "dpo", "trl", tmp_path / "whole" / file)
    monkeypatch.setattr(exporting, "SLICE", whole.rows // 2)
    assert len(exporting._slices(whole.rows)) == 16
    sliced = export(store, "dpo", "trl", tmp_path / "sliced" / file)
    if file.endswith(".parquet"):  # whose row groups are the slices'
        assert pq.read_table(sliced.out).equals(pq.read_table(whole.out))
    else:
        assert sliced.out.read_bytes() == whole.out.read_bytes()
    monkeypatch.undo()
    assert export(store, "dpo", "trl", tmp_path / "again" / file).out.read_bytes() == whole.out.read_bytes()


def test_a_round_is_exported_by_its_number_and_the_last_one_without(store, tmp_path):
    """Round 1 of two is the run of one round: the same key, and the same bytes."""
    said = {
        number: export(store, "twice", "jsonl", tmp_path / f"{number}.jsonl", round=number).out.read_bytes()
        for number in (1, 2, None)
    }
    assert said[None] == said[2] != said[1]
    assert said[1] == export(store, "run", "jsonl", tmp_path / "run.jsonl").out.read_bytes()


def test_held_out_pairs_are_those_that_the_policy_was_measured_on(store, tmp_path):
    train = rows_of(export(store, "alright", "jsonl", tmp_path / "train.jsonl").out)
    heldout = rows_of(export(store, "alright", "jsonl", tmp_path / "heldout.jsonl", "heldout").out)
    assert heldout
    assert not {row["prompt_id"] for row in heldout} & {row["prompt_id"] for row in train}


# Messages


def test_openai_gets_messages_and_texts_that_end(store, tmp_path):
    made = export(store, "dpo", "openai-messages", tmp_path / "pairs.jsonl")
    for row in rows_of(made.out):
        assert list(row) == ["input", "preferred_output", "non_preferred_output"]
        (asked,) = row["input"]["messages"]
        assert asked["role"] == "user"
        assert re.fullmatch(r"Please book .* Hello\.", asked["content"])
        assert row["preferred_output"][0]["content"].startswith("Gladly. I have booked a")
        assert [row[f"{side}_output"][0]["role"] for side in ("preferred", "non_preferred")] == ["assistant"] * 2


turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text("ab: \nuser", min_size=1)}
    ),
    min_size=1,
)


@given(messages=turns)
def test_a_prompts_messages_are_told_from_its_text_or_not_at_all(messages):
    """The id is the content's hash: what is found is the prompt itself, whatever its text looks like."""
    assert messages_of(prompt_id(messages), readable(messages)) in (messages, None)
    text = readable(messages)
    assert messages_of(prompt_id(text), text) == [{"role": "user", "content": text}]


def test_turns_of_a_conversation_are_found_again():
    said = [
        {"role": "system", "content": "Be brief.\nNote: no lists"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "user of what?"},
    ]
    assert messages_of(prompt_id(said), readable(said)) == said


# The command


def exported(winnow, *words):
    """Exit code, and what was said in one line."""
    code, said = winnow("export", *words)
    return code, " ".join(said.split())


def test_the_command_says_what_is_in_the_file_and_what_is_not(winnow, store, tmp_path):
    """SimPO caches no reference: the columns are not there, and that is said. What was left out earlier is gone."""
    out = tmp_path / "pairs.parquet"
    out.with_name("pairs.parquet.rejects.jsonl").write_text("of another time\n")
    words = ("--run", "simpo", "--format", "trl", "--out", out, "--store", store.root)
    code, said = exported(winnow, *words)
    table = pq.read_table(out)
    assert (code, table.column_names) == (0, ["prompt", "chosen", "rejected"])
    assert f"wrote {out}: {table.num_rows} pairs of run simpo, step examples" in said
    assert "ref_chosen_logps and ref_rejected_logps are absent" in said
    left = out.with_name("pairs.parquet.rejects.jsonl")
    assert ("left out:" in said) == left.exists()
    assert not left.exists() or "of another time" not in left.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "rnu"], ["no run 'rnu'", "did you mean 'run'?"]),
        (["--run", "raft"], ["run raft: no pairs", "rso or dpo"]),
        (["--run", "run", "--round", "2"], ["run run: no round 2", "leave --round out"]),
        (["--run", "twice", "--round", "3"], ["run twice: no round 3; its rounds are 1 to 2"]),
        (["--run", "run", "--split", "heldout"], ["no held-out examples", "wire `heldout`"]),
        (["--run", "run", "--out", "pairs.csv"], ["--out pairs.csv: trl is written as .parquet or .jsonl"]),
    ],
)
def test_what_cannot_be_exported_is_told_and_leaves_no_file(winnow, words, said, store, tmp_path):
    given = ["--format", "trl", "--store", store.root, *(["--out", "pairs.jsonl"] if "--out" not in words else [])]
    code, text = exported(winnow, *words, *given)
    assert code == 2
    assert all(part in text for part in said), text
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_which_nothing_would_be_left_writes_nothing(store, tmp_path, monkeypatch):
    """Every response cut: the pairs are there as ids alone."""
    monkeypatch.setattr(exporting, "FORMATS", {"trl": Format((".jsonl",), all_cut)})
    with pytest.raises(WinnowError, match=r"all its pairs would be left out of trl \(\d+ cut at max_tokens\)"):
        export(store, "run", "trl", tmp_path / "pairs.jsonl")
    assert list(tmp_path.iterdir()) == []


def all_cut(rows, tokens):
    return trl([row | {"chosen_ids": row["chosen_ids"][:-1]} for row in rows], tokens)
