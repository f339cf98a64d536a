"""SeekConfig: defaults, what it refuses and how it says so, and its plain forms."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxseek import errors
from fxseek.config import BACKENDS, GRADIENT_NORMS, NORMALISATIONS, OUTPUTS, SELECTS, SeekConfig
from fxseek.errors import ConfigError
from fxseek.scores import SCORERS


def test_defaults():
    config = SeekConfig()
    assert config.to_dict() == {
        "ratio": 0.1,
        "score": "tokenseek",
        "select": "topk",
        "alpha": 1.0,
        "beta": 1.0,
        "normalise": "minmax",
        "gradient_norm": "l1",
        "supervised_only": False,
        "span": 1,
        "sinks": 0,
        "uniform": 0.5,
        "seed": 0,
        "backend": "eager",
        "recompute": "selective",
        "kv": "device",
        "kv_grad_dtype": "float32",
        "prefill_chunk": None,
        "learn_chunk": None,
        "memory_budget_bytes": None,
        "outputs": "loss",
        "chunk_bytes": None,
        "loss": None,
        "token_dim": 1,
        "ratio_bounds": [0.01, 0.5],
        "ratio_steps": None,
    }


def test_ratio_is_the_only_positional_field():
    assert SeekConfig(0.25).ratio == 0.25
    with pytest.raises(TypeError):
        SeekConfig(0.25, "random")  # type: ignore[misc]


def test_frozen_and_hashable():
    config = SeekConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.5  # type: ignore[misc]
    assert hash(config) == hash(SeekConfig())
    assert pickle.loads(pickle.dumps(config)) == config


def test_numbers_are_stored_as_plain_numbers():
    config = SeekConfig(1, alpha=2)
    assert type(config.ratio) is float
    assert type(config.alpha) is float


BAD = [
    ("recompute", "blocks", ["recompute='blocks'", "did you mean 'block'"]),
    ("kv", "host", ["kv='host'", "'device', 'offload'"]),
    ("kv_grad_dtype", "half", ["kv_grad_dtype='half'", "'float32', 'model'"]),
    ("prefill_chunk", 0, ["prefill_chunk=0", "at least 1"]),
    ("learn_chunk", 0, ["learn_chunk=0", "at least 1"]),
    ("memory_budget_bytes", -1, ["memory_budget_bytes=-1", "at least 1"]),
    ("ratio", 0.0, ["ratio=0.0", "(0, 1]", "0.1"]),
    ("ratio", 1.5, ["ratio=1.5", "(0, 1]"]),
    ("ratio", -0.1, ["ratio=-0.1", "(0, 1]"]),
    ("ratio", math.nan, ["ratio=nan", "(0, 1]"]),
    ("ratio", "0.1", ["ratio='0.1'", "did you mean the number 0.1?", "'mass:0.9'"]),
    ("ratio", "mass:1.5", ["ratio='mass:1.5'", "(0, 1]", "'mass:0.9'"]),
    ("ratio", "mass:0", ["ratio='mass:0'", "(0, 1]", "'mass:0.9'"]),
    ("ratio", "mass:nan", ["ratio='mass:nan'", "(0, 1]", "'mass:0.9'"]),
    ("ratio", "mass:", ["ratio='mass:'", "(0, 1]", "'mass:0.9'"]),
    ("ratio", "mass:90%", ["ratio='mass:90%'", "(0, 1]", "'mass:0.9'"]),
    ("ratio", "mass", ["ratio='mass'", "(0, 1]", "'mass:0.9'"]),
    ("ratio", "Mass:0.8", ["ratio='Mass:0.8'", "did you mean 'mass:0.8'?"]),
    ("ratio", "labeled", ["ratio='labeled'", "did you mean 'labelled'?"]),
    ("ratio", "Labelled", ["did you mean 'labelled'?"]),
    ("ratio", "0.1->1.5", ["ratio='0.1->1.5'", "'0.1->0.5'"]),
    ("ratio", "0.1->", ["ratio='0.1->'", "'0.1->0.5'"]),
    ("ratio_steps", 0, ["ratio_steps=0", "at least 1"]),
    ("sinks", -1, ["sinks=-1", "from 0"]),
    ("normalise", "ranks", ["normalise='ranks'", "did you mean 'rank'", "'zscore'"]),
    ("span", 0, ["span=0", "from 1"]),
    ("span", 2**31, ["span=2147483648", "out of range"]),
    ("ratio", 10**400, ["ratio=1000", "outside (0, 1]"]),
    ("ratio", SeekConfig, ["not a number"]),
    ("alpha", 10**400, ["not finite"]),
    ("span", 2.5, ["span=2.5", "not an integer"]),
    ("ratio", None, ["ratio=None", "not a number", "'mass:0.9'"]),
    ("ratio", True, ["ratio=True", "not a number"]),
    ("score", "contxt", ["score='contxt'", "did you mean 'context'", "'random'", "callable"]),
    ("score", None, ["score=None", "'tokenseek'"]),
    ("select", "top_k", ["select='top_k'", "did you mean 'topk'", "'sample'"]),
    ("alpha", -1.0, ["alpha=-1.0", "0 or more"]),
    ("alpha", math.inf, ["alpha=inf", "finite"]),
    ("beta", "1", ["beta='1'", "not a number"]),
    ("gradient_norm", "L3", ["gradient_norm='L3'", "'l1', 'l2', 'sum'"]),
    ("supervised_only", 1, ["supervised_only=1", "True"]),
    ("uniform", 0, ["uniform=0", "(0, 1]"]),
    ("seed", -1, ["seed=-1", "from 0"]),
    ("seed", 2**63, ["seed=9223372036854775808", "out of range"]),
    ("seed", 0.5, ["seed=0.5", "not an integer"]),
    ("backend", "cuda", ["backend='cuda'", "'inductor'"]),
    ("outputs", "logits", ["outputs='logits'", "'selected'", "'full'"]),
    ("chunk_bytes", 0, ["chunk_bytes=0", "at least 1"]),
    ("chunk_bytes", True, ["chunk_bytes=True", "not an integer"]),
    ("loss", 3, ["loss=3", "loss(outputs, batch)", "None"]),
    ("token_dim", 0, ["token_dim=0", "at least 1"]),
    ("ratio_bounds", 0.5, ["ratio_bounds=0.5", "not a pair", "(low, high)"]),
    ("ratio_bounds", (0.1, 0.2, 0.3), ["not a pair"]),
    ("ratio_bounds", ("0.1", 0.5), ["not two numbers", "(0.01, 0.5)"]),
    ("ratio_bounds", (True, 1), ["not two numbers"]),
    ("ratio_bounds", (0, 0.5), ["0 < low <= high <= 1"]),
    ("ratio_bounds", (0.5, 0.1), ["(0.5, 0.1)", "out of range or order"]),
    ("ratio_bounds", (0.1, 1.5), ["0 < low <= high <= 1"]),
    ("ratio_bounds", (0.1, math.nan), ["0 < low <= high <= 1"]),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_bad_values_name_argument_value_and_remedy(name, value, expected):
    with pytest.raises(ConfigError) as caught:
        SeekConfig(**{name: value})
    for part in expected:
        assert part in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_every_field_has_a_bad_value_tested():
    assert {name for name, _, _ in BAD} == {field.name for field in dataclasses.fields(SeekConfig)}


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        SeekConfig(2.0, score="contxt", seed=-1)
    message = str(caught.value)
    assert "3 problems" in message
    assert all(part in message for part in ("ratio=2.0", "score='contxt'", "seed=-1"))


def test_tokenseek_needs_one_weight():
    with pytest.raises(ConfigError, match="nothing to rank by"):
        SeekConfig(alpha=0, beta=0)
    SeekConfig(alpha=0)
    SeekConfig(beta=0)
    SeekConfig(score="random", alpha=0, beta=0)


def test_shares_of_mass():
    config = SeekConfig("mass:.90", ratio_bounds=[0.1, 1])  # type: ignore[arg-type]
    assert config == SeekConfig("mass:0.9", ratio_bounds=(0.1, 1.0))
    assert config.ratio == "mass:0.9"
    assert config.mass_share == 0.9
    assert config.ratio_bounds == (0.1, 1.0)
    assert isinstance(hash(config), int)
    assert SeekConfig("mass:1").mass_share == 1.0
    assert SeekConfig(0.9).mass_share is None
    assert SeekConfig.make("mass:0.5", select="sample").mass_share == 0.5


def test_random_scores_have_no_mass_to_share():
    with pytest.raises(ConfigError, match=r"ratio='mass:0\.9' with score='random'.*as a number"):
        SeekConfig("mass:0.9", score="random")


def test_long_values_are_shortened():
    with pytest.raises(ConfigError) as caught:
        SeekConfig(backend="x" * 1000)
    assert len(str(caught.value)) < 300


def test_make_takes_a_ratio_a_config_and_options():
    assert SeekConfig.make() == SeekConfig()
    assert SeekConfig.make(0.3, score="random") == SeekConfig(0.3, score="random")
    base = SeekConfig(0.3, score="random", seed=7)
    assert SeekConfig.make(base) == base
    assert SeekConfig.make(base, seed=8) == dataclasses.replace(base, seed=8)


def test_make_suggests_and_lists():
    with pytest.raises(ConfigError) as caught:
        SeekConfig.make(0.0, scor="random")
    message = str(caught.value)
    assert "unknown option 'scor'" in message
    assert "did you mean 'score'" in message
    assert "ratio=0.0" in message


def test_from_dict_rejects_unknown_keys():
    with pytest.raises(ConfigError, match=r"unknown key 'raito'.*did you mean 'ratio'"):
        SeekConfig.from_dict({"raito": 0.1})
    with pytest.raises(ConfigError, match=r"unknown key 'zzz'.*known: ratio, score"):
        SeekConfig.from_dict({"zzz": 1})
    with pytest.raises(ConfigError, match="unknown key '_'"):
        SeekConfig.from_dict({"_": 1})
    with pytest.raises(ConfigError, match=r"needs a mapping.*to_dict"):
        SeekConfig.from_dict([("ratio", 0.1)])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{", "", None])
def test_from_json_rejects_what_is_not_json(text):
    with pytest.raises(ConfigError, match=r"needs JSON text.*to_json"):
        SeekConfig.from_json(text)


def test_from_json_rejects_what_is_not_an_object():
    with pytest.raises(ConfigError, match="needs a mapping"):
        SeekConfig.from_json("[0.1]")


def test_ratios_that_are_no_number():
    assert SeekConfig("labelled").ratio == "labelled"
    assert SeekConfig(" .1 -> 1 ").ratio == "0.1->1.0"
    falling = SeekConfig("0.5->0.1", ratio_steps=5)
    assert [falling.ratio_at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    assert falling.ratio_range == (0.1, 0.5)
    assert SeekConfig("0.2->0.4").ratio_at(1, 0.5) == pytest.approx(0.3)
    assert SeekConfig("0.2->0.4", ratio_steps=1).ratio_at(0) == 0.2
    assert SeekConfig("labelled").ratio_at(0) is None
    assert [SeekConfig(x).is_scored for x in (0.1, "0.1->1.0", 1.0, "labelled")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ratio", "score", "loss"])
def test_callables_refuse_to_serialise(name):
    config = SeekConfig.from_dict({name: lambda *values: values})
    for convert in (config.to_dict, config.to_json):
        with pytest.raises(ConfigError, match=f"{name}=.*pass the callable again"):
            convert()


def configs() -> st.SearchStrategy[SeekConfig]:
    """Every configuration that has a plain form."""
    share = st.floats(0, 1, exclude_min=True)
    score = st.sampled_from(tuple(SCORERS))
    by_mass = st.tuples(st.builds("mass:{}".format, share), score.filter(lambda x: x != "random"))
    linear = st.builds("{}->{}".format, share, share)
    ratio_and_score = st.tuples(share | linear | st.just("labelled"), score) | by_mass
    weight = st.floats(0, 1e6, exclude_min=True)
    return st.builds(
        lambda chosen, **options: SeekConfig(chosen[0], score=chosen[1], **options),
        ratio_and_score,
        select=st.sampled_from(SELECTS),
        alpha=weight,
        beta=weight,
        normalise=st.sampled_from(tuple(NORMALISATIONS)),
        gradient_norm=st.sampled_from(GRADIENT_NORMS),
        span=st.integers(1, 99),
        sinks=st.integers(0, 99),
        ratio_steps=st.none() | st.integers(1, 10**9),
        supervised_only=st.booleans(),
        uniform=share,
        seed=st.integers(0, 2**63 - 1),
        backend=st.sampled_from(BACKENDS),
        outputs=st.sampled_from(OUTPUTS),
        chunk_bytes=st.none() | st.integers(1, 2**40),
        token_dim=st.integers(1, 3),
        ratio_bounds=st.tuples(share, share).map(lambda pair: (min(pair), max(pair))),
    )


@given(configs())
def test_plain_forms_round_trip(config):
    assert SeekConfig.from_dict(config.to_dict()) == config
    assert SeekConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json(indent=None)) == config.to_dict()


def test_one_error_family():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.FxseekError)
    for name in ("ConfigError", "InputError", "ScoreError"):
        assert issubclass(getattr(errors, name), ValueError)
    assert issubclass(errors.GradientMismatch, AssertionError)


def test_chunks_by_device():
    assert SeekConfig().on("cpu").chunk_bytes == 64 << 20
    assert SeekConfig().on("cuda").chunk_bytes == 256 << 20
    assert SeekConfig(chunk_bytes=7).on("cuda").chunk_bytes == 7
