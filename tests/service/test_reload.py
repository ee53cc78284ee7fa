"""Versions that come and go: which are served, which are refused, and when they are tried again."""

import gc
import json
import weakref

import pytest

from service.registry import Registry
from service.reload import Folder, Reloader


class Checkpoints:
    """A folder of versions: number -> "good", or anything else for a bad one."""

    def __init__(self):
        self.models = {"m": {}}
        self.loads = []

    def find(self):
        return {name: sorted(versions) for name, versions in self.models.items() if versions}

    def mark(self, name, version):
        return self.models[name][version]

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
    return Reloader(registry, Folder(there.find, there.mark, there.load), keep=1)


def unlisted():
    raise OSError("stale handle")


def served(reloader, name="m"):
    return dict(reloader._registry.versions(name))


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
