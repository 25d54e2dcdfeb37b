"""Trained models of a run: where they are, a copy with a card that says what the run knows, and the way to the hub."""

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jobs import queries
from jobs.resume import hint
from pipeline.config.rounds import split_round
from pipeline.registry import nearest
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.fingerprints import CARD
from pipeline.store.hub import is_hub_name
from pipeline.store.storage import Location, read
from pipeline.store.store import Json, Store, model_name
from schemas import WinnowError
from stages.data.chat_templates import TODAY, chat_templates, variables
from stages.data.texts import TEMPLATE_OPTIONS
from stages.network.card import read_metadata, write_card
from stages.network.models import write_template_defaults
from stages.training.card import markdown_table

POLICY = "optimize"  # the step that every shipped recipe ends its training with
POLICY_INPUTS = ("init", "policy", "reference")  # of steps: models that read what the policy reads
COSTS = ("run", "seconds", "own_seconds")  # columns of the leaderboard that say nothing about the model


@dataclass(frozen=True)
class RunModel:
    """Finished model of a run's step."""

    store: Store
    run: str
    step: str
    manifest: Json

    @property
    def round(self) -> int | None:
        return split_round(self.step)[1]

    @property
    def label(self) -> str:
        """Return the run's name, with the round if it has any, as the leaderboard writes it."""
        return self.run if self.round is None else f"{self.run}@{self.round}"

    @property
    def location(self) -> Location:
        """Return the model's folder in the store."""
        folder = self.store.at(self.manifest["stage"], self.manifest["key"]).path
        return folder / ("model" if isinstance(folder, Path) else model_name(self.manifest["model"]))

    @property
    def folder(self) -> Path:
        """Return the model's folder on this machine, of an object store a copy."""
        return self.store.at(self.manifest["stage"], self.manifest["key"]).model().folder


def find_model(store: Store, run: str, step: str | None = None) -> RunModel:
    """Return the policy of a run (`raft`), of one of its rounds (`raft@1`), or the model of another step.

    Without a round it is that of the last one that is finished. Raise WinnowError for an unknown run, round or step,
    and for a model that is not there yet.
    """
    runs = store.runs()
    name, number = (run, None) if run in runs else split_round(run)
    if name not in runs:
        raise WinnowError(f"no run {run!r} in {store.root}; {nearest(name, list(runs))}")
    links = runs[name]
    manifests = {item: store.at(link["stage"], link["key"]).manifest for item, link in links.items()}
    models = {item: manifest for item, manifest in manifests.items() if manifest and manifest["model"]}
    if step is None:
        rounds = {split_round(item)[1]: item for item in links if split_round(item)[0] == POLICY}
        if not rounds:
            hint = f"--step {' or --step '.join(models)} is one of its models" if models else "it has no model yet"
            raise WinnowError(f"run {name}: no step {POLICY}, so it trains no policy of that name; {hint}")
        if number is not None and number not in rounds:
            listed = ", ".join(f"{name}@{n}" for n in sorted(n for n in rounds if n))
            raise WinnowError(f"run {name}: no round {number}; {f'it has {listed}' if listed else 'it has no rounds'}")
        finished = [n for n in rounds if rounds[n] in models]
        step = rounds[number] if number is not None else rounds[max(finished or rounds, key=lambda n: n or 0)]
    elif number is not None and split_round(step)[1] not in (None, number):
        raise WinnowError(f"{run} --step {step}: these are two rounds; omit the one in the name of the run")
    elif step not in links:
        raise WinnowError(f"run {name}: no step {step!r}; {nearest(step, list(models))}")
    if step not in models:
        state = "makes no model" if manifests[step] else "is not finished; the same winnow run continues with it"
        raise WinnowError(f"run {name}: step {step} {state}")
    return RunModel(store, name, step, models[step])


def copy_model(model: RunModel, folder: Path, link: bool = False) -> None:
    """Copy a model to a new folder, with a card that also says what its run knows: data, evaluation, versions.

    Its chat templates have as defaults what the store's read from Winnow (`chat_template_kwargs`, `date`), so that
    plain transformers and vLLM render prompts as they were in training. With `link`, weights are hard links to the
    store's where the file system has them. Raise WinnowError for a folder that holds anything.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WinnowError(f"--to {folder}: exists, and is not an empty folder; give a new one")

    def link_or_copy(source: str, target: str) -> None:
        if link and source.endswith(".safetensors"):
            try:
                os.link(source, target)
                return
            except OSError:  # another disk
                pass
        shutil.copyfile(source, target)

    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model.folder, folder, copy_function=link_or_copy, dirs_exist_ok=True)
    write_template_defaults(folder)
    _add_to_card(model, folder)


def rendering(model: RunModel, copy: Path | None = None) -> list[str]:
    """Return sentences on how a model's prompts were rendered, if not by the messages and its own template alone.

    copy: the folder that `copy_model` wrote, whose chat templates have the defaults; without it, the store's.
    """
    sentences, steps_by_system_prompt = [], dict[str, list[str]]()
    for step, manifest in _steps_behind(model, with_rankers=False):
        if manifest["stage"] == "model" and (file := manifest.get("sources", {}).get("chat_template")):
            sentences.append(f"The folder has the chat template {file}, by option `chat_template` of step {step}.")
        if text := manifest["identity"]["options"].get("system_prompt"):
            steps_by_system_prompt.setdefault(text, []).append(step)

    config = model.location / "tokenizer_config.json"
    options = json.loads(read(config)).get(TEMPLATE_OPTIONS) if config.exists() else None
    values, day = ((options or {}).get(name) for name in ("chat_template_kwargs", "date"))
    is_policy = split_round(model.step)[0] == POLICY
    words = ["model", *((model.label,) if is_policy else (model.run, "--step", model.step)), "--to", "FOLDER"]
    command = hint(*words, "--store", str(model.store.root))

    def sentence(rendered_with: str, cure: str, *, is_default: bool) -> str:
        if copy is None:
            support = (
                f"does not know: {cure}; or use the copy that `{command}` writes, whose chat template has it as default"
            )
        elif is_default:
            support = f"has as default. With another template: {cure}"
        else:
            support = f"cannot have as default, since it computes the pattern of the date: {cure}"
        return f"Prompts were rendered with {rendered_with}, which this folder's chat template {support}."

    if values:
        written = json.dumps(values, ensure_ascii=False)
        keywords = ", ".join(f"{name}={value!r}" for name, value in values.items())
        server = f"`vllm serve --default-chat-template-kwargs {shlex.quote(written)}`"
        cure = f"`apply_chat_template(messages, {keywords})` in transformers, {server}"
        sentences.append(sentence(f"chat_template_kwargs {written}", cure, is_default=True))
    if day:
        call = f"datetime.date({', '.join(str(int(part)) for part in day.split('-'))}).strftime"
        cure = f"`apply_chat_template(messages, strftime_now={call})` in transformers"
        asks = copy is not None and any(TODAY in variables(text) for text in chat_templates(copy).values())
        sentences.append(sentence(f"the date {day}", cure, is_default=not asks))
    for text, steps in steps_by_system_prompt.items():
        message = json.dumps({"role": "system", "content": text}, ensure_ascii=False)
        sentences.append(
            f"Prompts without a system message were given one by option `system_prompt` of step {', '.join(steps)}, "
            f"which no chat template adds: begin your messages with {message}."
        )
    return sentences


def push_model(model: RunModel, name: str, public: bool = False) -> str:
    """Upload a model with its card to the hub as `org/name`, private unless `public`; return its address.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`. Raise WinnowError for what the hub refuses.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    if not is_hub_name(name):
        raise WinnowError(f"--push {name}: must be org/name, or your user's name for org")
    api = HfApi()
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        with TemporaryDirectory(prefix="winnow-") as scratch:
            copy_model(model, Path(scratch) / "model", link=True)
            message = f"Policy of run {model.run}, step {model.step}"
            api.upload_folder(repo_id=url.repo_id, folder_path=Path(scratch) / "model", commit_message=message)
    except OfflineModeIsEnabled:
        raise WinnowError(f"--push {name}: HF_HUB_OFFLINE is set; unset it") from None
    except (httpx2.HTTPError, HFValidationError) as error:
        login = "; log in with `hf auth login`, or set HF_TOKEN" if "401" in str(error) or "403" in str(error) else ""
        raise WinnowError(f"--push {name}: {' '.join(str(error).split())}{login}") from None
    return str(url)


def _add_to_card(model: RunModel, folder: Path) -> None:
    """Add to the card of the training what the run knows of it now."""
    metadata = read_metadata(folder)
    card = folder / CARD
    text = card.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")[2] if card.is_file() else ""
    label = model.label
    data, datasets = [], []
    for step, manifest in _steps_behind(model, with_rankers=True):
        if manifest["rows"] and (source := _data_read(manifest)):
            rows = ", ".join(f"{count:,} {table}" for table, count in manifest["rows"].items() if table != "rejects")
            data.append((step, manifest["stage"], source, rows))
            datasets += [name] if (name := manifest["identity"]["options"].get("dataset")) else []
    if datasets:
        metadata["datasets"] = sorted(set(datasets))

    catalog = open_catalog(model.store, model.run)
    leaderboard = query(catalog, queries.text("leaderboard")).to_pylist()
    figures = [
        (name, str(value))
        for row in leaderboard
        if row["run"] == label
        for name, value in row.items()
        if name not in COSTS and value is not None
    ]
    lines = ["", f"## Run {label}", ""]
    lines.append(f"Step `{model.step}`, key {model.manifest['key']}, commit {model.manifest['commit'] or 'unknown'}.")
    if sentences := rendering(model, folder):
        lines += ["", "## Chat template", ""]
        lines += [f"- {sentence}" for sentence in sentences]
    if data:
        lines += ["", "## Data of the run", "", *markdown_table(("step", "stage", "source", "rows"), data)]
    if figures:
        about = "Against the SFT policy's responses on held-out prompts, with 95 % intervals."
        lines += ["", "## Evaluation", "", about, "", *markdown_table(("figure", "value"), figures)]
    card.unlink(missing_ok=True)
    write_card(folder, f"\n{text.strip()}\n" + "\n".join(lines) + "\n", metadata)


def _steps_behind(model: RunModel, *, with_rankers: bool) -> list[tuple[str, Json]]:
    """Return the name and manifest of the model's step and of each step behind it, the nearest first.

    Without rankers, of other models only those that were to be trained on, to draw from, or the reference.
    """
    links = model.store.run(model.run)
    names = {link["key"]: step for step, link in links.items()}
    steps = [(model.step, model.manifest)]
    for _, manifest in steps:
        for name, key in manifest["identity"]["inputs"].items():
            if key not in names or key in [source["key"] for _, source in steps]:
                continue
            source = model.store.at(links[names[key]]["stage"], key).manifest
            if source and (with_rankers or not source["model"] or name in POLICY_INPUTS):
                steps.append((names[key], source))
    return steps


def _data_read(manifest: Json) -> str:
    """Return what a step read: names of files, with the beginning of their digests, or a data set and its revision."""
    options: dict[str, Any] = manifest["identity"]["options"]
    files = [
        f"{name} ({options[option]['content'][:12]})"
        for option, name in manifest.get("sources", {}).items()
        if isinstance(options.get(option), dict)
    ]
    dataset = [f"{options['dataset']}@{options['revision']}"] if options.get("dataset") else []
    return ", ".join([*files, *dataset])
