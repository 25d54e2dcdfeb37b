"""Trace of one prompt through a run: its rows of every table, in the order of the stages."""

from rich.console import Console

from jobs.console import as_table
from pipeline.sql.catalog import open_catalog, query
from pipeline.sql.views import sql_literal
from pipeline.store.store import Store
from schemas import WinnowError

# Title and query of each section, in the order of the stages; sections without rows are not printed.
SECTIONS = (
    ("sampled: best, middle and worst by reward",
     "SELECT candidate_id, k, round(reward, 3) AS reward, n_tokens, finish_reason, text FROM candidates "
     "JOIN rewards USING (prompt_id, candidate_id) WHERE {where} QUALIFY "
     "row_number() OVER (ORDER BY reward DESC) IN (1, 2, 3, count(*) OVER () // 2, count(*) OVER ()) "
     "ORDER BY reward DESC"),
    ("selected, in order of acceptance",
     "SELECT draw, round AS pass, candidate_id, round(reward, 3) AS reward, round(acceptance, 3) AS acceptance, "
     "round(ess, 1) AS ess, any_value(text) AS text FROM selections JOIN candidates USING (prompt_id, candidate_id) "
     "WHERE {where} GROUP BY ALL ORDER BY draw"),
    ("compared by the ranker",
     "SELECT round, left_id, right_id, round(logit, 3) AS logit FROM comparisons WHERE {where} ORDER BY ALL"),
    ("pairs",
     "SELECT rule, chosen_id, rejected_id, round(gap, 3) AS gap FROM pairs WHERE {where} ORDER BY gap DESC"),
    ("reference log-probs",
     "SELECT candidate_id, round(logp, 3) AS logp, n_tokens, dtype, left(model, 12) AS model FROM reference "
     "WHERE {where} ORDER BY logp DESC"),
    ("training example",
     "SELECT len(prompt_ids) AS prompt_tokens, len(responses) AS responses, len(pairs) AS pairs FROM examples "
     "WHERE {where}"),
    ("held-out prompt: the policy compared with the baseline",
     "SELECT k, proxy_win, gold_win, round(gold, 2) AS gold, round(gold_baseline, 2) AS gold_baseline, "
     "round(kl, 2) AS kl, any_value(text) AS text FROM outcomes JOIN candidates USING (prompt_id, candidate_id, k) "
     "WHERE {where} GROUP BY ALL ORDER BY k"),
    ("rejected",
     "SELECT stage, reason, candidate_id, place, detail FROM rejects WHERE {where} ORDER BY ALL"),
)  # fmt: skip


def trace_prompt(store: Store, run: str, prefix: str, console: Console, round: int | None = None) -> None:
    """Print the prompt whose id begins with `prefix`; without a prefix, the first prompt that reached the last stage.

    In one round, by default the last, where the run has rounds. Raises WinnowError if no prompt of the run, or more
    than one, has an id that begins with `prefix`.
    """
    if not all(letter in "0123456789abcdef" for letter in prefix):
        raise WinnowError(f"prompt id {prefix!r}: ids are hexadecimal digits")
    all_rounds = open_catalog(store, run)
    if not round:  # the last round with a finished step
        (row,) = query(all_rounds, "SELECT max(round) AS last FROM runs JOIN steps USING (stage, key)").to_pylist()
        round = row["last"]
    catalog = all_rounds.for_run(run, round)

    prompts = query(
        catalog,
        f"SELECT DISTINCT prompt_id, text, split, len(token_ids) AS tokens, "
        f"prompt_id IN (SELECT prompt_id FROM rewards) AS scored, prompt_id IN (SELECT prompt_id FROM pairs) AS paired "
        f"FROM prompts WHERE starts_with(prompt_id, '{prefix}') AND prompt_id IN (SELECT prompt_id FROM candidates) "
        f"ORDER BY scored DESC, paired DESC, prompt_id",
    ).to_pylist()
    if not prompts:
        raise WinnowError(f"run {run}: no prompt id begins with {prefix!r}; omit it to see the first prompt")
    if prefix and len(prompts) > 1:
        raise WinnowError(f"run {run}: {len(prompts)} prompt ids begin with {prefix!r}; add digits")

    prompt = prompts[0]
    about = f"{prompt['split']}, {prompt['tokens']} tokens" + (f", round {round}" if round else "")
    console.print(f"[bold]{prompt['prompt_id']}[/] ({about})", highlight=False)
    console.print(prompt["text"], markup=False, highlight=False)
    for title, sql in SECTIONS:
        rows = query(catalog, sql.format(where=f"prompt_id = {sql_literal(prompt['prompt_id'])}"))
        if rows.num_rows:
            console.print(as_table(rows, title))
