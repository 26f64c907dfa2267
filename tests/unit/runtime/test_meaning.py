"""A recipe that means nothing is one line: from JSON, in a package in plain diffusers, and where its graph is opened."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from tasks.core.artifacts import write_json
from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.package.write import seal, write_package
from tasks.pretrain_load.architectures import SCHEDULE, dit
from tasks.runtime import graph
from tasks.runtime.graph import export, open_graph
from tasks.runtime.meaning import check_recipe
from tasks.runtime.packed import PackedDenoiser, open_model
from tasks.runtime.solver import KNOWN, Opening

FF, LAYER = "transformer_blocks.0.ff", "transformer_blocks.0.ff.net.2"
PLAN = CachePlan(sublayers=(FF,), compute=((True,), (False,), (True,)), forecast="learned", weights=(((),), ((0.9,),), ((),)))
WHOLE = json.loads(json.dumps(Recipe(timesteps=(900, 500, 100), solver="dpm2m", cache=PLAN, precision={LAYER: "bf16"},
                                     sparsity={"grain": "2:4", "density": {LAYER: 0.5}}).to_json()))
NAN = float("nan")

# what is set where -> what the line says
MEANINGLESS = [
    (("timesteps",), [100, 500, 900], "strictly decreasing"), (("timesteps",), [900, 500, -1], "strictly decreasing"),
    (("timesteps",), [900, 900, 100], "strictly decreasing"), (("timesteps",), [], "strictly decreasing"),
    (("timesteps",), [900.0, 500, 100], "900.0 is not a whole"), (("timesteps",), [900, "500", 100], "'500' is not a whole"),
    (("timesteps",), [900, True, 0], "True is not a whole"), (("timesteps",), [NAN, 500, 100], "nan is not a whole number"),
    (("timesteps",), [900, None, 100], "None is not a whole number"), (("timesteps",), 900, "900 is not a list"),
    (("timesteps",), "900", "'900' is not a list"), (("timesteps",), {"0": 900}, "is not a list"),
    (("timesteps",), [900, 100], "the cache plan has 3 steps, the timestep list 2"),
    (("solver",), "euler", "solver 'euler' is not one of"), (("solver",), None, "solver None is not one of"),
    (("solver",), ["ddim"], "is not one of"), (("more",), 1, "unknown key 'more'"),
    (("precision", LAYER), "w9a8", "precision 'w9a8' of"), (("precision", LAYER), "w8a2", "precision 'w8a2'"),
    (("precision", LAYER), "fp16", "precision 'fp16'"), (("precision", LAYER), "W8A8", "precision 'W8A8'"),
    (("precision", LAYER), "w8a8\n", "precision 'w8a8.n'"), (("precision", LAYER), 8, "precision 8 of"),
    (("precision", LAYER), None, "precision None of"), (("precision", LAYER), ["bf16"], "is not fp32, bf16"),
    (("precision",), None, "precision None is not an object"), (("precision",), ["bf16"], "is not an object"),
    (("sparsity", "grain"), "3:4", "grain '3:4' is not one of 2:4, unit"), (("sparsity", "grain"), None, "grain None"),
    (("sparsity", "density"), None, "density None is not an object"), (("sparsity", "density", LAYER), 1.5, "density 1.5 of"),
    (("sparsity", "density", LAYER), -0.1, "density -0.1 of"), (("sparsity", "density", LAYER), NAN, "density nan of"),
    (("sparsity", "density", LAYER), True, "density True of"), (("sparsity", "density", LAYER), "half", "density 'half' of"),
    (("sparsity", "more"), 1, "sparsity: unknown key 'more'"), (("sparsity",), {"grain": "2:4"}, "key 'density' is missing"),
    (("sparsity",), "2:4", "sparsity: '2:4' is not an object"),
    (("cache",), [], "cache: .* is not an object"), (("cache",), {}, "cache: key 'sublayers' is missing"),
    (("cache", "more"), 1, "cache: unknown key 'more'"), (("cache", "sublayers"), [FF, FF], "list of different names"),
    (("cache", "sublayers"), [], "list of different names"), (("cache", "sublayers"), FF, "list of different names"),
    (("cache", "sublayers"), [1], "list of different names"),
    (("cache", "compute"), [[True], [False]], "plan has 2 steps"), (("cache", "compute"), [], "the cache plan has 0"),
    (("cache", "compute"), [[False], [False], [True]], "step 0 computes every"),
    (("cache", "compute"), [[True, True]] * 3, "step 0 has 2 entries for 1"),
    (("cache", "compute"), [[1], [0], [1]], "true and false"), (("cache", "compute"), [True] * 3, "true and false"),
    (("cache", "forecast"), "cubic", "'cubic' is not one of"), (("cache", "forecast"), ["none"], "is not one of none"),
    (("cache", "forecast"), "none", "takes no weights"), (("cache", "weights"), None, "has no weights"),
    (("cache", "weights"), [[[]], [[0.9]]], "weights of 2 steps for 3"),
    (("cache", "weights"), [[[]], [[0.9, 1]], [[]]], "has 2 weights for 1"),
    (("cache", "weights"), [[[]], [[NAN]], [[]]], "numbers"),
    (("cache", "weights"), [[[]], [[True]], [[]]], "numbers"), (("cache", "weights"), [[[]], [["1"]], [[]]], "numbers"),
    (("cache", "weights"), [[[]], [0.9], [[]]], "numbers"), (("cache", "weights"), 0.9, "numbers"),
    (("cache", "weights"), [[[]], [[0.9], [1]], [[]]], "weights of 2 sublayers for 1"),
]
ROWS = [{"t": t, "p": 0.5, "q": -0.5, "a": 0.5, "b": [0.5] * min(i + 1, 2)} for i, t in enumerate((900.5, 500.25, 100))]
LEARNED = WHOLE | {"solver": "learned", "rows": ROWS}
# what is set where in the rows of a learned solver -> what the line says
ROWLESS = [
    (("rows",), None, "rows are missing, but the solver is 'learned'"), (("solver",), "ddim", "rows are given, but the solver"),
    (("rows",), ROWS[:2], "one object for each of 3 timesteps"), (("rows",), [], "one object for each of 3"),
    (("rows",), {"t": 1}, "is not a list of one object"), (("rows",), "learned", "is not a list of one object"),
    (("rows", 1), [500, 1, 1, 1, [1]], "is not a list of one object"), (("rows", 1), {"t": 500}, "step 1: key 'p' is missing"),
    (("rows", 1, "d"), 0.5, "step 1: unknown key 'd'"), (("rows", 0, "t"), "900", "step 0: t '900' is not a finite number"),
    (("rows", 2, "t"), NAN, "t nan is not"), (("rows", 2, "t"), -0.5, "do not fall strictly from T - 1 to 0"),
    (("rows", 2, "t"), 500.25, "do not fall strictly"), (("rows", 2, "p"), float("inf"), "step 2: p inf is not a finite"),
    (("rows", 2, "q"), None, "step 2: q None is not"), (("rows", 0, "a"), True, "step 0: a True is not"),
    (("rows", 0, "a"), 10**400, "step 0: a 1000.* is not a finite number"), (("rows", 1, "b"), 0.5, "b 0.5 is not a list"),
    (("rows", 1, "b"), [], "step 1: b has 0 numbers, not 1 to 2"), (("rows", 0, "b"), [1, 1], "b has 2 numbers, not 1 to 1"),
    (("rows", 1, "b"), [1, NAN], "is not a list of finite numbers"), (("rows", 1, "b"), ["1"], "is not a list of finite"),
    (("timesteps",), [900, 400, 100], "step 1: t 500.25 is not near 400, its timestep"),
    (("rows", 1, "opening"), None, "step 1: unknown key 'opening'"),
]
OPENING = Opening.of(0.5, 0.5, torch.zeros(4, 1, 8, 8)).to_json()
OPENED = json.loads(json.dumps(LEARNED | {"rows": [{**ROWS[0], "opening": OPENING}, *ROWS[1:]]}))
IMAGES = torch.zeros(4, 1, 8, 8)
# what is set where in the opening of a learned solver -> what the line says
UNOPENED = [
    (("a",), None, "a None is not a finite"), (("b",), NAN, "b nan is not a finite"), (("shape",), [4, 64], "not labels, ch"),
    (("shape",), [4, 1, 8, 0], "is not labels, channels"), (("shape",), "4188", "is not labels"),
    (("shape",), [10**9, 10**9, 8, 8], "x0 has 512 bytes, not 128000000000000000000"), (("more",), 1, "unknown key 'more'"),
    (("x0",), "*", "x0 '.' is not base64"), (("x0",), 1, "x0 1 is not base64"), (("x0",), "AAAA", "x0 has 3 bytes, not 512"),
    (("x0",), Opening.of(0, 0, IMAGES + NAN).x0, "x0 is not finite"),
    (("x0",), Opening.of(0, 0, IMAGES + float("inf")).x0, "x0 is not finite"),
]
# what only the schedule or the model tells, and a list of keys that must be there
UNKNOWN = [
    (("timesteps",), [1000, 500, 100], "start at 1000, but the schedule has 1000"),
    (("precision", "mid_block.conv"), "bf16", "precision of mid_block.conv"),
]
ids = [f"{'.'.join(place)}={value!r:.24}" for place, value, _ in MEANINGLESS]


def changed(place, value, whole=WHOLE) -> dict:
    recipe = copy.deepcopy(whole)
    inner = recipe
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return recipe


@pytest.mark.parametrize("place, value, message", ROWLESS)
def test_rows_that_mean_nothing_are_one_line(place, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_json(changed(place, value, LEARNED))
    assert str(caught.value).startswith("recipe: rows") and "\n" not in str(caught.value)


@pytest.mark.parametrize("place, value, message", UNOPENED)
def test_an_opening_that_means_nothing_is_one_line(place, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_json(changed(("rows", 0, "opening", *place), value, OPENED))
    assert str(caught.value).startswith("recipe: rows: opening: ") and "\n" not in str(caught.value)


def test_rows_survive_json_and_may_be_left_out():
    recipe = Recipe.from_json(LEARNED)
    assert recipe.rows[0].t == 900.5 and recipe.rows[2].b == (0.5, 0.5)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert Recipe.from_json({key: value for key, value in WHOLE.items() if key != "rows"}) == Recipe.from_json(WHOLE)
    with pytest.raises(ValueError, match="step 0: b has 2 numbers"):
        replace(recipe, rows=(replace(recipe.rows[0], b=(1.0, 1.0)), *recipe.rows[1:]))


def test_the_first_time_is_one_of_the_schedule():
    check_recipe(LEARNED, KNOWN, 902)
    with pytest.raises(ValueError, match="do not fall strictly from 900 to 0"):
        check_recipe(LEARNED, KNOWN, 901)


@pytest.mark.parametrize("place, value, message", MEANINGLESS, ids=ids)
def test_from_json_refuses_it_in_one_line(place, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_json(changed(place, value))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("recipe: ", "cache plan: "))


@pytest.mark.parametrize("key", sorted(WHOLE.keys() - {"rows"}))
def test_a_missing_key_is_named(key):
    with pytest.raises(ValueError, match=f"recipe: key '{key}' is missing"):
        Recipe.from_json({name: value for name, value in WHOLE.items() if name != key})


@pytest.mark.parametrize("data", [None, [], "recipe", 1])
def test_a_recipe_is_an_object(data):
    with pytest.raises(ValueError, match="is not an object with keys timesteps"):
        Recipe.from_json(data)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    denoiser = build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), SCHEDULE)
    plain = Recipe.from_json({**WHOLE, "sparsity": None})
    folder = write_package(denoiser, plain, {}, {}, tmp_path_factory.mktemp("packages") / "p")
    export(open_model(folder / "denoiser")[0], plain, folder / "openvino")
    seal(folder)
    return folder


@pytest.fixture
def with_recipe(package):
    """Puts another recipe into the package and seals it, as whoever edits one would."""
    original = (package / "recipe.json").read_bytes()

    def put(recipe) -> None:
        (package / "recipe.json").write_text(json.dumps(recipe))
        seal(package)

    yield put
    (package / "recipe.json").write_bytes(original)
    seal(package)


@pytest.fixture
def nothing_compiles(monkeypatch):
    """What is refused is refused before that."""
    monkeypatch.setattr(graph, "compile_graphs", lambda *_: pytest.fail("compiled"))


@pytest.mark.parametrize("place, value, message", MEANINGLESS + UNKNOWN)
def test_the_package_and_its_graph_refuse_it_with_the_file(package, with_recipe, nothing_compiles, place, value, message):
    with_recipe(changed(place, value))
    for opened in (lambda: open_graph(package / "openvino", 2, 1), lambda: diffusers_pipeline(package)):
        with pytest.raises(ValueError, match="NaN is no number of JSON" if NAN in flat(value) else message) as caught:
            opened()
        assert str(caught.value).startswith(f"{package / 'recipe.json'}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 1, 8, 4), (4, 3, 8, 8), (3, 1, 8, 8)])
def test_an_opening_of_other_images_is_refused_with_the_file(package, with_recipe, shape):
    other = Opening.of(0.5, 0.5, torch.zeros(shape)).to_json()
    with_recipe(changed(("rows", 0, "opening"), other, {**OPENED, "sparsity": None}))
    with pytest.raises(ValueError, match=r"shape .* does not fit the model, .* of \[1, 8, 8\] of 4 classes") as caught:
        diffusers_pipeline(package)
    assert str(caught.value).startswith(f"{package / 'recipe.json'}: ")


def test_images_that_are_not_finite_are_not_black_ones(package, with_recipe):
    rows = [{**row, "a": 1e300} for row in ROWS]
    with_recipe({**WHOLE, "sparsity": None, "solver": "learned", "rows": rows})
    with pytest.raises(ValueError, match="recipe.json: an image is not finite"):
        diffusers_pipeline(package)(class_labels=[0], output_type="np")


def flat(value) -> list:
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, list) else [value]


def diffusers_pipeline(package):
    """What `DiffusionPipeline.from_pretrained` does, without its copy of the code: a solver is the pipeline's affair."""
    from diffusers import DDIMScheduler

    from tasks.runtime.pipeline import CompressedPipeline
    return CompressedPipeline(PackedDenoiser.from_pretrained(package / "denoiser"),
                              DDIMScheduler.from_pretrained(package / "scheduler"))


@pytest.mark.parametrize("recipe, message", [
    ({**WHOLE, "sparsity": None, "precision": {}}, f"precision of {LAYER} is fp32, but .*graph.json was exported with bf16"),
    ({**WHOLE, "sparsity": None, "cache": None}, "the cache plan is not the one that"),
    ({**WHOLE, "sparsity": None, "cache": {**WHOLE["cache"], "weights": [[[]], [[0.8]], [[]]]}}, "the cache plan is not"),
])
def test_another_recipe_than_the_graphs_is_refused(package, with_recipe, nothing_compiles, recipe, message):
    with_recipe(recipe)
    with pytest.raises(ValueError, match=message):
        open_graph(package / "openvino", 2, 1)


@pytest.mark.parametrize("change, message", [
    ({"cache": {**WHOLE["cache"], "sublayers": ["mid_block"]}}, "the model has no sublayer 'mid_block'"),
    ({"sparsity": {"grain": "2:4", "density": {"mid_block": 0.5}}}, "density of mid_block: the model has no such layer"),
])
def test_what_the_model_does_not_have_is_named(package, with_recipe, change, message):
    with_recipe({**WHOLE, "sparsity": None, **change})
    with pytest.raises(ValueError, match=f"recipe.json: .*{message}"):
        PackedDenoiser.from_pretrained(package / "denoiser")


def test_a_recipe_that_is_changed_in_memory_is_checked_when_it_is_sampled(package):
    pipe = diffusers_pipeline(package)
    pipe.set_progress_bar_config(disable=True)
    pipe.recipe["timesteps"] = [100, 500, 900]
    with pytest.raises(ValueError, match="strictly decreasing"):
        pipe(batch_size=1)


@pytest.mark.parametrize("name, change, message", [
    ("denoiser/packing.json", {"kept": 1}, "kept 1 is not an object"),
    ("denoiser/packing.json", {"more": {}}, "unknown key 'more'"),
    ("denoiser/packing.json", {"tensors": {"a": {"shape": [1], "bits": 9, "masked": False}}}, "a: .* is not a shape, 3 to 8"),
    ("denoiser/packing.json", {"kept": {FF: 0}}, f"kept units of {FF}: 0 is not a multiple"),
    ("denoiser/config.json", {"_class_name": "AutoencoderKL"}, "_class_name 'AutoencoderKL' is not one of"),
    ("denoiser/config.json", {"num_layers": "two"}, "config.json: TypeError"),
    ("denoiser/config.json", {"num_layers": 1}, "weights.safetensors: RuntimeError: Error.* in loading state_dict"),
])
def test_other_files_of_a_package_mean_something_too(package, name, change, message):
    original = (package / name).read_bytes()
    write_json(package / name, {**json.loads(original), **change})
    seal(package)
    try:
        with pytest.raises(ValueError, match=message) as caught:
            PackedDenoiser.from_pretrained(package / "denoiser")
        assert "\n" not in str(caught.value)
    finally:
        (package / name).write_bytes(original)
        seal(package)


@pytest.mark.parametrize("steps", ["1000", 0, 1000.0, True, [1000]])
def test_a_schedule_without_a_length_is_refused(package, nothing_compiles, steps):
    path = package / "scheduler" / "scheduler_config.json"
    original = path.read_bytes()
    write_json(path, {**json.loads(original), "num_train_timesteps": steps})
    seal(package)
    try:
        for opened in (lambda: open_graph(package / "openvino", 2, 1), lambda: open_model(package / "denoiser")):
            with pytest.raises(ValueError, match="num_train_timesteps .* is not a whole number from 1"):
                opened()
    finally:
        path.write_bytes(original)
        seal(package)
