"""Versions that come and go: which are served, which are refused, and when they are tried again."""

import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from dropserve.service.inference.registry import Registry, RegistryError
from dropserve.service.inference.reload import Folder, Pin, Reloader
from dropserve.service.inference.repository import Repository
from dropserve.service.settings import Settings


class Checkpoints:
    """A folder of versions: number -> "good", or anything else for a bad one."""

    def __init__(self):
        self.models = {"m": {}}
        self.pins = {}
        self.loads = []

    def find(self):
        return {name: sorted(versions) for name, versions in self.models.items() if versions}

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
        return f"{name} {version}"


@pytest.fixture
def there():
    return Checkpoints()


@pytest.fixture
def reloader(there):
    registry = Registry(None, "here")
    return Reloader(registry, Folder(there.find, there.mark, there.load, there.pinned), keep=1)


def unlisted():
    raise OSError("stale handle")


def served(reloader, name="m"):
    return dict(reloader._registry.versions(name))


def answers(reloader, name="m"):
    return reloader._registry.find(name)


def test_the_latest_versions_are_loaded_once_and_older_ones_let_go(there, reloader):
    there.models["m"] = {1: "good", 2: "good", 3: "good"}
    reloader.look()
    assert served(reloader) == {2: "m 2", 3: "m 3"}
    there.models["m"][4] = "good"
    reloader.look()
    reloader.look()
    assert served(reloader) == {3: "m 3", 4: "m 4"}
    assert there.loads == [3, 2, 4]


def test_the_latest_is_served_before_older_ones_are_loaded(there, reloader):
    seen = []
    load = there.load
    there.load = lambda *of: seen.append(served(reloader)) or load(*of)
    reloader._folder = Folder(there.find, there.mark, there.load)
    there.models["m"] = {1: "good", 2: "good"}
    reloader.look()
    assert seen == [{}, {2: "m 2"}]


def test_a_bad_version_is_refused_until_its_files_change(there, reloader):
    there.models["m"] = {1: "good", 2: "bad"}
    for _ in range(3):
        reloader.look()
    assert served(reloader) == {1: "m 1"}
    assert str(reloader.refused["m"][2].error) == "m 2 is bad"
    assert there.loads == [2, 1]
    there.models["m"][2] = "still bad"
    reloader.look()
    there.models["m"][2] = "good now"
    reloader.look()
    assert served(reloader) == {1: "m 1", 2: "m 2"}
    assert not reloader.refused["m"]
    assert there.loads == [2, 1, 2, 2]


@pytest.mark.parametrize(("level", "traceback"), [("INFO", False), ("DEBUG", True)])
def test_a_refusal_is_one_line_with_its_reason(level, traceback, there, reloader, caplog):
    caplog.set_level(level, "dropserve.versions")
    there.models["m"] = {1: "bad"}
    reloader.look()
    (record,) = caplog.records
    assert (record.levelname, record.message) == ("ERROR", "version refused")
    assert record.fields == {"reason": "m 1 is bad"}
    assert bool(record.exc_info) is traceback


def test_a_bad_version_does_not_take_the_place_of_an_older_one(there, reloader):
    there.models["m"] = {1: "good", 2: "good", 3: "bad", 4: "bad"}
    reloader.look()
    assert served(reloader) == {1: "m 1", 2: "m 2"}
    assert list(reloader.refused["m"]) == [4, 3]


def test_a_version_whose_folder_is_gone_goes_and_the_last_ones_stay(there, reloader):
    there.models["m"] = {1: "good", 2: "good"}
    reloader.look()
    del there.models["m"][2]
    reloader.look()
    assert served(reloader) == {1: "m 1"}
    del there.models["m"][1]
    reloader.look()
    assert served(reloader) == {1: "m 1"}


def test_a_refused_version_that_is_gone_is_no_longer_reported(there, reloader):
    there.models["m"] = {1: "good", 2: "bad"}
    reloader.look()
    del there.models["m"][2]
    reloader.look()
    assert not reloader.refused["m"]


def test_a_model_of_refused_versions_alone_is_forgotten_when_they_are_gone(there, reloader):
    there.models["m"] = {1: "bad"}
    reloader.look()
    assert list(reloader.refused["m"]) == [1]
    there.models["m"] = {}
    reloader._folder = Folder(lambda: {"m": []}, there.mark, there.load)
    reloader.look()
    assert not reloader.refused["m"]


def test_a_refused_model_whose_folder_is_gone_is_forgotten(there, reloader):
    there.models |= {"m": {1: "bad"}, "other": {1: "good"}}
    reloader.look()
    del there.models["m"]
    reloader.look()
    assert not any(reloader.refused.values())


def test_a_version_replaced_under_its_number_is_loaded_anew_and_stays_if_bad(there, reloader):
    there.models["m"] = {1: "good"}
    reloader.look()
    there.models["m"][1] = "bad"
    reloader.look()
    assert served(reloader) == {1: "m 1"}
    assert list(reloader.refused["m"]) == [1]
    there.models["m"][1] = "good again"
    reloader.look()
    assert not reloader.refused["m"]
    assert there.loads == [1, 1, 1]


def test_a_model_that_is_left_out_goes_and_comes_back(there, reloader):
    there.models = {"m": {1: "good"}, "n": {1: "good"}}
    reloader.look()
    reloader.left_out = frozenset({"m"})
    reloader.look()
    assert (served(reloader), served(reloader, "n")) == ({}, {1: "n 1"})
    reloader.left_out = frozenset()
    reloader.look()
    assert served(reloader) == {1: "m 1"}


def test_the_pinned_version_answers_and_newer_ones_are_callable(there, reloader, caplog):
    there.models["m"] = {1: "good", 2: "good", 3: "good", 4: "good"}
    there.pins["m"] = 1
    reloader.look()
    assert (served(reloader), answers(reloader)) == ({1: "m 1", 3: "m 3", 4: "m 4"}, "m 1")
    there.models["m"][5] = "good"
    reloader.look()
    assert (served(reloader), answers(reloader)) == ({1: "m 1", 4: "m 4", 5: "m 5"}, "m 1")
    there.pins["m"] = 4
    reloader.look()
    assert (served(reloader), answers(reloader)) == ({4: "m 4", 5: "m 5"}, "m 4")
    there.pins["m"] = None
    reloader.look()
    assert (answers(reloader), reloader.pins["m"]) == ("m 5", Pin())
    assert there.loads == [1, 4, 3, 5]
    assert not caplog.records


def test_what_answered_goes_on_until_the_pinned_version_is_loaded(there, reloader):
    there.models["m"] = {1: "good", 2: "good", 3: "good"}
    reloader.look()
    seen = []
    load = there.load
    there.load = lambda *of: seen.append(answers(reloader)) or load(*of)
    reloader._folder = Folder(there.find, there.mark, there.load, there.pinned)
    there.models["m"][4] = "good"
    there.pins["m"] = 1
    reloader.look()
    assert seen == ["m 3", "m 1"]  # before 1 is loaded, and before 4 is
    assert answers(reloader) == "m 1"


@pytest.mark.parametrize(
    ("pinned", "problem"),
    [(9, "version 9 is not there"), (2, "version 2 cannot be loaded: m 2 is bad")],
)
def test_where_the_pinned_version_cannot_answer_the_latest_does(
    pinned, problem, there, reloader, caplog
):
    there.models["m"] = {1: "good", 2: "bad", 3: "good"}
    there.pins["m"] = pinned
    reloader.look()
    reloader.look()
    assert (answers(reloader), reloader.pins["m"]) == ("m 3", Pin(pinned, problem))
    (record,) = [r for r in caplog.records if r.message == "pin not followed"]
    assert record.fields == {"model": "m", "version": 3, "pinned": pinned, "reason": problem}
    there.models["m"][pinned] = "good now"
    reloader.look()
    assert (answers(reloader), reloader.pins["m"]) == (f"m {pinned}", Pin(pinned))


def test_a_pin_that_cannot_be_read_stays_what_it_was(there, reloader):
    there.models["m"] = {1: "good", 2: "good"}
    there.pins["m"] = 1
    reloader.look()
    there.pins["m"] = ValueError("no JSON")
    reloader.look()
    assert answers(reloader) == "m 1"
    assert reloader.pins["m"] == Pin(1, "the pin cannot be read: no JSON")


def test_a_pin_that_cannot_be_read_is_said_even_if_it_was_not_followed(there, reloader):
    there.models["m"] = {1: "good"}
    there.pins["m"] = 9
    reloader.look()
    there.pins["m"] = ValueError("no JSON")
    reloader.look()
    assert reloader.pins["m"] == Pin(9, "the pin cannot be read: no JSON")


def test_the_default_version_wins_over_a_pin_of_the_default_model_alone(there):
    registry = Registry("m", "here")
    folder = Folder(there.find, there.mark, there.load, there.pinned)
    there.models = {"m": {1: "good", 2: "good"}, "n": {1: "good", 2: "good"}}
    there.pins = {"m": 2, "n": 2}
    Reloader(registry, folder, keep=1, default_version=1).look()
    assert (registry.find("m"), registry.find("n")) == ("m 1", "n 2")


def test_a_version_that_is_removed_while_it_is_loaded_is_not_refused(there, reloader, caplog):
    there.models["m"] = {1: "good", 2: "bad"}
    marks = iter(["bad", None, "good"])  # of 2, of 2 when it failed, of 1
    reloader._folder = Folder(there.find, lambda *_: next(marks), there.load)
    reloader.look()
    assert served(reloader) == {1: "m 1"}
    assert not reloader.refused["m"]
    assert not caplog.records


def test_a_folder_that_cannot_be_listed_changes_nothing(there, reloader):
    there.models["m"] = {1: "good"}
    reloader.look()

    reloader._folder = Folder(unlisted, there.mark, there.load)
    reloader.look()
    assert served(reloader) == {1: "m 1"}


def test_what_was_refused_is_looked_at_again_when_it_is_forgotten(there, reloader):
    there.models["m"] = {1: "good", 2: "bad"}
    reloader.look()
    reloader.forget()
    reloader.look()
    assert there.loads == [2, 1, 2]


def test_a_refusal_holds_nothing_that_was_read(there, reloader, caplog):
    caplog.set_level("CRITICAL", logger="dropserve.versions")  # or its records hold the frames

    class Weights:
        pass

    gone = []

    def load(_name, _version):
        weights = Weights()
        gone.append(weakref.ref(weights))
        try:
            json.loads("{")
        except ValueError as error:
            raise ValueError("bad") from error

    reloader._folder = Folder(there.find, there.mark, load)
    there.models["m"] = {1: "bad"}
    reloader.look()
    gc.collect()
    assert str(reloader.refused["m"][1].error) == "bad"
    assert gone[0]() is None


def test_a_model_is_left_out_even_where_the_folder_cannot_be_listed(there, reloader):
    there.models["m"] = {1: "good"}
    reloader.look()

    reloader._folder = Folder(unlisted, there.mark, there.load)
    reloader.left_out = frozenset({"m"})
    reloader.look()
    assert served(reloader) == {}


def test_who_closes_waits_for_one_version_and_not_for_all(there, reloader):
    def load(name, version):
        reloader.closing = True
        return there.load(name, version)

    reloader._folder = Folder(there.find, there.mark, load)
    there.models["m"] = {1: "good", 2: "good"}
    reloader.look()
    assert there.loads == [2]


def started(there, *, check=True, **settings):
    with ThreadPoolExecutor(1) as loader:
        folder = Folder(there.find, there.mark, there.load, there.pinned)
        return Repository(Settings(**settings), folder, loader, None, check=check)


def test_a_start_serves_what_loads_and_says_what_does_not(there):
    there.models = {"m": {1: "good", 2: "bad"}, "n": {1: "bad"}}
    repository = started(there)
    assert list(repository.registry) == ["m"]
    assert repository.registry.default is None  # as it will be when "n" is good again
    assert repository.models() == ["m", "n"]
    assert repository.state("n") == {
        "version": None,
        "versions": [],
        "refused": [{"version": 1, "reason": "n 1 is bad"}],
        "changed": [],
        "pinned": None,
        "pin_problem": None,
    }
    assert started(there, default_model="n").registry.default == "n"


def test_a_start_without_a_default_model_says_so(there, caplog):
    there.models = {"m": {1: "good"}, "n": {1: "good"}}
    started(there, default_model="n")
    assert not caplog.records
    started(there)
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "/predict is 404 until DROPSERVE_DEFAULT_MODEL is one of m, n" in record.message


@pytest.mark.parametrize(
    ("models", "settings", "reason"),
    [
        ({"m": {1: "bad"}, "n": {2: "bad"}}, {}, "no model can be served: m 1 is bad; n 2 is bad"),
        ({"m": {1: "good", 2: "bad"}}, {"strict_start": True}, "m 2 is bad"),
        ({"m": {1: "good"}}, {"strict_start": True, "default_version": 2}, "2 is not there"),
        ({"m": {1: "good"}, "n": {1: "good"}}, {"default_version": 1}, "DROPSERVE_DEFAULT_MODEL"),
        ({"m": {1: "good"}}, {"default_model": "n"}, "the default model 'n' is not in it"),
        ({}, {}, "no checkpoint in it"),
    ],
    ids=["none", "strict", "strict pin", "version of no default", "no such default", "empty"],
)
def test_a_start_that_cannot_be_meant_fails_and_a_workers_does_not(there, models, settings, reason):
    there.models = models
    with pytest.raises(RegistryError, match=reason):
        started(there, **settings)
    started(there, check=False, **settings)


def test_a_version_whose_files_changed_is_served_and_said_to_be_from_memory(there):
    there.models = {"m": {1: "good", 2: "good"}}
    repository = started(there)
    there.models["m"][2] = "bad"
    repository._obey()
    state = repository.state("m")
    assert (state["version"], state["versions"], state["refused"]) == (2, [1, 2], [])
    assert state["changed"] == [{"version": 2, "reason": "m 2 is bad"}]
    entry = {"name": "m", "version": "2", "state": "READY"}
    assert repository.index()[1] == entry | {"reason": "served from memory: m 2 is bad"}
    there.models["m"] = {}
    repository._obey()  # its volume is away, more likely than not
    reasons = {changed["reason"] for changed in repository.state("m")["changed"]}
    assert reasons == {"its folder is gone"}
