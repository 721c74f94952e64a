"""Recipes: every mistake at once, the nearest known key, nothing silently ignored."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpm_cli.errors import RecipeError
from dpm_cli.method.pruners import make_base
from dpm_cli.recipe import Recipe, dump_recipe, hash_recipe, load_recipe, parse_recipe, shipped_recipes
from dpm_cli.recipe.sections import Decay, Rectify, Training
from dpm_cli.recipe.stages import Stage, number_epochs
from dpm_cli.recipe.values import parse_amount, parse_latency, parse_size

SMALLEST: dict[str, Any] = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(values: object, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, overrides)
    return caught.value.problems


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_by_name_with_and_without_suffix(name: str) -> None:
    assert load_recipe(name) == load_recipe(f"{name}.yaml") == load_recipe(shipped_recipes()[name])


def test_the_promised_recipes_are_shipped() -> None:
    assert {
        *("digits", "cifar10", "resnet56-folder", "cifar100-vgg19", "folder"),
        *("vgg16-otov2", "resnet56-depgraph", "resnet56-depgraph-sl", "vgg16-gate-decorator"),
        *("resnet50-imagenet-otov2", "vgg19-cifar100-depgraph-sl"),
    } <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_begin_with_what_they_do_and_how_to_use_them(name: str) -> None:
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    first, *rest = text.splitlines()
    assert first.startswith("# ")
    assert 20 < len(first) < 110
    comments = "\n".join(line for line in rest if line.startswith("#"))
    assert all(word in comments for word in ("Takes:", "Use:", "Settings:", "dpm "))


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "on-the-fly"])  # it has no rounds
def test_rounds_of_shipped_recipes_fit_their_train_stage(name: str) -> None:
    # 45 000 images are CIFAR's training images less the validation part; the demo has 1 294; a folder at least 2 000
    images = {"digits": 1294, "folder": 2000, "resnet50-imagenet-otov2": 1_255_544}.get(name, 45_000)
    recipe = load_recipe(name)
    base = make_base(recipe.prune, recipe.train, seed=recipe.seed)
    stages = number_epochs([*base.stages(), Stage("finetune", recipe.finetune, "finetune.")])
    rounds = base.rounds(stages, recipe.decay, steps_per_epoch=images // recipe.data.batch)
    wanted = {"folder": 1}.get(name, 5) if recipe.prune.rounds == "auto" else recipe.prune.rounds
    assert len(rounds.starts) == (1 if base.pace == "steps" else wanted)


def test_a_file_of_the_same_name_comes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text(yaml.safe_dump(SMALLEST | {"seed": 7}), encoding="utf-8")
    assert load_recipe("digits").seed == 7


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'nowhere'.*cifar10.*digits"):
        load_recipe("nowhere")


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("prune", "min_kep", "min_keep"),
        ("train", "epoch", "epochs"),
        ("data", "batch_size", "batch"),
        ("decay", "step", "steps"),
        ("finetune", "learning_rate", None),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(section: str, key: str, nearest: str | None) -> None:
    values = SMALLEST | {section: SMALLEST.get(section, {}) | {key: 1}}
    (problem,) = problems_of(values)
    assert f"unknown key '{section}.{key}'" in problem
    assert f"did you mean '{nearest}'?" in problem if nearest else "known: epochs" in problem


def test_a_rate_left_out_is_that_of_the_criterion() -> None:
    for rule, expected in [(True, ("auto", 2.0)), ({"criterion": "cosine"}, ("cosine", 0.2))]:
        rectify = parse_recipe(SMALLEST | {"decay": {"rectify": rule}}).decay.rectify
        assert rectify
        assert (rectify.criterion, rectify.rate) == expected


def test_rectifying_is_left_out_unless_it_is_asked_for() -> None:
    assert parse_recipe(SMALLEST).decay.rectify is None
    assert parse_recipe(SMALLEST | {"decay": {"steps": 7}}).decay == Decay(steps=7, rectify=None)
    assert parse_recipe(SMALLEST | {"decay": {"rectify": True}}).decay.rectify == Rectify()


def test_the_dense_model_teaches_while_units_go_and_after_but_not_itself() -> None:
    recipe = parse_recipe(SMALLEST | {"dense": {"epochs": 3}})
    assert (recipe.train.distill, recipe.finetune.distill, recipe.dense) == (0.7, 0.7, Training(epochs=3))
    with pytest.raises(RecipeError, match=r"dense\.distill has no dense model to learn from: leave it out"):
        parse_recipe(SMALLEST | {"dense": {"distill": 0.5}})


def test_an_unknown_key_inside_rectify_is_explained_too() -> None:
    (problem,) = problems_of(SMALLEST | {"decay": {"rectify": {"rates": 0.1}}})
    assert "did you mean 'rate'?" in problem


def test_all_mistakes_are_reported_at_once() -> None:
    values = {
        "model": {"arch": "digits", "input": [3, 32]},
        "data": {"name": "mnist"},
        "prune": {"base": "magic", "target": {"macs": 2.0, "sparsity": 0.5}, "rounds": 0},
        "trian": {},
    }
    problems = problems_of(values)
    assert len(problems) == 6
    for part in (
        "model.input",
        "data.name is 'mnist'; known:",
        "prune.base is 'magic'",
        "prune.target",
        "prune.rounds",
    ):
        assert any(part in problem for problem in problems), part
    assert any("did you mean 'train'?" in problem for problem in problems)
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "not a mapping"),
        ([1], "not a mapping"),
        ({}, "'model' is missing"),
        (SMALLEST | {"train": 5}, "train is 5"),
        (SMALLEST | {"train": {"lr": "fast"}}, "train.lr is 'fast'"),
        (SMALLEST | {"train": {"lr": float("nan")}}, "train.lr is nan"),
        (SMALLEST | {"prune": {"target": {"macs": 0}}}, "fraction to keep"),
        (SMALLEST | {"prune": {"target": {"macs": 1.0}}}, "keeps everything"),
        (SMALLEST | {"prune": {"target": {"macs": "60X"}}}, "such as 60M"),
        (SMALLEST | {"prune": {"target": {"macs": True}}}, "such as 60M"),
        (SMALLEST | {"prune": {"target": {}}}, "name macs, params, channels, size, latency or drop"),
        (SMALLEST | {"prune": {"target": {"macs": 0.5}, "start": 0.5, "end": 0.5}}, "must lie before end"),
        (SMALLEST | {"train": {"epochs": 2, "warmup_epochs": 2}}, "fewer than epochs"),
        (SMALLEST | {"seed": -1}, "seed is -1"),
        (SMALLEST | {"prune": {"target": {"macs": 0.5}, "max_drop": -1}}, "prune.max_drop is -1"),
        (
            SMALLEST | {"prune": {"target": {"macs": 0.5}, "max_drop": 1}, "data": {"name": "digits", "validation": 0}},
            "raise data.validation above 0",
        ),
        (SMALLEST | {"export": ["tflite"]}, "known: 'torchscript', 'onnx'"),
    ],
)
def test_impossible_values_are_named(values: object, said: str) -> None:
    assert any(said in problem for problem in problems_of(values))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("seed: 1\nseed: 2\n", "is given twice"),
        ("model: [unclosed", "is not a YAML recipe"),
        ("x: !!python/object/apply:os.system ['true']\n", "is not a YAML recipe"),
        ("model: {arch: a\ndata: b\n", r"expected ',' .* while parsing a flow mapping \(line 2, column 5\)$"),
        ("a: \x07", r"not allowed, position 3$"),
        ("", "not a mapping"),
        ("- 1\n", "not a mapping"),
        ("[" * 5000, "is not a YAML recipe"),
    ],
)
def test_text_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_binary_and_huge_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(path)
    path.write_text("#" * (2 << 20))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(path)


def test_scientific_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(SMALLEST) + "train: {weight_decay: 5e-4, lr: 1E-2}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.train.weight_decay, recipe.train.lr) == (0.0005, 0.01)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seed=3", lambda r: r.seed, 3),
        ("train.lr=1e-3", lambda r: r.train.lr, 0.001),
        ("dense.epochs=4", lambda r: r.dense.epochs, 4),
        ("export=[onnx]", lambda r: r.export, ("onnx",)),
        ("export=[onnx-fp16, pt2]", lambda r: r.export, ("onnx-fp16", "pt2")),
        ("opset=20", lambda r: r.opset, 20),
        ("prune.round_to=auto", lambda r: r.prune.round_to, "auto"),
        ("prune.round_to=16", lambda r: r.prune.round_to, 16),
        ("prune.target.params=2M", lambda r: r.prune.target.limits, {"params": 2e6}),
        ("decay.rectify=false", lambda r: r.decay.rectify, None),
        ("decay.rectify=true", lambda r: r.decay.rectify, Rectify()),
        ("decay.rectify.rate=0.3", lambda r: r.decay.rectify.rate, 0.3),
        ("data.root=a=b", lambda r: str(r.data.root), "a=b"),
    ],
)
def test_an_override_changes_one_setting(override: str, read: Any, expected: object) -> None:
    assert read(parse_recipe(SMALLEST, [override])) == expected


def test_overrides_leave_the_given_mapping_alone() -> None:
    values = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}
    parse_recipe(values, ["prune.rounds=2", "prune.target.params=0.4"])
    assert values["prune"] == {"target": {"macs": 0.5}}


@pytest.mark.parametrize("override", ["prune.rounds", "=3", "prune.roundz=3", "seed=[1", "seed.x=1", "train.lr="])
def test_a_bad_override_is_named(override: str) -> None:
    assert problems_of(SMALLEST, override)


def test_settings_cannot_be_changed_after_loading() -> None:
    recipe = parse_recipe(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


@pytest.mark.parametrize(
    ("changes", "said"), [(["data.resize=30"], "less than the 32"), (["data.resize=40", "data.crop=none"], "leave one")]
)
def test_sizes_that_leave_a_part_of_the_input_empty_are_refused(changes: list[str], said: str) -> None:
    (problem,) = problems_of(SMALLEST, *changes)
    assert said in problem


@pytest.mark.parametrize(
    ("text", "number"),
    [("60M", 6e7), ("1.5G", 1.5e9), ("2b", 2e9), (" 10 k ", 1e4), ("0.5", 0.5), (0.47, 0.47), (60_000, 6e4)],
)
def test_amounts_are_fractions_or_absolutes(text: object, number: float) -> None:
    assert parse_amount(text) == number


@pytest.mark.parametrize("parse", [parse_amount, parse_size, parse_latency])
def test_fractions_may_be_percentages(parse: Callable[[object], float]) -> None:
    assert parse("47 %") == 0.47


@pytest.mark.parametrize("parse", [parse_amount, parse_size, parse_latency])
@pytest.mark.parametrize("text", ["0%", "100%", "250%", "-5%", "%"])
def test_percentages_that_keep_nothing_or_everything_are_refused(parse: Callable[[object], float], text: str) -> None:
    with pytest.raises(ValueError, match="a fraction to keep"):
        parse(text)


def test_a_typed_value_is_not_blamed_on_the_file() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", ["train.epochs=x", "prune.target={macs: half}"])
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == ["prune.target.macs", "train.epochs"]


def test_a_value_of_the_file_is_blamed_on_it_beside_a_typed_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {arch: digits}\ndata: {name: digits}\ntrain: {epochs: x}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: train\.epochs"):
        load_recipe(path, ["train.lr=0.1"])


FLOATS = partial(st.floats, allow_subnormal=False)  # a run in this process may have switched them off
SETTINGS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"arch": st.text(min_size=1, max_size=20), "classes": st.integers(1, 1000)}),
        "data": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["digits", "cifar10", "folder"]),
                "root": st.text("abc/._ -äß:#", min_size=1, max_size=10),
                "mean": st.none() | st.lists(FLOATS(0, 1), min_size=1, max_size=3),
            }
        ),
        "prune": st.fixed_dictionaries(
            {
                "target": st.sampled_from(["macs", "params", "channels"]).flatmap(
                    lambda kind: st.fixed_dictionaries({kind: FLOATS(0.01, 0.99) | st.integers(2, 10**12)})
                ),
                "rounds": st.integers(1, 50),
                "keep": st.lists(st.text(max_size=8), max_size=3),
            }
        ),
        "decay": st.fixed_dictionaries(
            {"steps": st.integers(1, 1000), "rectify": st.booleans() | st.just({"rate": 0.1})}
        ),
        "train": st.fixed_dictionaries({"lr": FLOATS(1e-8, 10), "clip_grad": st.none() | FLOATS(0.1, 10)}),
        "seed": st.integers(0, 2**31 - 1),
    }
)


@given(SETTINGS)
@pytest.mark.thorough
def test_a_dumped_recipe_loads_as_the_same_recipe(values: dict[str, Any]) -> None:
    recipe = parse_recipe(values)
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe
    assert hash_recipe(again) == hash_recipe(recipe)


@given(st.recursive(st.none() | st.booleans() | FLOATS() | st.text(max_size=5), lambda v: st.lists(v, max_size=3)))
def test_any_value_for_any_key_is_accepted_or_explained(value: object) -> None:
    for key in ("model", "prune", "decay", "seed", "export"):
        try:
            outcome: Recipe | list[str] = parse_recipe(SMALLEST | {key: value})
        except RecipeError as error:
            outcome = error.problems
        assert outcome


@pytest.mark.parametrize("override", ["seed=1", "train.lr=0.06", "decay.rectify=true", "prune.target.macs=0.51"])
def test_the_hash_changes_with_any_setting(override: str) -> None:
    assert hash_recipe(parse_recipe(SMALLEST)) != hash_recipe(parse_recipe(SMALLEST, [override]))
    assert hash_recipe(parse_recipe(SMALLEST)) == hash_recipe(Recipe.model_validate(SMALLEST))


def test_a_wrong_round_to_is_one_mistake() -> None:
    (problem,) = problems_of(SMALLEST, "prune.round_to=0")
    assert problem == "prune.round_to is 0; must be a number of channels such as 8, or auto"


@pytest.mark.parametrize("base", ["otov2", "gate-decorator"])
@pytest.mark.parametrize("setting", ["importance=taylor", "penalty=growing", "sparse_epochs=3"])
def test_settings_that_a_base_would_ignore_are_refused(base: str, setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"{setting.split('=')[0]} is a setting of the base depgraph"):
        parse_recipe(SMALLEST, [f"prune.base={base}", f"prune.{setting}"])
