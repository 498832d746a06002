"""Settings: defaults, recipes, flags over recipes, and rules that speak."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from gptq import recipes
from gptq.cli import parse, parser
from gptq.config import QuantizeConfig, load_recipe, resolve
from marlin_kernel import WEIGHT_TYPES, ConfigError

RECIPES = sorted((Path(__file__).parent.parent / "configs" / "quantize").glob("*.yaml"))


def config(**changes) -> QuantizeConfig:
    return QuantizeConfig(**{"checkpoint": "model", "wbits": 4, **changes})


def test_documented_defaults():
    """The defaults that the documents and the original tool promise."""
    expected = dict(
        dataset="red", seed=0, nsamples=256, seqlen=None, percdamp=0.1, wbits=16, groupsize=128,
        nearest=False, no_clip=False, skip_gq=False, sym=True, format="marlin",
        eval=("wikitext2", "red"), save=None, device=None, dtype=None, resume=None,
    )  # fmt: skip
    defaults = QuantizeConfig()
    assert {name: getattr(defaults, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(wbits=3), "wbits=3 is not one of 4, 8, 16"),
        (dict(wbits="4"), "wbits='4'"),
        (dict(groupsize=96), "groupsize=96 is not one of -1, 32, 64, 128"),
        (dict(format="exl3"), "format='exl3' is not one of marlin, gptq, compressed-tensors"),
        (dict(dtype="float64"), "dtype='float64' is not one of"),
        (dict(nsamples=0), "nsamples=0 is too small"),
        (dict(seqlen=1), "seqlen=1 is too small"),
        (dict(blocksize=0), "blocksize=0 is too small"),
        (dict(clip_steps=1), "clip_steps=1 is too small"),
        (dict(refit=-1), "refit=-1 is too small"),
        (dict(sweeps=-1), "sweeps=-1 is too small"),
        (dict(refine=-1), "refine=-1 is too small"),
        (dict(refine=5, asymmetric=False), "refine=5 learns scales .* use --asymmetric"),
        (dict(refine_norms=5, nearest=True), "refine_norms=5 .* without --nearest"),
        (dict(eval_tokens=0), "eval_tokens=0 is too small"),
        (dict(percdamp=-0.1), r"percdamp=-0.1 is not in \[0, 10\]"),
        (dict(percdamp=float("nan")), "percdamp=nan is not in"),
        (dict(target_damp=0.0), r"target_damp=0.0 is not in \(0, 100\]"),
        (dict(shrinkage=1.0), r"shrinkage=1.0 is not in \[0, 1\)"),
        (dict(clip_min=1.5), r"clip_min=1.5 is not in \(0, 1\]"),
        (dict(wbits=16, save="out"), "save='out' with wbits=16.*add --wbits 4"),
        (dict(true_sequential=False), "needs true_sequential.*--no-asymmetric"),
        (
            dict(format="compressed-tensors", static_groups=False),
            "compressed-tensors no longer reads; add --static-groups",
        ),
    ],
)
def test_rules_name_argument_value_and_way_out(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(true_sequential=False, asymmetric=False),
        dict(true_sequential=False, nearest=True),
        dict(format="compressed-tensors", static_groups=False, nearest=True),
        dict(format="compressed-tensors", static_groups=False, act_order=False),
        dict(format="gptq", static_groups=False),
    ],
)
def test_combinations_that_work_are_allowed(changes):
    config(**changes)


@pytest.mark.parametrize(
    ("changes", "moves"),
    [
        (dict(static_groups=False), True),
        (dict(static_groups=False, groupsize=-1), False),
        (dict(static_groups=False, nearest=True), False),
        (dict(static_groups=False, act_order=False), False),
        (dict(), False),
    ],
)
def test_when_groups_move(changes, moves):
    assert config(**changes).moves_groups == moves


def test_solver_options_carry_every_setting():
    options = config(
        wbits=8, sym=False, groupsize=32, clip_steps=7, clip_min=0.5, signed_scales=False,
        blocksize=16, percdamp=0.2, act_order=True, static_groups=False, refit=3, sweeps=2,
        target_damp=2.0, shrinkage=0.3,
    ).solver_options()  # fmt: skip
    assert options.wtype == WEIGHT_TYPES["uint8"] and options.group_size == 32
    grid = options.grid
    assert (grid.clip, grid.clip_steps, grid.clip_min, grid.signed) == (True, 7, 0.5, False)
    assert (options.blocksize, options.percdamp) == (16, 0.2)
    assert (options.act_order, options.static_groups) == (True, False)
    assert (options.refit, options.sweeps, options.target_damp) == (3, 2, 2.0)
    assert options.shrinkage == 0.3
    assert options.asymmetric and not options.nearest
    assert not config(no_clip=True).solver_options().grid.clip
    assert not config(nearest=True).solver_options().grid.clip


@pytest.mark.parametrize("field", [f.name for f in fields(QuantizeConfig)])
def test_fingerprint_knows_every_setting_that_decides_the_codes(field):
    """A new setting that is left out by mistake would let runs of other settings mix."""
    other = dict(
        dataset="c4", seed=1, nsamples=8, seqlen=16, wbits=8, groupsize=64, sym=False,
        nearest=True, percdamp=0.2, blocksize=64, true_sequential=False, act_order=False,
        static_groups=False, asymmetric=False, target_damp=2.0, shrinkage=0.3, no_clip=True,
        clip_steps=5, clip_min=0.5, signed_scales=False, refit=0, sweeps=0, refine=1,
        refine_norms=1, skip_gq=True, device="cuda", dtype="bfloat16", sparsity="2:4",
    )  # fmt: skip
    places = {"checkpoint", "data_dir", "save", "overwrite", "resume", "eval", "eval_tokens",
              "report", "format", "from_config", "offload_activations",
              "weight_type"}  # fmt: skip
    assert set(other) | places == {f.name for f in fields(QuantizeConfig)}
    if field not in places:
        base = config(asymmetric=False) if field == "true_sequential" else config()
        changed = {**base.as_dict(), "eval": base.eval, field: other[field]}
        assert QuantizeConfig(**changed).fingerprint() != base.fingerprint()


# ---- recipes and flags ---------------------------------------------------------------------------


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("wbits: 4\ngroupsize: 64\npercdamp: 1e-2\nact_order: false\neval: [pydoc]\n")
    flags = vars(parser().parse_args(["model", "--groupsize", "32", "--act-order"]))
    for name in ("config", "verbose"):
        flags.pop(name)
    found = resolve(load_recipe(recipe), flags)
    assert (found.checkpoint, found.wbits, found.groupsize) == ("model", 4, 32)
    assert found.percdamp == 0.01 and isinstance(found.percdamp, float)
    assert found.act_order is True and found.nsamples == 256
    assert found.eval == ("pydoc",)


def test_options_may_be_spelled_with_dashes_or_underscores():
    given = [
        "m-1", "--act_order", "--no-clip", "--no_static_groups", "--weight-type=uint4_hqq",
        "--refine_norms", "3", "--no-no-clip", "--data-dir", "a-b_c", "--config=my-own_r.yaml",
    ]  # fmt: skip
    flags = {key: value for key, value in parse(given).items() if value is not None}
    assert flags == dict(
        checkpoint="m-1", act_order=True, no_clip=False, static_groups=False, verbose=False,
        weight_type="uint4_hqq", refine_norms=3, data_dir="a-b_c", config="my-own_r.yaml",
    )  # fmt: skip
    with pytest.raises(SystemExit):
        parse(["m", "--act_sequential"])


def test_every_setting_has_a_flag_and_every_flag_a_setting():
    flags = set(vars(parser().parse_args(["model"])))
    assert flags - {"config", "verbose"} == {f.name for f in fields(QuantizeConfig)}


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ((), None),
        (("--offload_activations",), "host"),
        (("--offload_activations", "disk"), "disk"),
        (("--offload_activations", "/big"), "/big"),
        (("--offload_activations", "--no-offload_activations"), None),
    ],
)
def test_where_activations_lie(given, where):
    flags = vars(parser().parse_args(["model", *given]))
    flags = {k: v for k, v in flags.items() if k not in ("config", "verbose")}
    assert resolve({}, flags).offload_activations == where
    if where is None:
        recipe = {"offload_activations": True}
        assert resolve(recipe, flags).offload_activations == (None if given else "host")


def test_a_flag_that_says_no_overrides_a_recipe_that_says_yes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sym: true\nno_clip: true\nresume: true\n")
    arguments = ["model", "--no-sym", "--no-no_clip", "--no-resume"]
    flags = vars(parser().parse_args(arguments))
    found = resolve(load_recipe(recipe), {k: v for k, v in flags.items() if k[0] not in "cv"})
    assert (found.sym, found.no_clip, found.resume) == (False, False, False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("pydoc", ("pydoc",)), ("a, b,", ("a", "b")), ("none", ()), ("", ()), (["x"], ("x",))],
)
def test_lists_of_data_sets(given, expected):
    assert resolve({}, {"eval": given}).eval == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 4\n", r"unknown keys \['bits'\].*wbits"),
        ("- wbits\n- 4\n", "is not a mapping"),
        ("wbits: [4\n", r"recipe\.yaml.*not valid YAML"),
        ("percdamp: much\n", "percdamp='much' is not a number"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(load_recipe(recipe), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "nsamples: many\n", "nsamples: 2.5\n", "nsamples: null\n", "seqlen: '64'\n",
        "refit: true\n", "act_order: 'no'\n", "sym: 1\n", "dataset: 5\n", "save: [out]\n",
        "seed: x\n", "eval: 7\n", "resume: 'yes'\n",
    ],
)  # fmt: skip
def test_recipe_values_of_the_wrong_type_are_named(tmp_path, text):
    """YAML knows no schema: 'no' in quotes is a true string, and 2.5 samples are none."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    name = text.partition(":")[0]
    with pytest.raises(ConfigError, match=f"^{name}="):
        resolve(load_recipe(recipe), {"wbits": 4})


def test_recipes_have_names(tmp_path, monkeypatch):
    """From any folder; what is missing or is not one of them says which there are."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe("best") == load_recipe(recipes.CONFIGS / "quantize" / "best.yaml")
    for name in (tmp_path / "none.yaml", "none", "quick"):  # that one is of eval
        with pytest.raises(ConfigError, match="no such recipe; give a YAML file, or one of best, "):
            load_recipe(name)
    (tmp_path / "best").write_text("wbits: 8")
    assert load_recipe("best") == {"wbits": 8}, "a file comes first"


def test_an_empty_recipe_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert resolve(load_recipe(tmp_path / "empty.yaml"), {}) == QuantizeConfig()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(recipe):
    assert resolve(load_recipe(recipe), {"checkpoint": "model"}).wbits in (4, 8)
