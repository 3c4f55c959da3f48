"""Which settings are asked about, and what is said where a node does not see a path."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import shared_paths
from pipelines.settings import PrepareDataSettings, SettingsError, TrainSettings


@pytest.fixture
def nodes(monkeypatch):
    """One other node, which sees what ``unseen`` does not name; the paths that it was asked about."""
    asked, unseen = {}, set()

    def answer(nodes, paths):
        asked.update(paths)
        return {address: [key for key in paths if key in unseen] for address in nodes}

    monkeypatch.setattr(shared_paths, "_other_nodes", lambda: {"10.0.0.2": "id"})
    monkeypatch.setattr(shared_paths, "_missing_on", answer)
    return asked, unseen


def test_absolute_paths_are_asked_about_and_uris_are_not(nodes, tmp_path):
    asked, _ = nodes
    (tmp_path / "start").mkdir()
    output = tmp_path / "new/out"
    shared_paths.check_shared_paths(
        TrainSettings(data="s3://bucket/data", init_from=f"file://{tmp_path}/start", output=str(output))
    )
    assert set(asked) == {"init_from", "output"}
    assert asked["init_from"] == f"{tmp_path}/start"
    assert asked["output"].startswith(f"{output}/.seen-"), "a file that only this machine's folder has"
    assert list(output.iterdir()) == [], "the mark is gone"


def test_every_key_that_workers_read_or_write_is_asked_about(nodes, tmp_path):
    asked, _ = nodes
    inputs = ("data", "input", "images", "init_from", "checkpoint", "artifact", "benchmark_data")
    for key in inputs:
        (tmp_path / key).mkdir()
    given = {key: str(tmp_path / key) for key in (*inputs, "output", "storage_path", "raw")}
    shared_paths.check_shared_paths(SimpleNamespace(**given))
    assert list(asked)[: len(inputs)] == list(inputs) and set(asked) == {*inputs, "output", "storage_path"}
    assert {key: asked[key] for key in inputs} == {key: given[key] for key in inputs}
    shared_paths.check_shared_paths(SimpleNamespace(**dict.fromkeys(given, None)))


@pytest.mark.parametrize("key", ["init_from", "output"])
def test_an_unseen_path_is_named_with_its_node_and_the_fix(nodes, tmp_path, key):
    _, unseen = nodes
    unseen.add(key)
    (tmp_path / "init_from").mkdir()
    paths = {name: str(tmp_path / name) for name in ("init_from", "output")}
    with pytest.raises(SettingsError) as error:
        shared_paths.check_shared_paths(TrainSettings(**paths))
    assert all(word in str(error.value) for word in (f"{key}={paths[key]}", "10.0.0.2", "s3://bucket"))
    assert list((tmp_path / "output").iterdir()) == [], "the mark is gone, whatever the nodes say"
    paths[key] = f"file://{paths[key]}"
    with pytest.raises(
        SettingsError, match=f"^{key}=file://{tmp_path}/{key} is a path of this machine that the node at"
    ):
        shared_paths.check_shared_paths(TrainSettings(**paths))


def test_patterns_missing_inputs_and_read_only_outputs_are_the_jobs_own_matter(nodes, tmp_path):
    asked, _ = nodes
    (tmp_path / "file").write_bytes(b"")
    settings = PrepareDataSettings(source="laion", input=f"{tmp_path}/*.tar", output=str(tmp_path / "file/out"))
    shared_paths.check_shared_paths(settings)
    assert asked == {}


def test_nothing_is_asked_where_nothing_is_local(monkeypatch):
    monkeypatch.setattr(shared_paths, "_other_nodes", lambda: pytest.fail("the cluster was asked"))
    shared_paths.check_shared_paths(TrainSettings(data="s3://bucket/data", output="gs://bucket/out"))


def test_relative_paths_are_each_machines_own(nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start").mkdir()
    shared_paths.check_shared_paths(TrainSettings(init_from="start", output="out"))
    assert nodes[0] == {} and not (tmp_path / "out").exists()


def test_nodes_that_work_and_are_not_this_one_are_asked(monkeypatch):
    import ray

    def node(name, alive=True, **resources):
        return {"NodeManagerAddress": f"10.0.0.{name}", "NodeID": name, "Alive": alive, "Resources": resources}

    nodes = [node("1", CPU=4), node("2", CPU=4), node("3", alive=False, CPU=4), node("4"), node("5", GPU=1, CPU=1)]
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "1"))
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert shared_paths._other_nodes() == {"10.0.0.2": "2", "10.0.0.5": "5"}


def test_a_mark_is_there_while_the_nodes_are_asked(monkeypatch, tmp_path):
    seen = {}

    def answer(nodes, paths):
        seen.update({key: (path, Path(path).exists()) for key, path in paths.items()})
        return {}

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(shared_paths, "_other_nodes", lambda: {"10.0.0.2": "id"})
    monkeypatch.setattr(shared_paths, "_missing_on", answer)
    (tmp_path / "out").mkdir()
    settings = TrainSettings(data="~/none", output="~/out", storage_path=str(tmp_path / "kept"))
    shared_paths.check_shared_paths(settings)
    assert set(seen) == {"output", "storage_path"}
    for key, folder in (("output", "out"), ("storage_path", "kept")):
        path, was_there = seen[key]
        assert was_there and Path(path).parent == tmp_path / folder and len(Path(path).name) == 28
        assert list((tmp_path / folder).iterdir()) == []


class Probe:
    """A stand-in for Ray's remote functions: every node runs here, or does not answer."""

    def __init__(self, work, silent):
        self.work, self.silent, self.node = work, silent, None

    def options(self, scheduling_strategy):
        assert scheduling_strategy.soft is False, "on this very node"
        probe = Probe(self.work, self.silent)
        probe.node = scheduling_strategy.node_id
        return probe

    def remote(self):
        return self.node


def test_each_node_says_what_it_does_not_see_or_is_passed_over(monkeypatch, tmp_path, caplog):
    import ray

    probe, asked = {}, []
    caplog.set_level("DEBUG", "pipelines.shared_paths")

    def remote(**options):
        asked.append(options)
        return lambda work: probe.setdefault("made", Probe(work, set()))

    def get(node):
        if node == "n2":
            raise ray.exceptions.RayError("gone")
        return probe["made"].work()

    def wait(references, num_returns, timeout):
        asked.append((type(references), num_returns, timeout))
        return [node for node in references if node != "n3"], [node for node in references if node == "n3"]

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr("ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy", Strategy)
    paths = {"data": str(tmp_path), "output": str(tmp_path / "none")}
    nodes = {f"10.0.0.{n}": f"n{n}" for n in (1, 2, 3)}
    assert shared_paths._missing_on(nodes, paths) == {"10.0.0.1": ["output"]}
    assert asked == [{"num_cpus": 0, "max_retries": 0}, (list, 3, 60.0)]
    assert caplog.messages == [
        "the node at 10.0.0.2 did not say whether it sees the paths: gone",
        "1 of 3 nodes did not say within a minute whether they see the paths.",
    ]
    caplog.clear()
    assert shared_paths._missing_on({"10.0.0.1": "n1"}, paths) == {"10.0.0.1": ["output"]} and not caplog.messages


class Strategy:
    def __init__(self, node_id, soft):
        self.node_id, self.soft = node_id, soft
