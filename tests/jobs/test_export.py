"""Pairs of a run as files for other trainers: TRL's own code reads them, and nothing of it is copied here."""

import json
import math
import random
import re
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from jobs import export as exporting
from jobs.export import export_pairs
from jobs.export_formats import (
    CUT,
    HIDDEN_TOKENS,
    NO_TEXT,
    OTHER_END,
    OTHER_TOKENS,
    SIDES,
    UNKNOWN_MESSAGES,
    Reject,
    openai_messages,
    trl,
)
from pipeline.config.plan import make_plan
from pipeline.config.recipe import load_recipe
from pipeline.context import StageContext, WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.fingerprints import DataPath, model_digest
from pipeline.store.store import Store
from schemas import Model, WinnowError, prompt_id
from stages.data.preferences import preferences
from stages.data.tokenizer import Tokenizer
from tests.catalogs import record_changes
from tests.conftest import MARKS, answer, ask, write_jsonl
from tests.material import cache
from tests.runs import RECIPES, Silent, local, plan_of

LN2 = math.log(2)
RUNS = {
    "dpo": ("dpo", "target=examples"),
    "simpo": ("simpo", "target=examples"),
    "twice": ("rso", "rounds=2", "target=examples"),
    "alright": ("alright", "target=optimize"),
    "raft": ("raft", "rounds=1", "target=examples"),
}


class Cached(DPOTrainer):
    """TRL 1.16 reads both columns, but would first compute them again, and then refuse two of one name."""

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset


def make_trainer(kind, data, policy, folder, **options):
    """Return a trainer with the policy as its model and no reference; everything else is TRL's."""
    args = DPOConfig(
        output_dir=str(folder), precompute_ref_log_probs=True, beta=1.0, bf16=False, use_cpu=True, max_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-6, logging_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no", gradient_checkpointing=False, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(policy.folder, dtype="float32", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(policy.folder, local_files_only=True)
    return kind(model=model, ref_model=None, args=args, train_dataset=data, processing_class=tokenizer)


def losses(trainer):
    """Return the loss of every batch before the first step."""
    trainer.model.eval()
    with torch.no_grad():
        return [trainer.compute_loss(trainer.model, batch).item() for batch in trainer.get_train_dataloader()]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def store(data_dir, finished, tmp_path_factory):
    """Return the finished store with RSO's run `run`, and runs of other recipes until their pairs."""
    root = tmp_path_factory.mktemp("export") / "store"
    shutil.copytree(finished, root)
    for name, (recipe, *sets) in RUNS.items():
        plan = plan_of(data_dir, *sets, recipe=recipe)
        plan.name = name
        run(plan, Store(root), LocalExecutor(), Silent())
    return Store(root)


def retokenised(model, folder, *, bos):
    """Return the model with a tokenizer without chat template, which starts texts with BOS or without."""
    shutil.copytree(model.folder, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if bos:
        pair = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{pair[0]} $A", special_tokens=[pair])
    tokenizer.save_pretrained(folder)
    return Model(folder, "digest")


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def plain(request, data_dir, sharp, tmp_path_factory):
    """Return DPO's pairs of a policy without chat template, and their number; one in three begins without a space."""
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
    plan = make_plan(load_recipe(RECIPES / "dpo.yaml", (folder / "demo.yaml",), (), "plain", (RECIPES,)))
    run(plan, Store(folder / "store"), LocalExecutor(), Silent())
    return Store(folder / "store"), len(rows)


# To TRL


@pytest.mark.parametrize("name", ["run", "dpo", "twice"])
def test_the_first_loss_of_trl_is_ln_2_from_our_log_probs(name, store, tmp_path):
    """-ln s(beta ((lp - ref)(w) - (lp - ref)(l))) = -ln s(0) = ln 2 if the policy is the reference.

    For RSO's own samples, for the pairs of a data set, and for a second round, whose reference is the first round's
    policy; in every batch. With one nat more on each chosen reference it is ln(1 + e) = 1.31326: TRL reads our column.
    TRL's stock class, which would compute the columns again, refuses them.
    """
    result = export_pairs(store, name, "trl", tmp_path / "pairs.parquet")
    data = Dataset.from_parquet(str(result.out), cache_dir=str(tmp_path))
    assert data.column_names == ["prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"]
    trainer = make_trainer(Cached, data, result.source.policy, tmp_path)
    assert trainer.ref_model is None
    assert len(trainer.train_dataset) == result.rows > 3
    assert losses(trainer) == pytest.approx([LN2] * math.ceil(result.rows / 4), abs=1e-4)
    if name == "run":
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(LN2, abs=1e-4)
    if name == "dpo":
        table = pq.read_table(result.out).to_pydict()
        shifted = [value + 1 for value in table["ref_chosen_logps"]]
        data = Dataset.from_dict(table | {"ref_chosen_logps": shifted})
        found = losses(make_trainer(Cached, data, result.source.policy, tmp_path))
        assert found == pytest.approx([math.log(1 + math.e)] * len(found), abs=1e-4)
        with pytest.raises(ValueError, match="duplicated"):
            make_trainer(DPOTrainer, data, result.source.policy, tmp_path)


def test_plain_text_prompts_give_ln_2_and_no_second_bos(plain, tmp_path):
    """A prompt whose last word the response continues is rejected when it is read: both would be one word."""
    store, pairs = plain
    result = export_pairs(store, "plain", "trl", tmp_path / "pairs.jsonl")
    assert (result.rows, result.rejects) == (pairs - 1, {})
    assert "Assistant: Gladly" in "".join(row["prompt"] + row["chosen"] for row in rows_of(result.out))
    data = Dataset.from_json(str(result.out), cache_dir=str(tmp_path))
    trainer = make_trainer(Cached, data, result.source.policy, tmp_path)
    assert losses(trainer) == pytest.approx([LN2] * math.ceil(result.rows / 4), abs=1e-4)


def any_ids(tokenizer, rng):
    """Return a prompt and two responses: texts, or ids in any order, with EOS or cut."""
    slot = ("boat", rng.choice(["Oslo", "Rome"]), rng.choice(["Monday", "Friday"]))
    texts = [tokenizer.encode(f" {answer(*slot)}"), tokenizer.encode(" Um.")]
    noise = [[rng.randrange(len(tokenizer.inner)) for _ in range(rng.randrange(6))] for _ in SIDES]
    ends = [[tokenizer.stop[0]] * (rng.random() < 0.9) for _ in SIDES]
    chosen, rejected = (
        (ids if rng.random() < 0.7 else other) + end for ids, other, end in zip(texts, noise, ends, strict=True)
    )
    prompt = tokenizer.prompt_ids(ask(*slot)) + (noise[0] if rng.random() < 0.1 else [])
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


@pytest.mark.parametrize("kind", ["template", "no BOS", "BOS"])
def test_trl_reads_the_ids_that_were_scored(kind, tiny, tmp_path):
    """TRL's own preparation of 300 rows gives all their ids back; and not everything is rejected."""
    tokenizer = Tokenizer(tiny if kind == "template" else retokenised(tiny, tmp_path / "model", bos=kind == "BOS"))
    rng = random.Random(0)
    rows = [any_ids(tokenizer, rng) for _ in range(300)]
    refs = {"text": "", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    items = list(trl([row | refs for row in rows], tokenizer))
    accepted = [(row, item) for row, item in zip(rows, items, strict=True) if not isinstance(item, Reject)]
    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer.inner
    args = DPOConfig(output_dir=str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none")
    data = Dataset.from_list([item for _, item in accepted])
    read = trainer._prepare_dataset(data, tokenizer.inner, args, "train")
    assert [{name: item[name] for name in row} for (row, _), item in zip(accepted, read, strict=True)] == [
        row for row, _ in accepted
    ]
    assert len(accepted) > 50
    assert {item.reason for item in items if isinstance(item, Reject)} == {CUT, OTHER_TOKENS}


class FromIds(Cached):
    """TRL 1.16 tokenises text only, whatever the columns are; its collator and its loss read the ids."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def ids_read(trainer):
    """Return (prompt ids, chosen ids, rejected ids) of every pair, out of the batches that the loss is computed on."""
    pairs = []
    for batch in trainer.get_train_dataloader():
        sequences = zip(
            batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
        )
        sides = [(ids[real & ~response].tolist(), ids[response].tolist()) for ids, real, response in sequences]
        for chosen, rejected in zip(sides[: len(sides) // 2], sides[len(sides) // 2 :], strict=True):
            assert chosen[0] == rejected[0]
            pairs.append((chosen[0], chosen[1], rejected[1]))
    return sorted(pairs)


def rewrite_examples(store, name, root, change):
    """Copy the store unless it is there, and let `change` change the groups of a run's examples, file by file."""
    if store.root != root:
        shutil.copytree(store.root, root)
    link = store.runs()[name]["examples"]
    for file in (root / link["stage"] / link["key"]).glob("examples-*.parquet"):
        table = pq.read_table(file)
        pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), file)
    record_changes(root / link["stage"] / link["key"])
    return Store(root)


@pytest.fixture(scope="module")
def cut(store, tmp_path_factory):
    """Return a store in which every other response of the run `run` was cut at three tokens, and scored as cut."""
    root = tmp_path_factory.mktemp("cut")
    policy = export_pairs(store, "run", "trl-ids", root / "pairs.jsonl").source.policy

    def cut_responses(groups):
        for response in (response for group in groups for response in group["responses"][::2]):
            response["token_ids"] = response["token_ids"][:3]
        return cache(policy, groups)

    return rewrite_examples(store, "run", root / "store", cut_responses)


@pytest.mark.parametrize("file", ["pairs.parquet", "pairs.jsonl"])
def test_trl_trains_on_exactly_the_ids_of_all_pairs(file, cut, tmp_path):
    """On responses that were cut at max_tokens too, which text loses; the first loss is ln 2 in every batch.

    TRL's stock class refuses a file of ids, so none is trained on as another text.
    """
    trained = [
        (group["prompt_ids"], *(group["responses"][pair[side]]["token_ids"] for side in SIDES))
        for group in examples_of(cut, "run")
        for pair in group["pairs"]
    ]
    as_text = export_pairs(cut, "run", "trl", tmp_path / "text.jsonl")
    assert as_text.rejects[CUT] > 0
    result = export_pairs(cut, "run", "trl-ids", tmp_path / file)
    assert (result.rows, result.rejects) == (as_text.rows + as_text.rejects.total(), {})
    read = Dataset.from_parquet if file.endswith(".parquet") else Dataset.from_json
    data = read(str(result.out), cache_dir=str(tmp_path))
    trainer = make_trainer(FromIds, data, result.source.policy, tmp_path, max_length=None)
    assert ids_read(trainer) == sorted(trained)
    assert losses(trainer) == pytest.approx([LN2] * math.ceil(result.rows / 4), abs=1e-4)
    with pytest.raises(KeyError, match="chosen"):
        make_trainer(DPOTrainer, data, result.source.policy, tmp_path)


def test_trl_s_reward_trainer_takes_the_ids_after_one_line(store, tmp_path):
    """It reads prompt and response as one list, which jobs/README.md makes of the columns."""
    result = export_pairs(store, "run", "trl-ids", tmp_path / "pairs.jsonl")
    data = Dataset.from_json(str(result.out), cache_dir=str(tmp_path))
    data = data.map(lambda row: {f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in SIDES})
    args = RewardConfig(output_dir=str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none")
    tokenizer = Tokenizer(result.source.policy).inner
    read = object.__new__(RewardTrainer)._prepare_dataset(data, tokenizer, args, "train")
    expected = [tuple(row["prompt_ids"] + row[f"{side}_ids"] for side in SIDES) for row in rows_of(result.out)]
    assert [(row["chosen_ids"], row["rejected_ids"]) for row in read] == expected


@pytest.fixture(scope="module")
def ended(store, tmp_path_factory):
    """Return a store in which most responses of the run `dpo` end with a token that the model folder names beside EOS.

    As a chat template's end of turn does, and the token; a single pair ends with EOS as before.
    """
    root, end = tmp_path_factory.mktemp("ended") / "store", MARKS[0]
    first = min(group["prompt_id"] for group in examples_of(store, "dpo"))
    tokenizer = Tokenizer(store.at(**store.runs()["dpo"]["sft"]).model())
    eos, (end_id,) = tokenizer.inner.eos_token_id, tokenizer.encode(end)

    def end_otherwise(groups):
        others = (group for group in groups if group["prompt_id"] != first)
        for response in (response for group in others for response in group["responses"]):
            assert response["token_ids"][-1] == eos
            response["token_ids"][-1] = end_id
        digest = model_digest(root / "optimize" / step.name / "model")
        return [group | {"ref_model": digest} for group in groups]

    shutil.copytree(store.root, root)
    step = local(Store(root).at(**store.runs()["dpo"]["sft"]).path)
    (step / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, end_id]}))
    record_changes(step)
    return rewrite_examples(Store(root), "dpo", root, end_otherwise), end


def test_a_policy_that_ends_by_its_templates_token_can_be_exported(ended, winnow, tmp_path):
    """As ids all of it; as text what ends with that token, for a tokenizer that has it as EOS, which is printed."""
    store, end = ended
    out = tmp_path / "text.parquet"
    code, text = winnow("export", "--run", "dpo", "--format", "trl", "--out", out, "--store", store.root)
    text = " ".join(text.split())
    assert (code, f"set tokenizer.eos_token = '{end}'" in text) == (0, True), text
    groups = examples_of(store, "dpo")
    pairs = sum(len(group["pairs"]) for group in groups)
    assert f"rejected: 1 {OTHER_END} (" in text
    assert f"1 of {pairs} pairs are lost; --format trl-ids loses none" in text
    assert export_pairs(store, "dpo", "trl-ids", tmp_path / "ids.jsonl").rows == pairs

    tokenizer = Tokenizer(export_pairs(store, "dpo", "trl", out).source.policy).inner
    tokenizer.eos_token = end
    args = DPOConfig(output_dir=str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none")
    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    data = Dataset.from_parquet(str(out), cache_dir=str(tmp_path))
    read = trainer._prepare_dataset(data, tokenizer, args, "train")
    first = min(group["prompt_id"] for group in groups)
    expected = [
        (group["prompt_ids"], *(group["responses"][pair[side]]["token_ids"] for side in SIDES))
        for group in sorted(groups, key=lambda group: group["prompt_id"])
        for pair in group["pairs"]
        if group["prompt_id"] != first
    ]
    assert [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in read] == expected


def test_a_response_of_several_turns_needs_the_format_with_masks(store, winnow, tmp_path):
    """Ids alone lose it as text does: both name the format that loses none."""
    first = min(group["prompt_id"] for group in examples_of(store, "dpo"))

    def mask_first(groups):
        for response in (item for group in groups if group["prompt_id"] == first for item in group["responses"]):
            response["mask"] = [False] + [True] * (len(response["token_ids"]) - 1)
        return groups

    root = tmp_path / "store"
    turns = rewrite_examples(store, "dpo", root, mask_first)
    pairs = sum(len(group["pairs"]) for group in examples_of(turns, "dpo"))
    for format in ("trl", "trl-ids"):
        words = ("export", "--run", "dpo", "--format", format, "--out", tmp_path / f"{format}.parquet", "--store", root)
        code, text = winnow(*words)
        assert (code, f"1 of {pairs} pairs are lost; --format jsonl loses none" in text) == (0, True), text
    assert export_pairs(turns, "dpo", "jsonl", tmp_path / "pairs.jsonl").rows == pairs


# Nothing lost, nothing doubled


@pytest.mark.parametrize("format", ["trl-ids", "trl", "openai-messages", "jsonl"])
def test_every_pair_is_in_the_file_or_in_the_rejects(format, store, tmp_path):
    """In the order of their ids; the counts by reason are those of the rejects."""
    everything = rows_of(export_pairs(store, "run", "jsonl", tmp_path / "all.jsonl").out)
    keys = [(row["prompt_id"], row["chosen_id"], row["rejected_id"]) for row in everything]
    assert keys == sorted(keys)
    assert sum(len(row["pairs"]) for row in examples_of(store, "run")) == len(keys)
    result = export_pairs(store, "run", format, tmp_path / "pairs.jsonl")
    rejects = rows_of(result.rejects_file) if result.rejects else []
    assert len(rows_of(result.out)) == result.rows == len(keys) - len(rejects)
    assert Counter(row["reason"] for row in rejects) == result.rejects
    assert {(row["prompt_id"], row["chosen_id"], row["rejected_id"]) for row in rejects} <= set(keys)
    assert result.rejects_file.exists() == bool(result.rejects)


def examples_of(store, name):
    from schemas.tables import EXAMPLES

    link = store.runs()[name]["examples"]
    return store.at(link["stage"], link["key"]).read(EXAMPLES).to_pylist()


def test_plain_rows_hold_the_training_data_of_the_policy(store, tmp_path):
    """Ids, weights, labels and references are those of the examples; rewards are those of the two responses."""
    trained = [
        (group["prompt_ids"], chosen["token_ids"], rejected["token_ids"], chosen["ref_logp"], rejected["ref_logp"],
         pair["weight"], pair["label"])
        for group in examples_of(store, "run")
        for pair in group["pairs"]
        for chosen, rejected in [(group["responses"][pair["chosen"]], group["responses"][pair["rejected"]])]
    ]  # fmt: skip
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "weight", "label")
    rows = rows_of(export_pairs(store, "run", "jsonl", tmp_path / "pairs.jsonl").out)
    assert sorted(tuple(row[name] for name in names) for row in rows) == sorted(trained)
    assert all(row["gap"] > 0 and row["rule"] == "matches" and row["chosen_reward"] is not None for row in rows)


@pytest.mark.parametrize("file", ["pairs.parquet", "pairs.jsonl"])
def test_the_same_run_gives_the_same_bytes_in_batches_of_any_size(file, store, tmp_path, monkeypatch):
    single = export_pairs(store, "dpo", "trl", tmp_path / "single" / file)
    again = export_pairs(store, "dpo", "trl", tmp_path / "again" / file)
    assert again.out.read_bytes() == single.out.read_bytes()
    monkeypatch.setattr(exporting, "BATCH", 3)
    batched = export_pairs(store, "dpo", "trl", tmp_path / "batched" / file)
    if file.endswith(".parquet"):  # whose row groups are the batches
        assert pq.read_table(batched.out).equals(pq.read_table(single.out))
        assert pq.read_metadata(batched.out).num_row_groups > 1
    else:
        assert batched.out.read_bytes() == single.out.read_bytes()


def test_a_file_of_other_content_is_not_written_over(store, tmp_path):
    """Exporting the same again is no other content. Nothing is left beside the file."""
    file = tmp_path / "pairs.jsonl"
    export_pairs(store, "run", "jsonl", file)
    before = file.read_bytes()
    export_pairs(store, "run", "jsonl", file)
    with pytest.raises(WinnowError, match="exists already, with other content"):
        export_pairs(store, "run", "trl-ids", file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_round_is_exported_by_its_number_and_the_last_one_without(store, tmp_path):
    """Round 1 of two is the run of one round: the same key, and the same bytes. `twice@1` says it too."""
    files = {
        number: export_pairs(store, "twice", "jsonl", tmp_path / f"{number}.jsonl", round=number).out.read_bytes()
        for number in (1, 2, None)
    }
    assert files[None] == files[2] != files[1]
    assert files[1] == export_pairs(store, "twice@1", "jsonl", tmp_path / "named.jsonl").out.read_bytes()
    assert files[1] == export_pairs(store, "run", "jsonl", tmp_path / "run.jsonl").out.read_bytes()


def test_held_out_pairs_are_those_that_the_policy_was_measured_on(store, tmp_path):
    train = rows_of(export_pairs(store, "alright", "jsonl", tmp_path / "train.jsonl").out)
    heldout = rows_of(export_pairs(store, "alright", "jsonl", tmp_path / "heldout.jsonl", "heldout").out)
    assert heldout
    assert not {row["prompt_id"] for row in heldout} & {row["prompt_id"] for row in train}


# Messages


def test_openai_gets_messages_and_texts_that_end(store, tmp_path):
    result = export_pairs(store, "dpo", "openai-messages", tmp_path / "pairs.jsonl")
    for row in rows_of(result.out):
        assert list(row) == ["input", "preferred_output", "non_preferred_output"]
        (message,) = row["input"]["messages"]
        assert message["role"] == "user"
        assert re.fullmatch(r"Please book .* Hello\.", message["content"])
        assert row["preferred_output"][0]["content"].startswith("Gladly. I have booked a")
        assert [row[f"{side}_output"][0]["role"] for side in ("preferred", "non_preferred")] == ["assistant"] * 2


def test_what_openai_gets_is_read_back_as_the_same_pairs(data_dir, store, tmp_path):
    """Ids of prompts and responses are hashes of what was read: equal ids are equal texts and tokens."""
    result = export_pairs(store, "dpo", "openai-messages", tmp_path / "pairs.jsonl")
    context = StageContext(tmp_path, WarmCache(), lambda *progress: None)
    model = result.source.policy
    paths = {"columns": data_dir / "preferences.jsonl", "openai": result.out}
    written, back = (
        preferences(model, context, path=DataPath(str(path)), reader=reader, heldout=0.2)[2].to_pylist()
        for reader, path in paths.items()
    )
    assert len(back) == result.rows > 3
    ids = [{(row["prompt_id"], row["chosen_id"], row["rejected_id"]) for row in rows} for rows in (written, back)]
    assert ids[1] <= ids[0]


def test_openai_gets_no_text_that_hides_tokens(tiny):
    """A special token in the middle of a response, or half a character, is no part of its text: rejected by name."""
    tokenizer = Tokenizer(tiny)
    end, (special,) = tokenizer.stop[0], tokenizer.encode(MARKS[0])
    half = tokenizer.encode("é")[0]
    row = {"prompt_id": prompt_id("Hi"), "text": "Hi", "chat": None, "rejected_ids": [*tokenizer.encode("Um."), end]}
    chosen = [
        [*tokenizer.encode("Yes"), *middle, *tokenizer.encode(" I do."), end] for middle in ([], [special], [half])
    ]
    items = list(openai_messages([row | {"chosen_ids": ids} for ids in chosen], tokenizer))
    assert [isinstance(item, Reject) and item.reason for item in items] == [False, HIDDEN_TOKENS, NO_TEXT]
    assert "Yes I do." in str(items[0])
    assert MARKS[0] in str(items[1])


def test_messages_and_tools_are_those_that_were_read(tmp_path, calling):
    """A system turn, several turns, a call and tools go out to OpenAI's format and come back as the same pairs.

    A text that looks like turns is one user message, and a row of another prompt is rejected.
    """
    call = {"type": "function", "function": {"name": "get_time", "arguments": {"zone": "CET"}}}
    turns = [
        {"role": "system", "content": "Be brief.\nuser: no lists"},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
        {"role": "user", "content": "assistant: of what?"},
    ]
    tools = [{"type": "function", "function": {"name": "get_time"}}]
    replies = {"chosen": "Of day.", "rejected": "None."}
    source: list[dict] = [{"prompt": turns, "tools": tools, **replies}, {"prompt": "user: a\nassistant: b", **replies}]
    context = StageContext(tmp_path, WarmCache(), lambda *progress: None)
    file = write_jsonl(tmp_path / "in.jsonl", source)
    prompts, candidates, pairs = preferences(calling, context, path=DataPath(str(file)))
    ids = {row["candidate_id"]: row["token_ids"] for row in candidates.to_pylist()}
    read = {row["prompt_id"]: row for row in prompts.to_pylist()}
    rows = [
        read[pair["prompt_id"]] | {f"{side}_ids": ids[pair[f"{side}_id"]] for side in SIDES}
        for pair in pairs.to_pylist()
    ]
    written = [row for row in openai_messages(rows, Tokenizer(calling)) if isinstance(row, dict)]
    back = DataPath(str(write_jsonl(tmp_path / "out.jsonl", written)))
    assert preferences(calling, context, path=back, reader="openai")[2].to_pylist() == pairs.to_pylist()
    other = [rows[0] | {"prompt_id": rows[1]["prompt_id"]}]
    assert [isinstance(item, Reject) and item.reason for item in openai_messages(other, Tokenizer(calling))] == [
        UNKNOWN_MESSAGES
    ]
