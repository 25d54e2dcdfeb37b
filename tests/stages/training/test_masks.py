"""Log-probs, losses and features of responses of several turns: sums over what the assistant wrote alone."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import logsigmoid

from schemas import WinnowError, token_digest
from schemas.tables import CANDIDATES, PROMPTS
from stages.data.rows import imported_candidate
from stages.head.features import features
from stages.network.forward import completion_logp, forward_rows, logp_of, response_means
from stages.network.load import load_network
from stages.network.packing import PromptGroup
from stages.sampling.pool import mismatch
from stages.training.examples import examples
from stages.training.reference import reference
from tests.material import context, imitate, labelled, loss_of, random_rows, term_of, train

CLOSE = 2e-5


def masked_rows(seed=0, prompts=6):
    """Return rows of `examples` in which about half of the responses have a mask, never an empty one."""
    rng = np.random.default_rng(seed)
    rows = random_rows(seed, prompts)
    for row in rows:
        for n, response in enumerate(row["responses"]):
            mask = rng.random(len(response["token_ids"])) < 0.6
            mask[rng.integers(len(mask))] = True
            response["mask"] = mask.tolist() if n % 2 == 0 else None
    return rows


def naive_logp(network, prompt, ids, mask):
    """Return the sum of log p(token | all before) over the tokens of the mask: one row, transformers' own forward."""
    logits = network(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].float().log_softmax(-1)
    terms = [logits[len(prompt) + n - 1, token] for n, token in enumerate(ids) if mask is None or mask[n]]
    return torch.stack(terms).sum()


def responses_of(rows):
    return [(row["prompt_ids"], r["token_ids"], r["mask"]) for row in rows for r in row["responses"]]


@pytest.mark.parametrize("shared", [True, False])
def test_a_log_prob_is_the_sum_over_the_mask(sharp, shared):
    """Each prompt once for all of its responses, and padded; equal ids with other masks stay apart."""
    network = load_network(sharp)
    if not shared:
        network.set_attn_implementation("sdpa")
    rows = masked_rows()
    ids = rows[0]["responses"][0]["token_ids"]
    rows[0]["responses"].append(dict(rows[0]["responses"][0], mask=[n == 0 for n in range(len(ids))]))
    groups = [
        PromptGroup(
            row["prompt_ids"],
            [r["token_ids"] for r in row["responses"]],
            masks=[r["mask"] for r in row["responses"]],
        )
        for row in rows
    ]
    with torch.inference_mode():
        ours, _ = completion_logp(network, groups, "float32")
        expected = [float(naive_logp(network, *response)) for response in responses_of(rows)]
    assert ours.tolist() == pytest.approx(expected, abs=CLOSE, rel=CLOSE)
    by_rows = forward_rows(logp_of, network, responses_of(rows), "float32", 50)
    assert by_rows.tolist() == pytest.approx(expected, abs=CLOSE, rel=CLOSE)


@pytest.mark.parametrize("budget", [60, 10_000])
@pytest.mark.parametrize("name", ["sigmoid_norm", "length_normalized_dpo"])
def test_loss_and_gradient_are_those_of_plain_computation(sharp, name, budget):
    """DPO, summed and per token that counts; with the likelihood of the chosen added, per token that counts."""
    rows = imitate(masked_rows(), 0)
    network = load_network(sharp)
    with torch.no_grad():
        for row in rows:
            for response in row["responses"]:
                logp = naive_logp(network, row["prompt_ids"], response["token_ids"], response["mask"])
                response["ref_logp"] = float(np.float32(logp)) - 0.5
            row |= {"ref_model": sharp.digest, "ref_dtype": "float32"}
    term = term_of(sharp, rows, name, beta=0.3, nll_weight=0.2, tokens_per_pass=budget)
    loss, means = loss_of(term, network)
    loss.backward()
    ours = {key: weight.grad.clone() for key, weight in network.named_parameters()}
    network.zero_grad()

    margins, likelihood, tokens = [], [], 0
    for row in rows:
        logp = [naive_logp(network, row["prompt_ids"], r["token_ids"], r["mask"]) for r in row["responses"]]
        counts = [len(r["token_ids"]) if r["mask"] is None else sum(r["mask"]) for r in row["responses"]]
        ratio = [
            (value - r["ref_logp"]) / (count if name == "length_normalized_dpo" else 1)
            for value, r, count in zip(logp, row["responses"], counts, strict=True)
        ]
        margins += [ratio[pair["chosen"]] - ratio[pair["rejected"]] for pair in row["pairs"]]
        likelihood.append(logp[0])
        tokens += counts[0]
    expected = -logsigmoid(0.3 * torch.stack(margins)).mean() - 0.2 * torch.stack(likelihood).sum() / tokens
    expected.backward()
    value = float(expected.detach())
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    assert means["loss"] == pytest.approx(value, rel=1e-5)
    for key, weight in network.named_parameters():
        difference = (ours[key] - weight.grad).abs().max() / weight.grad.abs().max()
        assert float(difference) < 1e-4, (key, float(difference))


def tables_of(rows):
    """Return the tables `prompts` and `candidates` of such rows."""
    prompts = [
        {"prompt_id": row["prompt_id"], "text": "x", "token_ids": row["prompt_ids"], "split": "train"} for row in rows
    ]
    candidates = [
        imported_candidate(row["prompt_id"], r["token_ids"], "x", k=k, mask=r["mask"])
        for row in rows
        for k, r in enumerate(row["responses"])
    ]
    return pa.Table.from_pylist(prompts, PROMPTS), pa.Table.from_pylist(candidates, CANDIDATES)


def test_reference_and_examples_keep_the_mask_and_refuse_the_log_prob_of_another(sharp):
    rows = masked_rows()
    prompts, candidates = tables_of(rows)
    scores = reference(prompts, candidates, sharp, context())
    network = load_network(sharp)
    with torch.inference_mode():
        expected = [float(naive_logp(network, *response)) for response in responses_of(rows)]
    assert scores["logp"].to_pylist() == pytest.approx(expected, abs=CLOSE, rel=CLOSE)
    counts = [len(ids) if mask is None else sum(mask) for _, ids, mask in responses_of(rows)]
    assert scores["n_tokens"].to_pylist() == counts
    ids = candidates["candidate_id"].to_pylist()
    pair = {"prompt_id": "p0", "chosen_id": ids[0], "rejected_id": ids[1], "gap": None, "weight": 1.0, "rule": "label"}
    pairs = pa.Table.from_pylist([pair])
    (example,) = examples(prompts.slice(0, 1), context(), candidates, pairs, reference=scores).to_pylist()
    assert [r["mask"] for r in example["responses"]] == [rows[0]["responses"][n]["mask"] for n in (0, 1)]
    other = candidates.to_pylist()
    other[0]["mask"] = None
    other = pa.Table.from_pylist(other, CANDIDATES)
    with pytest.raises(WinnowError, match="mask"):
        examples(prompts.slice(0, 1), context(), other, pairs, reference=scores)
    assert token_digest([1], [2], [True]) != token_digest([1], [2], [False]) != token_digest([1], [2])


def test_training_ends_and_its_first_batch_agrees_with_the_cached_reference(sharp, tmp_path):
    """`optimize` compares the first batch's log-probs with the cached ones, row by row."""
    rows = masked_rows()
    network = load_network(sharp)
    with torch.no_grad():
        for row in rows:
            for response in row["responses"]:
                logp = naive_logp(network, row["prompt_ids"], response["token_ids"], response["mask"])
                response["ref_logp"] = float(np.float32(logp))
            row |= {"ref_model": sharp.digest, "ref_dtype": "float32"}
    _, metrics, _ = train(sharp, rows, tmp_path / "masked")
    assert metrics[1, "loss"] == pytest.approx(np.log(2), abs=1e-3)
    for row in rows:
        for response in row["responses"]:
            response["mask"] = None
    with pytest.raises(WinnowError, match="stale"):
        train(sharp, rows, tmp_path / "whole")


def test_kto_reads_the_masks_of_mismatched_responses(sharp):
    """The response of another prompt has the mask that it has there."""
    rows = masked_rows()
    prompts, candidates = tables_of(rows)
    other = mismatch(candidates, prompts, sharp, context()).to_pylist()
    masks = {tuple(ids): mask for _, ids, mask in responses_of(rows)}
    assert [row["mask"] for row in other] == [masks[tuple(row["token_ids"])] for row in other]
    rows = labelled(rows)
    for row in rows:
        for response in row["responses"]:
            response.setdefault("mask", None)
            if response["desirable"] == 0:
                response["mask"] = [True] + [False] * (len(response["token_ids"]) - 1)
            response["ref_logp"] = -1.0
        row |= {"ref_model": sharp.digest, "ref_dtype": "float32"}
    term, network = term_of(sharp, rows, "kto"), load_network(sharp)
    with torch.inference_mode():
        expected = [
            float(naive_logp(network, row["prompt_ids"], r["token_ids"], r["mask"])) + 1.0
            for row in rows
            for r in row["responses"]
            if r["desirable"] == 0
        ]
    assert float(term.kl_estimate(network, term.groups)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_features_are_means_over_the_mask(sharp):
    rows = masked_rows()
    prompts, candidates = tables_of(rows)
    vectors = features(prompts, candidates, sharp, context())["features"].to_pylist()
    network = load_network(sharp)
    for vector, (prompt, ids, mask) in zip(vectors, responses_of(rows), strict=True):
        with torch.inference_mode():
            states = network.base_model(input_ids=torch.tensor([[*prompt, *ids]])).last_hidden_state[0, len(prompt) :]
        expected = states if mask is None else states[torch.tensor(mask)]
        assert vector == pytest.approx(expected.mean(0).tolist(), abs=1e-4)
    n = next(n for n, (_, _, mask) in enumerate(responses_of(rows)) if mask and not all(mask))
    (whole,) = forward_rows(response_means, network, [responses_of(rows)[n][:2]], "float32", 100)
    assert np.abs(whole - np.array(vectors[n])).max() > 1e-3


def test_a_mask_that_fits_no_response_is_refused_before_training(sharp):
    for mask in ([True], [False] * 20):
        rows = masked_rows()
        rows[0]["responses"][0]["mask"] = mask[: len(rows[0]["responses"][0]["token_ids"])]
        with pytest.raises(WinnowError, match="mask"):
            term_of(sharp, rows, "hinge")
