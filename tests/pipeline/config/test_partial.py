"""One step alone, with what follows or precedes it, or again; why two steps differ; how a failed run is resumed."""

import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from jobs.resume import command
from jobs.why import explain_difference
from pipeline.config.partial import Part, rerun
from pipeline.config.plan import Plan
from pipeline.store.storage import delete
from pipeline.store.store import Store
from schemas import MachineError, WinnowError
from schemas.tables import REWARDS, SELECTIONS
from tests.chain import Luck, Raced, make, planned, recipe, step, toys
from tests.runs import local


@pytest.fixture
def luck() -> Iterator[Luck]:
    with toys() as luck:
        yield luck


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def plan(tmp_path: Path, luck: Luck) -> Plan:
    return planned(recipe(tmp_path))


def rewards(store: Store, plan: Plan, name: str = "rate") -> list[float]:
    schema = REWARDS if name == "rate" else SELECTIONS
    return sorted(store.folder(step(plan, name)).read(schema).column("reward").to_pylist())


def test_only_runs_one_step_from_what_follows_and_until_what_it_needs(store: Store, plan: Plan):
    assert make(rerun([plan], store, Part(until="rate")).plans[0], store) == ["draw", "rate"]
    assert make(rerun([plan], store, Part(until="draw")).plans[0], store) == []
    rerun([plan], store, Part(force="draw")).delete()
    assert make(rerun([plan], store, Part(only="draw")).plans[0], store) == ["draw"]
    assert make(rerun([plan], store, Part(only="draw")).plans[0], store) == []
    assert make(rerun([plan], store, Part(from_step="rate")).plans[0], store) == ["rate", "keep"]
    assert set(store.runs()["toy"]) == {"draw", "rate", "keep"}, "the run is linked to all of its steps"


def test_what_a_part_reads_must_be_finished(store: Store, plan: Plan):
    for option in ("only", "from_step"):
        with pytest.raises(WinnowError, match=r"toy: --\w+ keep: it reads rate, which is not finished.*--until rate "):
            rerun([plan], store, Part(**{option: "keep"}))
    assert not store.runs()


def test_until_keeps_only_the_recipes_that_have_the_step_and_goes_with_force(
    tmp_path: Path, store: Store, plan: Plan, luck: Luck
):
    text = (
        recipe(tmp_path, "other")
        .read_text()
        .replace("keep: {use", "last: {use")
        .replace("target: keep", "target: last")
    )
    (tmp_path / "other.yaml").write_text(text)
    other = planned(tmp_path / "other.yaml")
    make(plan, store)
    parts = rerun([plan, other], store, Part(until="keep", force="rate"))
    assert [[step.name for step in part.steps_to_run] for part in parts.plans] == [["draw", "rate", "keep"]]
    assert [step.name for step in parts.to_run()] == ["rate", "keep"]


def test_an_earlier_recipe_of_the_command_may_make_what_a_later_one_reads(
    tmp_path: Path, store: Store, plan: Plan, luck: Luck
):
    """rate of both is one step: made by the first, read by the second."""
    other = planned(recipe(tmp_path, "other", keep="with: {above: 3.0}"))
    make(rerun([plan], store, Part(only="draw")).plans[0], store)
    parts = rerun([plan, other], store, Part(from_step="rate")).plans
    assert [make(part, store) for part in parts] == [["rate", "keep"], ["keep"]]


def test_unknown_steps_and_contradictions_are_refused(store: Store, plan: Plan):
    for option in ("only", "from_step", "until", "force"):
        with pytest.raises(WinnowError, match=r"no step 'rat' in toy; did you mean 'rate'\?"):
            rerun([plan], store, Part(**{option: "rat"}))
    for options in (("only", "from_step"), ("only", "until"), ("from_step", "until")):
        with pytest.raises(WinnowError, match=r"--\w+ rate --\w+ rate: give one of them"):
            rerun([plan], store, Part(**dict.fromkeys(options, "rate")))


def test_a_step_by_its_bare_name_is_that_of_every_round(tmp_path: Path, luck: Luck, store: Store):
    file = recipe(tmp_path)
    file.write_text(file.read_text() + "rounds: [{rate: {with: {scale: 1.0}}}, {rate: {with: {scale: 2.0}}}]\n")
    plan = planned(file)
    make(rerun([plan], store, Part(only="draw")).plans[0], store)
    assert make(rerun([plan], store, Part(only="rate")).plans[0], store) == ["rate@1", "rate@2"]
    assert make(rerun([plan], store, Part(until="keep@1")).plans[0], store) == ["keep@1"]
    assert make(rerun([plan], store, Part(from_step="rate@2")).plans[0], store) == ["keep@2"]
    assert {made.key for made in rerun([plan], store, Part(force="rate@2")).to_delete} == {
        step(plan, name).key for name in ("rate@2", "keep@2")
    }


def test_force_makes_a_step_again_and_what_was_made_of_it(store: Store, plan: Plan, luck: Luck):
    """Luck has changed: without force nothing is made; with it rate is new, keep fits it, and draw stays."""
    make(plan, store)
    draws = store.folder(step(plan, "draw")).manifest
    luck.bonus = 100.0
    assert make(plan, store) == []
    forced = rerun([plan], store, Part(force="rate"))
    assert min(rewards(store, plan)) == 0.0, "nothing is touched before drop()"
    forced.delete()
    assert make(forced.plans[0], store) == ["rate", "keep"]
    assert rewards(store, plan) == rewards(store, plan, "keep") == [100.0 + n for n in range(12)]
    assert store.folder(step(plan, "draw")).manifest == draws


@pytest.mark.parametrize("part", [dict(until="draw"), dict(only="rate"), dict(from_step="keep")])
def test_force_of_a_step_that_the_part_leaves_out_is_refused(store: Store, plan: Plan, part: dict[str, str]):
    """It would be deleted, and not made again."""
    make(plan, store)
    forced = "rate" if "from_step" in part else "keep"
    with pytest.raises(WinnowError, match=rf"--force {forced}: --\w+ {next(iter(part.values()))} .*omit"):
        rerun([plan], store, Part(force=forced, **part))


def test_force_drops_what_no_run_names_any_more_too(tmp_path: Path, store: Store, plan: Plan, luck: Luck):
    """A selection made of the old rewards would be found sealed by whoever asks for it again."""
    make(plan, store)
    file = recipe(tmp_path)
    changed = planned(file, "keep.above=3.0")
    make(changed, store)
    (local(store.root) / "runs" / f"{changed.name}.json").unlink()
    rerun([plan], store, Part(force="rate")).delete()
    assert [manifest["stage"] for manifest in store.sealed()] == ["toy_draw"]


@pytest.mark.parametrize("name", ["draw", "rate"])
def test_force_is_refused_where_another_run_would_lose_its_ground(
    tmp_path: Path, store: Store, plan: Plan, luck: Luck, name: str
):
    other = planned(recipe(tmp_path, "other", keep="with: {above: 3.0}"))
    make(plan, store)
    make(other, store)
    before = store.sealed()
    refused = rf"--force {name}: other needs what would be deleted.*winnow gc .*--forget other --yes`"
    with pytest.raises(WinnowError, match=refused):
        rerun([plan], store, Part(force=name))
    assert store.sealed() == before
    assert rerun([plan], store, Part(force="keep")).to_delete, "its own keep is nobody else's"
    rerun([plan, other], store, Part(force=name)).delete()
    assert len(store.sealed()) == ["draw", "rate"].index(name)


def test_what_is_finished_needs_no_machine_unless_it_is_computed_again(store: Store, plan: Plan, luck: Luck):
    """What a cluster must have room for: another beta needs no GPUs for the sampler."""
    assert rerun([plan], store).to_run() == plan.steps
    make(plan, store)
    assert rerun([plan], store).to_run() == []
    assert [step.name for step in rerun([plan], store, Part(force="rate")).to_run()] == ["rate", "keep"]


def test_a_run_that_came_since_the_checks_keeps_its_ground(tmp_path: Path, store: Store, plan: Plan, luck: Luck):
    make(plan, store)
    again = rerun([plan], store, Part(force="rate"))
    make(planned(recipe(tmp_path, "other", keep="with: {above: 3.0}")), store)
    before = store.sealed()
    with pytest.raises(WinnowError, match="other needs what would be deleted"):
        again.delete()
    assert store.sealed() == before


@pytest.mark.parametrize(("nth", "found"), [(3, True), (4, False)])
def test_a_run_that_comes_between_the_last_looks_and_the_drop(store: Store, plan: Plan, nth: int, found: bool):
    """What it found sealed is not dropped; where it comes later still, it finds nothing, and waits for the claims."""
    make(plan, store)
    before = store.sealed()
    raced = Raced(store.root, plan, nth)
    again = rerun([plan], raced, Part(force="draw"))
    with pytest.raises(WinnowError, match="again needs") if found else nullcontext():
        again.delete()
    assert raced.found is found
    assert store.sealed() == (before if found else [])


def test_what_follows_a_forced_step_is_not_deleted_where_a_part_leaves_it_out(store: Store, plan: Plan, luck: Luck):
    """They were to run again by what was printed, and were gone. Where they have no results, a part is forced."""
    make(plan, store)
    before = store.sealed()
    for option in ("only", "until"):
        with pytest.raises(
            WinnowError, match=rf"--{option} rate --force rate: keep would be deleted.*; omit --{option} "
        ):
            rerun([plan], store, Part(**{option: "rate"}, force="rate"))
    assert store.sealed() == before
    assert rerun([plan], store, Part(from_step="rate", force="rate")).to_delete
    rerun([plan], store, Part(force="keep")).delete()
    assert [step.name for step in rerun([plan], store, Part(only="rate", force="rate")).to_run()] == ["rate"]


def test_nothing_is_dropped_where_a_part_would_not_do_or_somebody_is_at_work(store: Store, plan: Plan, luck: Luck):
    """--only keep --force draw: rate would be gone. And a step that is being made is not taken away from its maker."""
    make(plan, store)
    before = store.sealed()
    with pytest.raises(WinnowError, match="--force draw: --only keep leaves it out"):
        rerun([plan], store, Part(only="keep", force="draw"))
    claim = store.folder(step(plan, "keep")).try_lock()
    assert claim
    with pytest.raises(WinnowError, match="another run is computing toy_keep"):
        rerun([plan], store, Part(force="draw")).delete()
    claim.release()
    assert store.sealed() == before


def test_a_drop_that_is_cut_short_leaves_no_step_on_missing_ground(
    tmp_path: Path, store: Store, luck: Luck, monkeypatch: pytest.MonkeyPatch
):
    """At whichever deletion it dies: every finished step's inputs are finished, and the plain command goes on."""
    plan = planned(recipe(tmp_path), "shards=1")  # a deletion more or less per shard shows nothing new
    count, last = 0, 0

    def or_die(place):
        nonlocal count
        count += 1
        if count == last:
            raise KeyboardInterrupt
        delete(place)

    monkeypatch.setattr("pipeline.store.gc.delete", or_die)
    for last in range(1, 30):  # noqa: B007 - read by or_die
        count = 0
        make(plan, store)
        try:
            rerun([plan], store, Part(force="draw")).delete()
        except KeyboardInterrupt:
            sealed = {manifest["key"] for manifest in store.sealed()}
            for manifest in store.sealed():
                assert set(manifest["identity"]["inputs"].values()) <= sealed
        else:
            break
    assert last > 6


def test_an_interrupted_forced_run_goes_on_by_the_command_it_prints(winnow, tmp_path: Path, luck: Luck):
    """The printed command is the same without --force: rate, which is new already, is not made a third time."""
    file = recipe(tmp_path)
    assert winnow("run", file, "--set", "keep.above=-2.0")[0] == 0
    for failure, code in ((MachineError("worker"), 2), (OSError("disk"), 2), (KeyboardInterrupt(), 130)):
        luck.calls.clear()
        luck.fail = failure
        got, output = winnow("run", file, "--force", "rate", "--set", "keep.above=-2.0")
        assert got == code
        line = next(line for line in output.splitlines() if "resume with: " in line)
        words = shlex.split(line.partition("resume with: ")[2])
        assert words == ["winnow", "run", str(file), "--set", "keep.above=-2.0"]
        luck.fail = None
        luck.calls.clear()
        assert winnow(*words[1:])[0] == 0
        assert set(luck.calls) == {"keep"}


def test_a_failure_that_the_same_command_meets_again_is_not_resumed(winnow, tmp_path: Path, luck: Luck):
    """Of data and options; it says what is kept, and that --force must not be repeated."""
    file = recipe(tmp_path)
    assert winnow("run", file)[0] == 0
    for failure in (WinnowError("no"), FileNotFoundError("gone")):
        luck.fail = failure
        code, output = winnow("run", file, "--force", "rate")
        assert (code, "resume with" in output) == (2, False)
        assert "finished parts are kept" in output
        assert "omit it" in output
    luck.fail = TypeError("a mistake in a plugin")
    with pytest.raises(TypeError) as caught:
        winnow("run", file)
    assert not any("resume with" in note for note in caught.value.__notes__)


def test_only_what_began_to_run_is_resumed(winnow, tmp_path: Path, luck: Luck):
    for words in (["--set", "rate.scale=high"], ["--only", "keep"], ["--force", "nothing"]):
        code, output = winnow("run", recipe(tmp_path), *words)
        assert (code, "resume" in output) == (2, False)


def test_the_command_is_quoted_and_forces_no_more():
    assert command(["winnow", "run", "a b.yaml", "--force", "x", "--set", "a.b='c'"]) == (
        "winnow run 'a b.yaml' --set 'a.b='\"'\"'c'\"'\"''"
    )
    assert command(["/bin/winnow", "run", "rso", "--force=x"]) == "/bin/winnow run rso"


def test_why_names_the_field_where_a_difference_arises_and_the_steps_that_follow(
    tmp_path: Path, store: Store, plan: Plan, luck: Luck
):
    make(plan, store)
    changed = planned(recipe(tmp_path, "other", rate="with: {scale: 2.0}"))
    make(changed, store)
    field, through = explain_difference(store, "toy", "other")
    assert field == "rate.options.scale: 1.0 -> 2.0"
    assert through.endswith("inputs: keep")
    assert explain_difference(store, "toy/keep", "other/keep") == [field, through]
    keys = [step(each, "keep").key for each in (plan, changed)]
    assert explain_difference(store, keys[0][:8], keys[1])[0] == "toy_keep.rewards.options.scale: 1.0 -> 2.0"
    for one, other in (("toy", "toy"), ("toy/draw", "other/draw")):
        (line,) = explain_difference(store, one, other)
        assert "no difference" in line


def test_why_names_steps_that_one_run_lacks_and_inputs_from_elsewhere(tmp_path: Path, store: Store, luck: Luck):
    one, other = recipe(tmp_path, "one"), recipe(tmp_path, "other")
    text = "again: {use: toy_rate, from: {candidates: draw}, with: {scale: 3.0}}\n"
    other.write_text(other.read_text().replace("rewards: rate", "rewards: again") + text)
    for file in (one, other):
        make(planned(file), store)
    lines = ["keep.inputs.rewards: rate -> again", "only in one: rate", "only in other: again"]
    assert explain_difference(store, "one", "other") == lines


def test_why_says_what_it_cannot_know(store: Store, plan: Plan, tmp_path: Path, luck: Luck):
    make(plan, store)
    other = planned(recipe(tmp_path, "other", rate="with: {scale: 2.0}"))
    make(rerun([other], store, Part(only="draw")).plans[0], store)
    (line,) = explain_difference(store, "toy", "other")
    assert line.endswith("keep, rate")
    for wrong, words in {
        "toi": "did you mean 'toy'",
        "toy/kep": "run toy has no step 'kep'; did you mean 'keep'",
        "0000beef": "0000beef",
        "toy/keep": "a run and a step",
    }.items():
        with pytest.raises(WinnowError, match=words):
            explain_difference(store, wrong, "toy")
