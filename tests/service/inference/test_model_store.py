"""The model store: which versions are served, which are refused, when they are tried again."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dropserve.service.errors import ModelStoreError, NotFound
from dropserve.service.inference.model_store import ModelStore
from dropserve.service.inference.workers import ControlState
from dropserve.service.settings import Settings

SEVERAL = {"b": {2: "good", 10: "good", 1: "good"}, "a": {3: "good"}}


class Loaded(str):
    """A version by its name; it counts how often its masks were freed."""

    freed = 0
    device = "cpu"

    def forget_masks(self):
        self.freed += 1


class Folder:
    """Versions by number: "good", or anything else for a bad one; None: its files are gone."""

    def __init__(self):
        self.models = {"m": {}}
        self.pins = {}
        self.loads = []

    problem = None

    def relative(self, text):
        return text

    def find(self):
        if self.models is None:
            raise OSError("stale handle")
        return {name: sorted(versions) for name, versions in self.models.items()}

    def mark(self, name, version):
        return self.models[name][version]

    def pinned(self, name):
        found = self.pins.get(name)
        if isinstance(found, Exception):
            raise found
        return found

    def load(self, name, version):
        self.loads.append(version)
        if not self.models[name][version].startswith("good"):
            raise ValueError(f"{name} {version} is bad")
        return Loaded(f"{name} {version}")


def started(there, *, check=True, control=None, **settings):
    with ThreadPoolExecutor(1) as loader:
        return ModelStore(Settings(**settings), loader, there, control, check=check)


@pytest.fixture
def there():
    return Folder()


@pytest.fixture
def control():
    return ControlState()


@pytest.fixture
def store(there, control):
    return started(there, check=False, control=control, keep_versions=1)


@pytest.fixture
def several(there):
    there.models = dict(SEVERAL)
    return started(there, default_model="b", keep_versions=9)


def served(store, name="m"):
    return dict(store.versions(name))


def refused(store, name="m"):
    return {entry["version"]: entry["reason"] for entry in store.state(name)["refused"]}


def pin(store, name="m"):
    state = store.state(name)
    return state["pinned"], state["pin_problem"]


def test_the_latest_version_by_number_is_meant_where_none_is_named(several):
    assert several.find() == several.find("b") == "b 10"
    assert several.find("a") == "a 3"
    assert several.find("b", "2") == "b 2"
    assert several.find(None, "1") == "b 1"


def test_models_and_versions_are_listed_in_order(several):
    assert list(several.versions("b")) == [1, 2, 10]
    assert list(several.versions("c")) == []
    assert list(several) == several.models() == ["a", "b"]


@pytest.mark.parametrize("name", ["c", "", ".", "..", "a/3", "MARKER", "x" * 10**6, "\ud800"])
def test_an_unknown_name_is_not_found_and_not_repeated(name, several):
    with pytest.raises(NotFound, match=r"^no such model; served are a, b$"):
        several.find(name)


@pytest.mark.parametrize(
    "version",
    ["0", "-1", "3", "", "+2", " 2", "2.0", "02", "2\n", "٢", "²", "1e1", *("9" * 20, "9" * 5000)],
)
def test_an_unknown_version_is_not_found(version, several):
    with pytest.raises(NotFound, match=r"^no such version of the model; served are 1, 2, 10$"):
        several.find("b", version)


@pytest.mark.parametrize("name", ["digits-mpl", "digit_mlp", "DIGITS-MLP", "digits-mlp/2"])
def test_the_closest_name_is_suggested(name, there):
    there.models = {"digits-mlp": {1: "good"}, "colour-cnn": {1: "good"}}
    expected = "no such model; served are colour-cnn, digits-mlp; did you mean digits-mlp?"
    with pytest.raises(NotFound) as caught:
        started(there).find(name)
    assert str(caught.value) == expected


def test_of_many_names_the_first_are_listed(there):
    there.models = {f"m{n:03}": {1: "good"} for n in range(100)}
    with pytest.raises(
        NotFound, match=r"served are m000, m001, .*, m019, \.\.\.; did you mean m042"
    ):
        started(there).find("m042x")


def test_the_only_model_at_the_start_is_the_default_from_then_on(there):
    there.models = {"b": {1: "good"}}
    store = started(there)
    there.models["a"] = {1: "good"}
    store.update()
    assert list(store) == ["a", "b"]
    assert store.find() == "b 1"


def test_several_models_have_no_default_unless_one_is_chosen(there, caplog):
    there.models = dict(SEVERAL)
    started(there, default_model="a")
    assert not caplog.records
    store = started(there)
    assert store.default is None
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "/predict is 404 until DROPSERVE_DEFAULT_MODEL is one of b, a" in record.message
    with pytest.raises(NotFound, match="several models and no default: name one of a, b"):
        store.find()
    assert store.find("a") == "a 3"


def test_the_latest_versions_are_loaded_once_and_older_ones_released(there, store):
    there.models["m"] = {1: "good", 2: "good", 3: "good"}
    store.update()
    assert served(store) == {2: "m 2", 3: "m 3"}
    there.models["m"][4] = "good"
    store.update()
    store.update()
    assert served(store) == {3: "m 3", 4: "m 4"}
    assert there.loads == [3, 2, 4]
    assert store.loads == {("m", "loaded"): 3}
    assert {v: loaded.freed for v, loaded in store.versions("m").items()} == {3: 1, 4: 0}
    with pytest.raises(NotFound, match="no such version"):
        store.find("m", "2")


def test_the_latest_is_served_before_older_ones_are_loaded(there, store):
    seen = []
    load = there.load
    there.load = lambda *of: seen.append(served(store)) or load(*of)
    there.models["m"] = {1: "good", 2: "good"}
    store.update()
    assert seen == [{}, {2: "m 2"}]


def test_a_bad_version_is_refused_until_its_files_change(there, store):
    there.models["m"] = {1: "good", 2: "bad"}
    for _ in range(3):
        store.update()
    assert served(store) == {1: "m 1"}
    assert refused(store) == {2: "m 2 is bad"}
    assert there.loads == [2, 1]
    there.models["m"][2] = "still bad"
    store.update()
    there.models["m"][2] = "good now"
    store.update()
    assert served(store) == {1: "m 1", 2: "m 2"}
    assert not refused(store)
    assert there.loads == [2, 1, 2, 2]
    assert store.loads == {("m", "loaded"): 2, ("m", "refused"): 2}


@pytest.mark.parametrize(("level", "traceback"), [("INFO", False), ("DEBUG", True)])
def test_a_refusal_is_one_line_with_its_reason(level, traceback, there, store, caplog):
    caplog.set_level(level, "dropserve.versions")
    there.models["m"] = {1: "bad"}
    store.update()
    (record,) = caplog.records
    assert (record.levelname, record.message) == ("ERROR", "version refused")
    assert record.fields == {"reason": "m 1 is bad"}
    assert bool(record.exc_info) is traceback


def test_a_bad_version_does_not_take_the_place_of_an_older_one(there, store):
    there.models["m"] = {1: "good", 2: "good", 3: "bad", 4: "bad"}
    store.update()
    assert served(store) == {1: "m 1", 2: "m 2"}
    assert list(refused(store)) == [3, 4]


def test_a_version_whose_folder_is_gone_goes_and_the_last_ones_stay(there, store):
    there.models["m"] = {1: "good", 2: "good"}
    store.update()
    del there.models["m"][2]
    store.update()
    assert served(store) == {1: "m 1"}
    del there.models["m"][1]
    store.update()
    assert served(store) == {1: "m 1"}


def test_refused_versions_that_are_gone_are_forgotten(there, store):
    there.models = {"m": {1: "good", 2: "bad"}, "n": {1: "bad"}, "o": {1: "bad"}}
    store.update()
    assert store.models() == ["m", "n", "o"]
    there.models = {"m": {1: "good"}, "n": {}}
    store.update()
    assert store.models() == ["m"]
    assert not refused(store)


def test_a_version_replaced_under_its_number_is_loaded_anew_and_stays_if_bad(there, store):
    there.models["m"] = {1: "good", 2: "good"}
    store.update()
    there.models["m"][2] = "bad"
    store.update()
    state = store.state("m")
    assert (state["version"], state["versions"], state["refused"]) == (2, [1, 2], [])
    assert state["changed"] == [{"version": 2, "reason": "m 2 is bad"}]
    entry = {"name": "m", "version": "2", "state": "READY"}
    assert store.index()[1] == entry | {"reason": "served from memory: m 2 is bad"}
    there.models["m"] = {}
    store.update()  # its volume is away, more likely than not
    assert {changed["reason"] for changed in store.state("m")["changed"]} == {"its files are gone"}
    there.models["m"] = {2: "good again"}
    store.update()
    assert (served(store), store.state("m")["changed"]) == ({2: "m 2"}, [])
    assert there.loads == [2, 1, 2, 2]


@pytest.mark.parametrize("listed", [True, False])
def test_an_unloaded_model_goes_even_where_the_folder_cannot_be_listed(
    listed, there, control, store
):
    there.models = models = {"m": {1: "good"}, "n": {1: "good"}}
    store.update()
    control.publish("m", loaded=False)
    there.models = models if listed else None
    store.update()
    assert (served(store), served(store, "n")) == ({}, {1: "n 1"})
    with pytest.raises(NotFound, match=r"^no such model; served are n$"):
        store.find("m")
    entry = {"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert store.index()[0] == entry
    control.publish("m", loaded=True)
    there.models = models
    store.update()
    assert served(store) == {1: "m 1"}


def test_the_default_model_may_be_unloaded(several):
    several._control.publish("b", loaded=False)
    several.update()
    with pytest.raises(NotFound, match="default model is not served now"):
        several.find()
    assert list(several) == ["a"]
    assert several.state("b")["version"] is None


def test_the_pinned_version_answers_and_newer_ones_are_callable(there, store, caplog):
    there.models["m"] = {1: "good", 2: "good", 3: "good", 4: "good"}
    there.pins["m"] = 1
    store.update()
    assert (served(store), store.find("m")) == ({1: "m 1", 3: "m 3", 4: "m 4"}, "m 1")
    there.models["m"][5] = "good"
    store.update()
    assert (served(store), store.find("m")) == ({1: "m 1", 4: "m 4", 5: "m 5"}, "m 1")
    there.pins["m"] = 4
    store.update()
    assert (served(store), store.find("m")) == ({4: "m 4", 5: "m 5"}, "m 4")
    there.pins["m"] = None
    store.update()
    assert (store.find("m"), pin(store)) == ("m 5", (None, None))
    assert there.loads == [1, 4, 3, 5]
    assert store.index()[0]["reason"] == "older than the versions that are kept"
    assert not caplog.records


def test_what_answered_goes_on_until_the_pinned_version_is_loaded(there, store):
    there.models["m"] = {1: "good", 2: "good", 3: "good"}
    store.update()
    seen = []
    load = there.load
    there.load = lambda *of: seen.append(store.find("m")) or load(*of)
    there.models["m"][4] = "good"
    there.pins["m"] = 1
    store.update()
    assert seen == ["m 3", "m 1"]  # before 1 is loaded, and before 4 is
    assert store.find("m") == "m 1"


@pytest.mark.parametrize(
    ("pinned", "problem"),
    [(9, "version 9 is not there"), (2, "version 2 cannot be loaded: m 2 is bad")],
)
def test_where_the_pinned_version_cannot_answer_the_latest_does(
    pinned, problem, there, store, caplog
):
    there.models["m"] = {1: "good", 2: "bad", 3: "good"}
    there.pins["m"] = pinned
    store.update()
    store.update()
    assert (store.find("m"), pin(store)) == ("m 3", (pinned, problem))
    (record,) = [r for r in caplog.records if r.message == "pin not followed"]
    assert record.fields == {"model": "m", "version": 3, "pinned": pinned, "reason": problem}
    there.models["m"][pinned] = "good now"
    store.update()
    assert (store.find("m"), pin(store)) == (f"m {pinned}", (pinned, None))


@pytest.mark.parametrize("pinned", [1, 9])
def test_a_pin_that_cannot_be_read_stays_what_it_was_and_says_so(pinned, there, store):
    there.models["m"] = {1: "good", 2: "good"}
    there.pins["m"] = pinned
    store.update()
    there.pins["m"] = ValueError("no JSON")
    store.update()
    assert store.find("m") == ("m 1" if pinned == 1 else "m 2")
    assert pin(store) == (pinned, "the pin cannot be read: no JSON")


def test_the_default_version_wins_over_a_pin_of_the_default_model_alone(there):
    there.models = {"m": {1: "good", 2: "good"}, "n": {1: "good", 2: "good"}}
    there.pins = {"m": 2, "n": 2}
    store = started(there, default_model="m", default_version=1)
    assert (store.find("m"), store.find("n")) == ("m 1", "n 2")


def test_a_version_that_is_removed_while_it_is_loaded_is_not_refused(there, store, caplog):
    there.models["m"] = {1: "good", 2: "bad"}
    marks = iter(["bad", None, "good"])  # of 2, of 2 when it failed, of 1
    there.mark = lambda *_: next(marks)
    store.update()
    assert served(store) == {1: "m 1"}
    assert not refused(store)
    assert not caplog.records


def test_a_folder_that_cannot_be_listed_changes_nothing(there, store):
    there.models["m"] = {1: "good"}
    store.update()
    there.models = None
    store.update()
    assert served(store) == {1: "m 1"}


def test_refused_versions_are_tried_again_at_a_control_message(there, control, store):
    there.models["m"] = {1: "good", 2: "bad"}
    store.update()
    control.publish("m", loaded=True)
    store.update()
    assert there.loads == [2, 1, 2]


def test_close_waits_for_one_version_and_not_for_all(there, store):
    load = there.load
    there.load = lambda *of: store.close() or load(*of)
    there.models["m"] = {1: "good", 2: "good"}
    store.update()
    assert there.loads == [2]


def test_a_start_serves_what_loads_and_says_what_does_not(there):
    there.models = {"m": {1: "good", 2: "bad"}, "n": {1: "bad"}}
    store = started(there)
    assert list(store) == ["m"]
    assert store.default is None  # as it will be when "n" is good again
    assert store.models() == ["m", "n"]
    assert store.state("n") == {
        "version": None,
        "versions": [],
        "on_request": [],
        "refused": [{"version": 1, "reason": "n 1 is bad"}],
        "changed": [],
        "pinned": None,
        "pin_problem": None,
    }
    assert started(there, default_model="n").default == "n"


@pytest.mark.parametrize(
    ("models", "settings", "reason"),
    [
        ({"m": {1: "bad"}, "n": {2: "bad"}}, {}, "no model can be served: m 1 is bad; n 2 is bad"),
        ({"m": {1: "good", 2: "bad"}}, {"strict_start": True}, "m 2 is bad"),
        ({"m": {1: "good"}}, {"strict_start": True, "default_version": 2}, "2 is not there"),
        ({"m": {1: "good"}, "n": {1: "good"}}, {"default_version": 1}, "DROPSERVE_DEFAULT_MODEL"),
        ({"m": {1: "good"}}, {"default_model": "n"}, "model 'n' is not in it; there are m"),
        ({}, {}, "checkpoints: no checkpoint in it; make one with `dropserve train`"),
    ],
    ids=["none", "strict", "strict pin", "version of no default", "no such default", "empty"],
)
def test_a_start_that_cannot_be_meant_fails_and_a_workers_does_not(there, models, settings, reason):
    there.models = models
    with pytest.raises(ModelStoreError, match=reason):
        started(there, **settings)
    started(there, check=False, **settings)


def test_a_name_without_versions_is_no_model_and_its_pin_is_not_read(there):
    there.models = {"m": {1: "good"}, "README.md": {}}
    there.pins = {"README.md": NotADirectoryError("README.md")}
    store = started(there, strict_start=True)
    assert store.models() == ["m"]


def test_of_two_listings_the_one_that_began_last_holds(there, store):
    there.models["m"] |= {1: "good"}
    earlier = store._list()
    there.models["m"] |= {2: "good"}
    store.update()
    store.update(earlier)  # it took longer
    assert list(store.versions("m")) == [1, 2]
    store.update()
    assert list(store.versions("m")) == [1, 2]
