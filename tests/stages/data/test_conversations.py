"""Messages and tools that users bring: rendered by the template, or rejected by name, never left out in silence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.store.fingerprints import DataPath
from schemas import Model, WinnowWarning, prompt_id, split_of
from stages.data.own_candidates import own_candidates
from stages.data.preferences import preferences
from stages.data.prompts import prompts
from stages.data.texts import Conversation
from stages.data.tokenizer import Tokenizer
from tests.conftest import write_jsonl
from tests.stages.data.test_files import jsonl, reasons
from tests.stages.data.test_templates import CALL, USER

TOOL = {"type": "function", "function": {"name": "get_time"}}
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Name a city that has a metro."}]
SAY = [{"role": "assistant", "content": "Rome."}]


def test_tools_and_calls_are_rendered_and_are_part_of_a_prompt(calling, ctx, tmp_path):
    """Prompts that differ in a call or in the tools have other ids and other tokens; a call can be the response."""
    chosen = [USER, CALL | {"content": "Let me look."}]
    rows = [
        {"prompt": [USER], "chosen": chosen, "rejected": "No idea.", "tools": [TOOL]},
        {"prompt": [USER], "chosen": chosen, "rejected": "No idea.", "tools": json.dumps([TOOL, TOOL])},
        {"prompt": [USER, CALL, {"role": "tool", "content": "12:00"}], "chosen": "Noon.", "rejected": "Midnight."},
    ]
    table, answers, pairs = preferences(calling, ctx, path=jsonl(tmp_path, rows))
    assert reasons(ctx) == []
    assert len(set(table["prompt_id"].to_pylist())) == len(set(table["rendered"].to_pylist())) == 3
    assert sum("get_time" in text for text in table["rendered"].to_pylist()) == 3
    called = [row for row in answers.to_pylist() if "get_time" in row["text"]]
    assert len(called) == len(pairs) - 1 == 2
    tokenizer = Tokenizer(calling)
    for row in called:
        assert tokenizer.rendered(row["token_ids"]).startswith("Let me look.[{")
    chat = [json.loads(chat) for chat in table["chat"].to_pylist()]
    assert sorted(len(item["tools"] or []) for item in chat) == [0, 1, 2]

    # From Parquet, where absent keys are null, with arguments as JSON, the same.
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    shapes = [call, call | {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}]
    for n, shape in enumerate(shapes):
        rows = [{"prompt": [USER | {"tool_calls": None}, shape, {"role": "tool", "content": "12"}]}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{n}.parquet")
    first, second = (prompts(calling, ctx, path=DataPath(str(tmp_path / f"{n}.parquet"))) for n in range(2))
    assert len(first) == 1
    assert first.equals(second)


def test_a_null_argument_of_a_call_stays_in_json_and_is_what_a_table_lacks(calling, ctx, tmp_path):
    """A table fills up the structs of a column with nulls; JSON says which keys are there, in tools too."""
    arguments = [{"city": "Rome", "unit": None}, {"city": "Oslo", "unit": "C"}]
    tool = TOOL | {"function": {"name": "get_time", "parameters": {"properties": {"unit": {"default": None}}}}}
    rows = [
        {
            "prompt": [
                USER,
                SAY[0] | {"tool_calls": [{"id": None, "function": {"name": "get_time", "arguments": item}}]},
                {"role": "tool", "content": "12"},
            ],
            "tools": [tool],
        }
        for item in arguments
    ]
    pq.write_table(pa.Table.from_pylist(rows[:1] + rows[1:]), tmp_path / "in.parquet")
    json_rows, table_rows = (
        " ".join(prompts(calling, ctx, path=path)["rendered"].to_pylist())
        for path in (jsonl(tmp_path, rows), DataPath(str(tmp_path / "in.parquet")))
    )
    assert '"unit": null' in json_rows
    assert '"default": null' in json_rows
    assert '"id"' not in json_rows
    assert "null" not in table_rows
    written = [{"prompt": [USER, json.loads(json.dumps(rows[0]["prompt"][1])), rows[0]["prompt"][2]]}]
    written[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments[0])
    (as_text,) = prompts(calling, ctx, path=jsonl(tmp_path, written))["rendered"].to_pylist()
    assert '"unit": null' in as_text


def test_what_the_template_does_not_render_is_rejected_by_name(tiny, ctx, tmp_path):
    """Tools, calls, reasoning, images, an unknown shape: each with a reason of its own."""
    image = {"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": "image"}]}
    rows = {
        "the chat template does not render tools": {"prompt": [USER], "tools": [TOOL]},
        "the chat template does not render tool_calls": {"prompt": [USER, CALL, {"role": "tool", "content": "12"}]},
        "the chat template does not render reasoning_content": {
            "prompt": [USER, SAY[0] | {"reasoning": "Hm."}, {"role": "user", "content": "Sure?"}]
        },
        "prompt has content of type image, and only text is read": {"prompt": [image]},
        "tool_calls is not a list of calls": {"prompt": [USER, SAY[0] | {"tool_calls": "7"}, USER]},
        "tools is not JSON": {"prompt": [USER], "tools": "get_time()"},
        "prompt ends with an assistant turn": {"prompt": [USER, SAY[0]]},
        "prompt is messages written as text that cannot be parsed": {"prompt": "[{'role': 'user' 'content': 'Hi'}]"},
    }
    table = prompts(tiny, ctx, path=jsonl(tmp_path, list(rows.values())))
    assert len(table) == 0
    assert reasons(ctx) == [(f"in.jsonl:{n}", reason) for n, reason in enumerate(rows, 1)]


def test_a_role_that_no_template_knows_is_warned_of_by_name(tiny, ctx, tmp_path):
    """It would be written as it stands; ShareGPT's own form, with `from`, is translated."""
    with pytest.warns(WinnowWarning, match="role 'human', .*write 'user'.*system, developer, user, assistant, tool"):
        prompts(tiny, ctx, path=jsonl(tmp_path, [{"prompt": [{"role": "human", "content": "Hi."}, *SAY, USER]}]))
    prompts(tiny, ctx, path=jsonl(tmp_path, [{"prompt": [{"from": "human", "value": "Hi."}]}]))


def test_parts_of_text_lists_written_as_text_and_columns_of_messages_are_messages(tiny, ctx, tmp_path):
    """One prompt in all of these shapes is one prompt."""
    pieces = [{"type": "text", "text": text} for text in ("Name a city ", "that has a metro.")]
    parts = [{"role": "user", "content": pieces}]
    columns = {"role": ["user"], "content": ["Name a city that has a metro."]}
    shapes = [ASK, parts, json.dumps(ASK), str(ASK), columns, [ASK[0] | {"tool_calls": None}], ASK[0]["content"]]
    with pytest.warns(WinnowWarning, match="written as text are parsed"):
        table = prompts(tiny, ctx, path=jsonl(tmp_path, [{"prompt": shape} for shape in shapes]))
    assert table["prompt_id"].to_pylist() == [prompt_id("Name a city that has a metro.")]
    assert {reason for _, reason in reasons(ctx)} == {"duplicate prompt"}
    with pytest.warns(WinnowWarning, match="keys of messages are not read: language"):
        prompts(tiny, ctx, path=jsonl(tmp_path, [{"prompt": [ASK[0] | {"language": "en"}]}]))


def test_tools_of_other_trainers_are_rendered_as_the_template_renders_them(calling, ctx, tmp_path):
    """Prompt and response are apply_chat_template of the conversation with its tools and calls, for every reader."""
    function: dict[str, Any] = {"name": "get_time", "arguments": {"zone": "CET"}}
    call, tools = {"type": "function", "function": function}, json.dumps([TOOL["function"]])
    expected = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    human, answer = {"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "No idea."}
    called = {"from": "function_call", "value": json.dumps(function)}
    openai_call = {"type": "function", "function": function | {"arguments": json.dumps(function["arguments"])}}

    def parts(role: str, kind: str, value: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": kind, "value": value}]}

    asked = parts("user", "text", USER["content"])
    rows = {
        "llama_factory_sharegpt": {"conversations": [human], "chosen": called, "rejected": answer, "tools": tools},
        "llama_factory_v1": {
            "chosen_messages": [asked, parts("assistant", "tool_call", json.dumps(function))],
            "rejected_messages": [asked, parts("assistant", "text", "No idea.")],
            "tools": tools,
        },
        "openai": {
            "input": {"messages": [USER], "tools": [TOOL]},
            "preferred_output": [{"role": "assistant", "tool_calls": [openai_call]}],
            "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
        },
        "llama_factory_alpaca": {
            "instruction": USER["content"], "chosen": "I will.", "rejected": "No idea.", "tools": tools
        },
        "llama_factory_kto_sharegpt": {"conversations": [human, called], "kto_tag": True, "tools": tools},
        "llama_factory_kto_alpaca": {
            "instruction": USER["content"], "output": "I will.", "kto_tag": True, "tools": tools
        },
    }  # fmt: skip
    tokenizer = Tokenizer(calling)
    for reader, row in rows.items():
        read = own_candidates if "kto" in reader else preferences
        table, answers, _ = read(calling, ctx, path=jsonl(tmp_path, [row]), reader=reader)
        assert reasons(ctx) == [], reader
        texts = {tokenizer.rendered(table["token_ids"][0].as_py() + ids) for ids in answers["token_ids"].to_pylist()}
        chat = [USER, {"role": "assistant", "content": "I will."}] if "alpaca" in reader else expected
        assert tokenizer.inner.apply_chat_template(chat, tools=[TOOL], tokenize=False) in texts, reader


def test_a_prompt_that_both_responses_repeat_is_taken_off_once(tiny, ctx, tmp_path):
    """As text and as messages; where one side does not repeat it, or it is a word or two, nothing is."""
    ask = str(ASK[0]["content"])
    rows = [
        {"prompt": ask, "chosen": f"{ask} Rome.", "rejected": f"{ask} None."},
        {"prompt": ASK, "chosen": ASK + SAY, "rejected": [*ASK, SAY[0] | {"content": "None."}]},
        {"prompt": "Hi", "chosen": "Hi there.", "rejected": "Hi you."},
        {"prompt": f"{ask}!", "chosen": f"{ask}! Rome.", "rejected": "No."},
    ]
    with pytest.warns(WinnowWarning, match="repeat the text of their prompt"):
        _, answers, _ = preferences(tiny, ctx, path=jsonl(tmp_path, rows))
    texts = sorted(answers["text"].to_pylist())
    assert texts == sorted(["Rome.", "None.", "Hi there.", "Hi you.", f"{ask}! Rome.", "No."])


def test_a_prefill_is_continued_if_asked_for(tiny, ctx, tmp_path):
    """prompt + response are the template's rendering of one assistant turn, which is not closed and opened again."""
    rows = [{"prompt": [USER, {"role": "assistant", "content": "It is"}], "response": " noon.", "reward": 1.0}]
    table, answers, _ = own_candidates(tiny, ctx, path=jsonl(tmp_path, rows), reward="reward", prefill="continue")
    tokenizer = Tokenizer(tiny)
    text = tokenizer.rendered(table["token_ids"][0].as_py() + answers["token_ids"][0].as_py())
    chat = [USER, {"role": "assistant", "content": "It is noon."}]
    assert text == tokenizer.inner.apply_chat_template(chat, tokenize=False)


def test_the_last_answer_of_data_for_sft_is_left_out_or_is_the_demonstration(tiny, ctx, tmp_path):
    """The prompt is that of a file without the answer, and its id too; what has no answer stays as it is."""
    answer = {"role": "assistant", "content": "It is noon."}
    system = {"role": "system", "content": "Be kind."}
    chats = [[USER, answer], [system, USER, {"role": "assistant", "content": "Where?"}, USER, answer]]
    bare = [chat[:-1] for chat in chats]
    expected = prompts(tiny, ctx, path=jsonl(tmp_path, [{"chat": chat} for chat in bare], "b.jsonl"), prompt="chat")
    file = jsonl(tmp_path, [{"messages": chat} for chat in [*chats, [answer]]])
    for demonstration in (None, "messages"):
        table = prompts(tiny, ctx, path=file, prompt="messages", prefill="omit", demonstration=demonstration)
        columns = ["prompt_id", "text", "chat", "token_ids", "split"]
        assert table.select(columns) == expected.select(columns)
        assert set(table["demonstration"].to_pylist()) == {demonstration and "It is noon."}
    assert [reason for _, reason in reasons(ctx)] == ["no turn before that of the assistant"] * 2
    file = jsonl(
        tmp_path, [{"messages": chats[0]}, {"messages": bare[1]}, {"messages": [USER, answer, answer]}], "m.jsonl"
    )
    table = prompts(tiny, ctx, path=file, prompt="messages", prefill="omit", demonstration="messages")
    assert table.select(columns) == expected.select(columns)
    assert sorted(table["demonstration"].to_pylist(), key=str) == ["It is noon.", None]
    last = ctx.rejects.to_pylist()[-2:]
    facts = ["does not end with an assistant turn, which", "two turns of the assistant follow each other"]
    assert all(fact in row["reason"] for fact, row in zip(facts, last, strict=True))
    assert all(USER["content"] in row["detail"] for row in last), "the whole row is shown"


def test_responses_that_are_too_long_are_rejected_unless_they_are_to_be_cut(tiny, ctx, tmp_path):
    """A cut response would be trained on with the reward of the whole, or with a preference for the whole."""
    long = "boat " * 30
    own = jsonl(tmp_path, [{"prompt": "a", "response": r, "reward": 1.0} for r in ("Yes.", long)], "own.jsonl")
    pairs = jsonl(tmp_path, [{"prompt": "a", "chosen": long, "rejected": "Yes."}])
    for cut, reason in (("reject", ["stop"]), ("cut", ["length", "stop"])):
        options: dict[str, Any] = dict(max_tokens=20, too_long=cut)
        answers = own_candidates(tiny, ctx, path=own, reward="reward", **options)[1]
        assert sorted(answers["finish_reason"].to_pylist()) == reason
        assert len(preferences(tiny, ctx, path=pairs, **options)[2]) == len(reason) - 1
    assert reasons(ctx) == [("own.jsonl:2", "response too long"), ("in.jsonl:1", "response too long")]


def test_a_response_of_any_length_is_cut_to_its_first_ids(tiny, ctx, tmp_path):
    """Tokenise no characters behind those that max_tokens could hold."""
    tables = []
    for words in (40, 10_000):
        path = jsonl(tmp_path, [{"prompt": "a", "response": "boat " * words, "reward": 1.0}])
        tables.append(own_candidates(tiny, ctx, path=path, reward="reward", max_tokens=20, too_long="cut")[1])
    ids, (long_ids,) = (table["token_ids"].to_pylist() for table in tables)
    assert (ids, len(long_ids), tables[1]["finish_reason"].to_pylist()) == ([long_ids], 20, ["length"])
    assert tables[1]["text"].to_pylist() == ["boat " * 10_000]


def test_a_response_whose_beginning_has_no_ids_is_not_cut_to_nothing(tiny, ctx, tmp_path):
    """A normaliser may leave out all characters that were read: the rest would have been a response."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "normalised"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    normalizer = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": normalizer}))
    path = jsonl(tmp_path, [{"prompt": "a", "response": f"{'~' * 10_000}boat", "reward": 1.0}])
    options = dict(path=path, reward="reward", max_tokens=20, too_long="cut")
    assert own_candidates(Model(folder, "normalised"), ctx, **options)[1].num_rows == 0
    assert ctx.rejects["reason"].to_pylist() == ["response too long"]


def test_no_space_is_added_between_prompt_and_response(tmp_path):
    """SentencePiece adds a space to a text: the ids of a response are those that follow the prompt's in both."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    corpus = ["Answer: Paris", "Answer:    return x", "The answer is Rome."] * 9
    fast.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"]))
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(Model(tmp_path, "metaspace"))
    for response in (" Paris", "    return x"):
        ids = tokenizer.prompt_ids("Answer:") + tokenizer.response_ids("Answer:", response)
        assert tokenizer.rendered(ids) == f"Answer:{response}</s>"
        assert ids[:-1] == tokenizer.encode(f"Answer:{response}")
    with pytest.raises(ValueError, match="do not begin with those of the prompt"):
        tokenizer.response_ids("Ans", "wer")


def test_near_copies_of_a_prompt_are_in_one_split():
    """Case and white space do not move a prompt across the split."""
    for n in range(50):
        text = f"Name {n} cities  of Italy"
        assert split_of(text, 0.5) == split_of(f" name {n}\nCITIES of italy ", 0.5)


def test_a_question_is_in_one_split_whatever_is_beside_it(tiny, ctx, tmp_path):
    """A system message, tools, and the form of one text: it is no test where it is trained on under another of them."""
    system = {"role": "system", "content": "Be kind."}
    splits = []
    besides: list[dict[str, Any]] = [{}, {"system": "Be brief."}, {"tools": []}]
    for n, beside in enumerate(besides):
        questions = [{"role": "user", "content": f"How many boats are there in bay {n}?"} for n in range(20)]
        rows = [{"prompt": [*[system] * (n == 2), question], **beside} for question in questions]
        path = DataPath(str(write_jsonl(tmp_path / f"{n}.jsonl", rows)))
        options: dict[str, Any] = {"system": "system"} if "system" in beside else {}
        table = prompts(tiny, ctx, path=path, heldout=0.5, **options).to_pylist()
        splits.append({row["text"].rpartition("user: ")[2]: row["split"] for row in table})
    assert splits[0] == splits[1] == splits[2]
    assert len({*splits[0].values()}) == 2
    assert len(splits[0]) == 20


def test_a_prompt_is_rendered_once_in_whatever_order_its_responses_stand(tiny, ctx, tmp_path, monkeypatch):
    """Two prompts of three responses each, in turn; a prompt that is refused is refused in every row."""
    rows = [{"prompt": prompt, "response": f"Yes {n}.", "reward": n} for n in range(3) for prompt in ("Hi", "Ho", " ")]
    rendered: list[Any] = []
    prompt_ids = Tokenizer._prompt_ids

    def count(tokenizer, conversation):
        rendered.append(conversation.content)
        return prompt_ids(tokenizer, conversation)

    monkeypatch.setattr(Tokenizer, "_prompt_ids", count)
    table, candidates, _ = own_candidates(tiny, ctx, path=jsonl(tmp_path, rows), reward="reward")
    assert (table.num_rows, candidates.num_rows, len(reasons(ctx))) == (2, 6, 3)
    assert sorted(item for item in rendered if item in ("Hi", "Ho")) == ["Hi", "Ho"]


@pytest.mark.parametrize("reply", ["Yes.", " Yes.\n\n", "\tYes", "é", "Yes <b>"])
def test_what_follows_the_split_point_of_a_prompt_has_the_ids_that_it_has_behind_it(tiny, reply):
    """So the texts of a prompt's responses are tokenised without it, whatever white space is around the split."""
    tokenizer = Tokenizer(tiny)
    for content in ("Name a city ", [*ASK, *SAY, *ASK]):
        conversation = Conversation(content)
        ids = tokenizer.prompt_ids(conversation)
        before, count = tokenizer.split_point(conversation, ids)
        text = tokenizer.response_text(conversation, reply)
        assert count == len(ids) - 1
        assert text.startswith(before)
        assert tokenizer.encode_all([text]) == [[*ids[:count], *tokenizer.encode(text[len(before) :])]]


def test_rejects_of_a_file_stand_in_its_order_whatever_found_them(tiny, ctx, tmp_path):
    """A line that is no JSON, a row without a reward, and a response that is too long."""
    path = tmp_path / "rows.jsonl"
    rows = [dict(prompt="Hi", response=text, reward=reward) for text, reward in (("a " * 90, 1), ("b", None), ("c", 2))]
    path.write_text("".join(f"{json.dumps(row)}\n{{\n" for row in rows))
    own_candidates(tiny, ctx, path=DataPath(str(path)), reward="reward", max_tokens=20)
    places = [row["place"] for row in ctx.rejects.to_pylist()]
    assert places == [f"rows.jsonl:{n}" for n in (1, 2, 3, 4, 6)]
