"""Names and versions."""

import pytest

from dropserve.service.errors import NotFound
from dropserve.service.inference.registry import Registry, RegistryError

MODELS = {"b": {2: "b2", 10: "b10", 1: "b1"}, "a": {3: "a3"}}


def opened(models, default=None):
    registry = Registry(default, "here")
    for name, versions in models.items():
        registry.replace(name, versions)
    registry.resolve_default(sorted(models))
    return registry


@pytest.fixture
def registry():
    return opened(MODELS, "b")


def test_the_latest_version_by_number_is_meant_where_none_is_named(registry):
    assert registry.find() == "b10"
    assert registry.find("b") == "b10"
    assert registry.find("a") == "a3"
    assert registry.find("b", "2") == "b2"
    assert registry.find(None, "1") == "b1"


def test_models_and_versions_are_listed_in_order(registry):
    assert list(registry.versions("b")) == [1, 2, 10]
    assert list(registry.versions("c")) == []
    assert list(registry) == ["a", "b"]


def test_versions_that_are_replaced_are_found_from_then_on(registry):
    registry.replace("b", {11: "b11", 10: "b10"})
    assert registry.find() == "b11"
    with pytest.raises(NotFound, match="no such version"):
        registry.find("b", "2")
    registry.replace("b", {})
    with pytest.raises(NotFound, match="default model is not served now"):
        registry.find()
    with pytest.raises(NotFound, match="no such model"):
        registry.find("b")
    assert list(registry) == ["a"]
    assert registry.model("b").answers is None


def test_the_pinned_version_answers_as_long_as_it_is_served(registry):
    registry.replace("b", MODELS["b"], pinned=2)
    assert (registry.find(), registry.model("b").answers) == ("b2", 2)
    assert registry.find("b", "10") == "b10"
    registry.replace("b", {10: "b10"}, pinned=2)
    assert registry.find() == "b10"


def test_a_model_that_comes_later_does_not_change_the_default():
    registry = opened({"b": {1: "b1"}})
    registry.replace("a", {1: "a1"})
    assert registry.find() == "b1"


@pytest.mark.parametrize("name", ["c", "", ".", "..", "a/3", "MARKER", "x" * 10**6, "\ud800"])
def test_an_unknown_name_is_not_found_and_not_repeated(name, registry):
    with pytest.raises(NotFound, match=r"^no such model; served are a, b$"):
        registry.find(name)


@pytest.mark.parametrize("name", ["digits-mpl", "digit_mlp", "DIGITS-MLP", "digits-mlp/2"])
def test_the_closest_name_is_suggested(name):
    registry = opened({"digits-mlp": {1: "one"}, "colour-cnn": {1: "other"}})
    expected = "no such model; served are colour-cnn, digits-mlp; did you mean digits-mlp?"
    with pytest.raises(NotFound) as caught:
        registry.find(name)
    assert str(caught.value) == expected


def test_of_many_names_the_first_are_listed():
    registry = opened({f"m{n:03}": {1: "one"} for n in range(100)})
    with pytest.raises(
        NotFound, match=r"served are m000, m001, .*, m019, \.\.\.; did you mean m042"
    ):
        registry.find("m042x")


@pytest.mark.parametrize(
    "version",
    ["0", "-1", "3", "", "+2", " 2", "2.0", "02", "2\n", "٢", "²", "1e1", *("9" * 20, "9" * 5000)],
)
def test_an_unknown_version_is_not_found(version, registry):
    with pytest.raises(NotFound, match=r"^no such version of the model; served are 1, 2, 10$"):
        registry.find("b", version)


def test_the_only_model_is_the_default():
    assert opened({"a": {3: "a3"}}).find() == "a3"


def test_several_models_have_no_default_unless_one_is_chosen():
    registry = opened(MODELS)
    assert registry.default is None
    with pytest.raises(NotFound, match="several models and no default"):
        registry.find()
    assert registry.find("a") == "a3"


def test_no_model_is_an_error_that_says_where_and_what_to_do():
    with pytest.raises(RegistryError, match="here: no checkpoint in it; make one with"):
        opened({})


def test_an_unknown_default_is_an_error_that_lists_what_there_is():
    with pytest.raises(RegistryError, match=r"here: the default model 'c' is not in it; .* a, b"):
        opened(MODELS, "c")
