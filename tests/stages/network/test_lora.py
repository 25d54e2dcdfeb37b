"""LoRA: what is trained beside frozen weights, saved, merged, and read by peft itself; and layers that run again."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline import AdapterPath, ModelPath
from pipeline.context import StageContext, WarmCache
from pipeline.costs import GIB, Device
from pipeline.resources import Resources
from pipeline.store.fingerprints import model_digest
from schemas import Model, WinnowError
from stages.model_config import ModelConfig
from stages.network.forward import (
    completion_logp,
    forward_rows,
    logp_of,
    response_means,
    share_prefixes,
    uses_shared_prefix,
)
from stages.network.load import checkpoint_layers, load_network, save_network
from stages.network.lora import add_adapter
from stages.network.memory import shape_of
from stages.network.models import model, reward_head, write_template_defaults, write_template_options
from stages.network.packing import PromptGroup
from stages.training.memory import network_need
from stages.training.objectives import objective
from stages.training.optimize import optimize
from tests.material import (
    bound,
    cache,
    interrupt_at,
    largest_difference,
    loss_of,
    random_rows,
    responses_of,
    table,
    term_of,
    train,
    weights_of,
)
from tests.stages.network.test_prefix_attention import (
    SHARING,
    assert_same_gradients,
    enlarged,
    gradients,
    padded_logp,
)
from tests.stages.ranking.test_reward_models import headed, scores
from tests.stages.training.test_checks import planned

RANK = 3
MERGED = dict(lora_r=RANK, merge_lora=True)


@pytest.fixture(scope="module")
def rows(sharp):
    return cache(sharp, random_rows())


def adapter(seed=0, targets=(), rank=RANK):
    """`load_network(adapt=...)`: a LoRA whose B is not 0, so that it says something."""

    def into(network):
        add_adapter(network, rank, None, list(targets), seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)

    return into


def logp(network, rows):
    return forward_rows(logp_of, network, responses_of(rows), "float32", 60)


@pytest.mark.parametrize("name", ["llama, tied", "gemma3", "phi, biased head"])
def test_a_prompt_is_shared_by_its_responses_with_adapters_in_every_layer(name):
    """Log-probs and the gradients of all A and B are those of plain rows, to 1e-5 relative; nothing else has one."""
    network = enlarged(SHARING[name]())
    adapter()(network)
    share_prefixes(network)
    assert uses_shared_prefix(network)
    groups = [
        PromptGroup([5, 9, 30, 7], [[11, 12], [20, 30, 40, 50, 7, 8, 9], [3]]),
        PromptGroup([6], [[4], [8, 8, 8, 60]]),
    ]
    packed, expected = completion_logp(network, groups, "float32")[0], padded_logp(network, groups)
    assert torch.allclose(packed, expected, rtol=1e-5, atol=1e-5)
    ours = gradients(network, packed)
    assert_same_gradients(ours, gradients(network, expected), 0.1)
    assert ours.keys() == {name for name, _ in network.named_parameters() if "lora_" in name}


def test_a_head_with_an_adapter_gets_padded_rows(sharp, rows, tmp_path):
    """It is more than a linear layer then; the numbers are still those of the merged network."""
    untied = load_network(sharp)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    init = save_network(untied, sharp, tmp_path / "untied")
    with pytest.warns(UserWarning, match="computes a prompt again.*its head is a Linear"):
        network = load_network(init, adapt=adapter(targets=["lm_head", "q_proj"]))
    assert not uses_shared_prefix(network)
    adapted = logp(network, rows)
    merged = load_network(save_network(network, init, tmp_path / "merged"))
    assert uses_shared_prefix(merged)
    assert adapted == pytest.approx(logp(merged, rows), rel=1e-4)


def test_what_is_saved_is_base_plus_ba_and_peft_reads_it_alike(sharp, rows, tmp_path):
    """DPO with a LoRA. Step 0: h = 0, so ln 2 from the cache of init. Only A and B move; W' = W + alpha / r B A.

    peft's own model, of init and the saved adapter, has the log-probs of the saved policy, and these moved.
    """
    trained, metrics, policy = train(sharp, rows, tmp_path, **MERGED, lora_alpha=5.0, learning_rate=1e-2, epochs=3)
    assert metrics[1, "loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[policy["steps"], "loss"] < 0.6
    saved = load_file(trained.folder / "adapter" / "adapter_model.safetensors")
    before, after = weights_of(sharp), weights_of(trained)
    assert policy["parameters"] == sum(value.numel() for value in before.values())
    changed = set()
    for name in after:
        layer = "base_model.model." + name.removesuffix("weight")
        if f"{layer}lora_A.weight" in saved:
            changed.add(name)
            change = saved[f"{layer}lora_B.weight"] @ saved[f"{layer}lora_A.weight"]
            assert torch.allclose(after[name], before[name] + 5.0 / RANK * change, rtol=1e-6, atol=1e-6)
            assert not torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name], before[name])
    assert len(changed) * 2 == len(saved) == 28
    peft = PeftModel.from_pretrained(load_network(sharp), str(trained.folder / "adapter"))
    by_peft = logp(peft.base_model.model, rows)
    assert by_peft == pytest.approx(logp(load_network(trained), rows), rel=1e-5)
    assert abs(by_peft - logp(load_network(sharp), rows)).max() > 0.1


def test_the_adapter_is_no_part_of_the_policy_and_its_bytes_are_the_runs(sharp, rows, tmp_path):
    """A subfolder changes no digest, is not carried on to what starts from the policy, and is the same each time."""
    one, two = (train(sharp, rows, tmp_path / name, **MERGED)[0] for name in "ab")
    files = [{file.name: file.read_bytes() for file in (run.folder / "adapter").iterdir()} for run in (one, two)]
    assert files[0] == files[1]
    assert sorted(files[0]) == ["adapter_config.json", "adapter_model.safetensors"]
    digest = model_digest(one.folder)
    shutil.rmtree(two.folder / "adapter")
    assert model_digest(two.folder) == digest
    again = save_network(load_network(one), one, tmp_path / "again")
    assert not (again.folder / "adapter").exists()
    other = train(sharp, rows, tmp_path / "c", **MERGED, seed=1)[0]
    assert largest_difference(weights_of(one), weights_of(other)) > 0


def test_an_interrupted_run_ends_as_if_it_had_not_been(sharp, rows, tmp_path):
    """Bit for bit; a checkpoint holds A, B and their moments, not the frozen weights."""
    options = dict(MERGED, epochs=3, checkpoint_every=2, lr_scheduler_type="cosine", weight_decay=0.1)
    straight, metrics, _ = train(sharp, rows, tmp_path / "straight", **options)
    with pytest.raises(KeyboardInterrupt):
        train(sharp, rows, tmp_path / "stopped", report_progress=interrupt_at(5), **options)
    checkpoints = [load_file(file) for file in tmp_path.glob("stopped/checkpoint/step-*/*.safetensors")]
    assert checkpoints
    assert all("lora_" in name for tensors in checkpoints for name in tensors)
    again, metrics_again, _ = train(sharp, rows, tmp_path / "stopped", **options)
    assert largest_difference(weights_of(again), weights_of(straight)) == 0
    assert metrics_again == metrics
    saved = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (again, straight)]
    assert largest_difference(*saved) == 0


# The adapter beside its base's weights


@pytest.fixture(scope="module")
def low(sharp, tmp_path_factory):
    """The sharp model as a folder of bfloat16, as most policies are."""
    folder = tmp_path_factory.mktemp("low") / "model"
    shutil.copytree(sharp.folder, folder)
    load_network(sharp).to(torch.bfloat16).save_pretrained(folder)
    return Model(folder, model_digest(folder))


@pytest.fixture(scope="module")
def low_rows(low):
    return cache(low, random_rows())


@pytest.fixture(scope="module")
def adapted(low, low_rows, tmp_path_factory):
    """A policy trained from `low` with a LoRA, whose folder has both."""
    folder = tmp_path_factory.mktemp("adapted")
    model, _, _ = train(low, low_rows, folder, lora_r=RANK, learning_rate=1e-2, epochs=3)
    return Model(model.folder, model_digest(model.folder))


def test_a_trained_adapter_stays_beside_the_weights_that_it_was_trained_from(low, low_rows, adapted):
    """Those are init's, byte for byte; transformers, peft and we read the policy alike; its digest has both."""
    (weights,) = low.folder.glob("*.safetensors")
    assert (adapted.folder / weights.name).read_bytes() == weights.read_bytes()
    by_transformers = AutoModelForCausalLM.from_pretrained(adapted.folder, dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(load_network(low), str(adapted.folder)).base_model.model
    ours = logp(load_network(adapted), low_rows)
    assert ours == pytest.approx(logp(by_transformers, low_rows), rel=1e-5)
    assert ours == pytest.approx(logp(by_peft, low_rows), rel=1e-5)
    assert abs(ours - logp(load_network(low), low_rows)).max() > 0.1
    assert AdapterPath(str(adapted.folder)).base == low.digest
    assert adapted.digest != low.digest


def test_an_adapter_goes_on_in_the_next_round(low, adapted, tmp_path):
    """It begins where the first ended, which `reference` reads, and moves; the base's weights are the first init's."""
    rows = cache(adapted, random_rows())
    again, metrics, _ = train(adapted, rows, tmp_path, lora_r=RANK, learning_rate=1e-2)
    assert metrics[1, "loss"] == pytest.approx(math.log(2), abs=1e-5)
    one, two = (load_file(model.folder / "adapter_model.safetensors") for model in (adapted, again))
    assert one.keys() == two.keys()
    assert largest_difference(one, two) > 1e-3
    assert AdapterPath(str(again.folder)).base == low.digest
    assert (again.folder / "model.safetensors").read_bytes() == (low.folder / "model.safetensors").read_bytes()


def test_all_weights_of_an_adapted_policy_can_be_trained(adapted, tmp_path):
    """It is merged in memory, and its folder is a plain one, without an adapter."""
    rows = cache(adapted, random_rows())
    model, metrics, policy = train(adapted, rows, tmp_path)
    assert metrics[1, "loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[policy["steps"], "saved/margin_kept"] == pytest.approx(1, abs=1e-3)
    assert not list(model.folder.glob("*adapter*"))
    assert not any("lora" in name for name in weights_of(model))


def test_an_adapter_that_is_trained_on_keeps_its_rank_scale_and_layers(adapted, tmp_path):
    rows = cache(adapted, random_rows())
    with pytest.raises(WinnowError) as caught:
        train(adapted, rows, tmp_path, lora_r=4, lora_alpha=6.5, lora_target_modules=["q_proj"])
    for fact in ("lora_r: 4", "rank 3", "lora_alpha: 6.5", "lora_target_modules", "merge_lora: true"):
        assert fact in str(caught.value)


def test_a_reward_model_starts_from_an_adapted_policy(adapted, ctx):
    """Its layers are the policy's with the adapter in them."""
    rows = [PromptGroup([5, 9, 30], [[7, 8]])]
    head = load_network(reward_head(adapted, ctx))
    ours, policys = (response_means(network, rows, "float32") for network in (head, load_network(adapted)))
    assert torch.allclose(ours, policys, rtol=1e-4, atol=1e-5)


@pytest.fixture
def peft_folder(sharp, tmp_path):
    """A LoRA that peft made and saved, with options that ours does not have: rsLoRA, another rank in one layer."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
        use_rslora=True, init_lora_weights=False, lora_dropout=0.3, task_type="CAUSAL_LM",
    )  # fmt: skip
    network = get_peft_model(load_network(sharp), config)
    network.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_policy_with_its_adapter_is_what_peft_says(sharp, rows, ctx, peft_folder):
    """Both together are the model: the log-probs of peft's own, from the store's plain folder."""
    merged = model(ctx, path=ModelPath(str(sharp.folder)), adapter=AdapterPath(str(peft_folder)))
    peft = PeftModel.from_pretrained(load_network(sharp), str(peft_folder)).eval()
    assert logp(load_network(merged), rows) == pytest.approx(logp(peft.base_model.model, rows), rel=1e-5)
    assert abs(logp(load_network(merged), rows) - logp(load_network(sharp), rows)).max() > 0.1
    assert not list(merged.folder.glob("*adapter*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_in_a_policy_of_bfloat16_is_merged_in_fp32(sharp, ctx, tmp_path, peft_folder, dtype):
    """Stored as merged, W + scale B A; with `save_dtype: bfloat16`, rounded once."""
    low = tmp_path / "low"
    shutil.copytree(sharp.folder, low)
    load_network(sharp).to(torch.bfloat16).save_pretrained(low)
    peft = PeftModel.from_pretrained(load_network(Model(low, "")), str(peft_folder)).merge_and_unload()
    expected = {name: value.to(getattr(torch, dtype)) for name, value in peft.state_dict().items()}
    paths = dict(path=ModelPath(str(low)), adapter=AdapterPath(str(peft_folder)))
    merged = weights_of(model(ctx, **paths, save_dtype=dtype))
    assert all(value.dtype is getattr(torch, dtype) for value in merged.values())
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())


def test_a_tokenizer_beside_the_adapter_is_the_policys(sharp, ctx, peft_folder):
    """The adapter was trained on its chat template; nothing of the base's stays."""
    for file in sharp.folder.glob("tokenizer*"):
        shutil.copy(file, peft_folder)
    (peft_folder / "chat_template.jinja").write_text("{{ bos_token }}other")
    merged = model(ctx, path=ModelPath(str(sharp.folder)), adapter=AdapterPath(str(peft_folder)))
    assert (merged.folder / "chat_template.jinja").read_text() == "{{ bos_token }}other"
    assert (merged.folder / "config.json").exists()


def test_adapters_that_cannot_be_merged_are_refused(sharp, ctx, peft_folder):
    """Another shape, a weight too few, one too many, a layer that is not there: by name, and no model is made."""
    weight = peft_folder / "adapter_model.safetensors"
    config = peft_folder / "adapter_config.json"
    tensors, options = load_file(weight), json.loads(config.read_text())
    first = next(name for name in tensors if "q_proj.lora_A" in name)
    extra = {first.replace("q_proj", "k_proj"): tensors[first].clone()}
    for changed, changed_options, message in [
        (
            tensors | {first: torch.zeros(4, 96)},
            {},
            r"q_proj.lora_A.weight is \[4, 96\], and its base takes \[4, \d+\]",
        ),
        ({name: value for name, value in tensors.items() if name != first}, {}, "it lacks .*q_proj.lora_A"),
        (tensors | extra, {}, "base does not take, .*k_proj"),
        (tensors, {"target_modules": ["c_attn"]}, "does not fit its base.*c_attn"),
    ]:
        save_file(changed, weight)
        config.write_text(json.dumps(options | changed_options))
        with pytest.raises(WinnowError, match=f"(?s)adapter: .*{message}"):
            model(ctx, path=ModelPath(str(sharp.folder)), adapter=AdapterPath(str(peft_folder)))


def test_an_adapter_of_a_shared_head_is_refused(sharp, ctx, tmp_path):
    """The head is the embedding: merged, the change would be in both, and the adapter knows it in one."""
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    with pytest.warns(UserWarning, match=r"tie|embedding"):
        get_peft_model(load_network(sharp), config).save_pretrained(tmp_path / "tied")
    with pytest.warns(UserWarning, match="tie"), pytest.raises(WinnowError, match=r"merged, its logits are off"):
        model(ctx, path=ModelPath(str(sharp.folder)), adapter=AdapterPath(str(tmp_path / "tied")))


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_of_another_depth_is_refused_as_far_as_it_can_be_known(sharp, ctx, tmp_path, peft_folder, layers):
    """Two layers' weights on a base of one are not taken; on one of three, a target by name lacks the third's."""
    config = json.loads((sharp.folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    other = tmp_path / "other"
    shutil.copytree(sharp.folder, other)
    AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(other)
    facts = {1: r"base does not take, .*layers\.1\..*", 3: r"it lacks .*layers\.2\..*"}
    with pytest.raises(WinnowError, match=rf"adapter: .*{facts[layers]}"):
        model(ctx, path=ModelPath(str(other)), adapter=AdapterPath(str(peft_folder)))


def test_an_adapter_of_ours_goes_on_the_policy_that_it_was_trained_from_alone(sharp, rows, ctx, data_dir, tmp_path):
    """Its config has that policy's digest: any other is refused when planned; on its own, it makes what its run made.

    peft reads and saves it again.
    """
    init = Model(sharp.folder, model_digest(sharp.folder))
    trained, _, _ = train(init, rows, tmp_path / "run", **MERGED, learning_rate=1e-2, reference="other")
    adapter = trained.folder / "adapter"
    with pytest.raises(WinnowError, match=f"sft: adapter: .*from the policy {init.digest[:12]}, and path holds"):
        planned(
            data_dir,
            tmp_path,
            {"sft": {"with": {"path": str(trained.folder), "adapter": str(adapter)}, "use": "model"}},
        )
    planned(data_dir, tmp_path, {"sft": {"with": {"path": str(sharp.folder), "adapter": str(adapter)}, "use": "model"}})
    merged = model(ctx, path=ModelPath(str(sharp.folder)), adapter=AdapterPath(str(adapter)))
    assert largest_difference(weights_of(merged), weights_of(trained)) == 0
    again = PeftModel.from_pretrained(load_network(sharp), str(adapter))
    again.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert AdapterPath(str(tmp_path / "again")).base == init.digest


def test_an_adapter_fits_the_copy_of_its_policy_with_other_chat_templates(sharp, rows, peft_folder, data_dir, tmp_path):
    """Such as `winnow model --to` writes: an adapter of one goes on the other, until the copy's weights change."""
    folder, copy = shutil.copytree(sharp.folder, tmp_path / "policy"), tmp_path / "copy"
    (folder / "chat_template.jinja").write_text("{% if mood is defined %}{{ mood }}{% endif %}")
    write_template_options(folder, None, {"mood": "calm"})
    policy = model_digest(folder)
    shutil.copytree(folder, copy)
    write_template_defaults(copy)
    assert model_digest(copy) != policy

    config = peft_folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": f"winnow:{policy}"}))
    step = {"sft": {"use": "model", "with": {"path": str(copy), "adapter": str(peft_folder)}}}
    planned(data_dir, tmp_path, step)
    trained, _, _ = train(Model(copy, "copy"), rows, tmp_path / "run", **MERGED, reference="other")
    assert AdapterPath(str(trained.folder / "adapter")).base == policy

    weights = load_file(copy / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(WinnowError, match=r"sft: adapter: .*from the policy"):
        planned(data_dir, tmp_path, step)


def test_folders_that_hold_no_lora_are_refused_when_the_recipe_is_read(data_dir, tmp_path, peft_folder):
    """A pickle, another kind of adapter, a folder of something else: with its path, before anything runs."""
    config, weight = peft_folder / "adapter_config.json", peft_folder / "adapter_model.safetensors"
    text, tensors = config.read_text(), weight.read_bytes()

    def assert_refused(*facts):
        steps = {"sft": {"use": "model", "with": {"path": str(peft_folder), "adapter": str(peft_folder)}}}
        with pytest.raises(WinnowError) as caught:
            planned(data_dir, tmp_path, steps)
        assert all(fact in str(caught.value) for fact in facts)

    config.write_text(text.replace('"LORA"', '"IA3"'))
    assert_refused("IA3", "LORA")
    for broken in (text[:-9], "[1]", ""):
        config.write_text(broken)
        assert_refused(str(config), "JSON object")
    config.write_text(text)
    for broken in (tensors[:-1], tensors[:40], b""):
        weight.write_bytes(broken)
        assert_refused(str(weight))
    weight.write_bytes(tensors)
    weight.rename(peft_folder / "adapter_model.bin")
    assert_refused("adapter_model.safetensors")


def test_layers_that_cannot_be_adapted_are_refused(sharp, rows, tmp_path):
    """All at once: a typing error with the name that was meant, a head that is the embedding."""
    with pytest.raises(WinnowError) as caught:
        train(sharp, rows, tmp_path, lora_r=RANK, lora_target_modules=["v_proj", "q_porj", "lm_head"])
    for fact in (
        "no linear layer is named 'q_porj'; did you mean 'q_proj'",
        "lm_head shares its weights with the embed",
    ):
        assert f"optimize.lora_target_modules: {fact}" in str(caught.value)


@pytest.mark.parametrize("merge", [True, False])
def test_a_reward_models_score_is_trained_in_full(tiny, tmp_path, merge):
    """It starts at 0 and is new: it is saved in the adapter beside A and B, and peft loads it."""
    init = headed(tiny, tmp_path / "head")
    rows = random_rows()
    trained, metrics, policy = train(
        init, rows, tmp_path, objective="sigmoid", lora_r=RANK, learning_rate=1e-2, epochs=4, merge_lora=merge
    )
    assert metrics[policy["steps"], "loss"] < metrics[1, "loss"]
    adapter = trained.folder / "adapter" if merge else trained.folder
    assert "base_model.model.score.weight" in load_file(adapter / "adapter_model.safetensors")
    peft = PeftModel.from_pretrained(load_network(init), str(adapter))
    ours, by_peft = (scores(network, responses_of(rows)) for network in (load_network(trained), peft.base_model.model))
    assert ours == pytest.approx(by_peft, rel=1e-5)
    assert max(map(abs, ours)) > 0.01


def test_only_the_layers_that_are_named_are_trained(sharp, rows, tmp_path):
    trained, _, _ = train(sharp, rows, tmp_path, **MERGED, lora_target_modules=["v_proj", "mlp.up_proj"])
    before = weights_of(sharp)
    moved = {name for name, value in weights_of(trained).items() if not torch.equal(value, before[name])}
    assert moved == {f"model.layers.{n}.{of}.weight" for n in (0, 1) for of in ("self_attn.v_proj", "mlp.up_proj")}


def metrics_gradients_and_stored_bytes(network, term):
    """Loss metrics, gradients, and bytes of activations that autograd stores for the backward pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    stored = {}

    def store(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        loss, metrics = loss_of(term, network)
    loss.backward()
    grads = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    return metrics, grads, sum(size for address, size in stored.items() if address not in weights)


def test_layers_that_run_again_give_the_same_gradients(sharp, rows):
    """Bit for bit, with groups in one forward pass and in several; and less is stored for the backward pass."""
    for adapt, tokens_per_pass in [(None, 100), (adapter(), 15)]:
        term = term_of(sharp, rows, "sigmoid_norm", tokens_per_pass=tokens_per_pass)
        plain, checkpointed = (load_network(sharp, train=True, adapt=adapt) for _ in range(2))
        checkpoint_layers(checkpointed)
        metrics, grads, size = metrics_gradients_and_stored_bytes(plain, term)
        metrics_again, grads_again, size_again = metrics_gradients_and_stored_bytes(checkpointed, term)
        assert metrics_again == metrics
        assert grads_again.keys() == grads.keys()
        assert all(torch.equal(grads_again[name], value) for name, value in grads.items())
        assert size_again < size / 2


def test_gradient_checkpointing_is_no_part_of_the_result(sharp, rows, data_dir, tmp_path):
    """The same weights, and the same key: it says how, not what."""
    runs, keys = [], []
    for way in (False, True, "auto"):
        runs.append(train(sharp, rows, tmp_path / str(way), gradient_checkpointing=way, epochs=2)[0])
        plan = planned(data_dir, tmp_path, {"optimize": {"with": {"gradient_checkpointing": way}}})
        keys.append([step.key for step in plan.steps])
    assert largest_difference(weights_of(runs[0]), weights_of(runs[1])) == 0
    assert keys[0] == keys[1] == keys[2]


def test_layers_run_again_by_themselves_where_memory_is_short(sharp, rows, tmp_path):
    """gradient_checkpointing: auto, by the memory that a profile gives the worker; the weights are the same."""
    shape = shape_of(ModelConfig(sharp.folder))
    options = {
        "tokens_per_pass": 60,
        "world_size": 1,
        "lora_r": 0,
        "dtype": "float32",
        "gradient_checkpointing": "auto",
    }
    without = network_need(shape, options, Device()).total
    weights, ways = [], []
    for gib in (None, 2 * without / GIB, without / GIB):
        ctx = StageContext(tmp_path / str(gib), WarmCache(), lambda *progress: None, Resources(memory=gib))
        need = network_need(shape, options, Device("cpu", gib and gib * GIB))
        assert ("auto is on" in need.note) == (gib == without / GIB)
        trained, _, _, speeds = optimize(
            sharp, table(rows), ctx, objective=bound(objective, "sigmoid_norm"), learning_rate=1e-3, tokens_per_pass=60
        )
        ways.append({row["value"] for row in speeds.to_pylist() if row["measure"] == "gradient_checkpointing"})
        weights.append(weights_of(trained))
    assert ways == [{0.0}, {0.0}, {1.0}]
    assert largest_difference(weights[0], weights[2]) == 0
