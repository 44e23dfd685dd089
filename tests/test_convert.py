"""medusa-ext convert: every pair of formats, bit for bit, and an error for what would be lost."""

import json
import shutil
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loading_util as util
from medusa_ext.cli import run
from medusa_ext.loading import LoadError, convert, inspect

D, V = 32, util.VOCAB
# What is said of heads for "somebody/tiny" and of heads taken out of their model; see the tests.
pytestmark = [
    pytest.mark.filterwarnings("ignore:config.json of the heads says"),
    pytest.mark.filterwarnings("ignore:format . holds the heads alone"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return util.make_model(tmp_path_factory.mktemp("base"))


def head_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of heads as the format spells them, without the base model's own."""
    if (folder / "medusa_lm_head.pt").is_file():
        return torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    path = next(folder.glob("*.safetensors"))
    return {n: v for n, v in load_file(path).items() if not n.startswith(("model.", "lm_head."))}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Names, types and bits."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def spelled(letter: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Heads in the original spelling, as a format spells them."""
    prefix = {"D": "medusa_head.", "F": "medusa_heads."}.get(letter, "")
    return {
        util.vllm_name(name) if letter == "E" else prefix + name: value
        for name, value in state.items()
    }


def make(folder: Path, letter: str, base: Path, **options) -> Path:
    return util.make_heads(folder, letter, base=base, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("source", "target"), list(product("ABDEF", repeat=2)))
def test_own_projections_survive_every_pair(tmp_path, base, source, target, dtype):
    options = {"num_heads": 2, "num_layers": 2, "dtype": dtype, "bias": True}
    state = util.random_heads(**options)
    folder = make(tmp_path / "source", source, base, **options)
    there = convert(folder, tmp_path / "there", target, base=base_of(source, base))
    assert inspect(*pair(there, target, base)).heads.format == target
    assert_same(head_state(there), spelled(target, state))
    back = convert(there, tmp_path / "back", source, base=base_of(target, base))
    assert_same(head_state(back), spelled(source, state))


def base_of(letter: str, base: Path) -> Path | None:
    """Whole models have their own."""
    return None if letter in "DF" else base


def pair(folder: Path, letter: str, base: Path) -> tuple[Path, object]:
    return (folder, "auto") if letter in "DF" else (base, folder)


@pytest.mark.parametrize("target", "ABDEF")
def test_shared_projections_there_and_back(tmp_path, base, target):
    """The base's lm_head becomes a copy in each head (one for all in E) and is dropped again."""
    folder = make(tmp_path / "source", "C", base, num_heads=2, dtype=torch.bfloat16)
    there = convert(folder, tmp_path / "there", target, base=base)
    found = inspect(*pair(there, target, base)).heads
    assert (found.format, found.shared_lm_head) == (target, target == "E")
    lm_head = util.read_weights(base)["lm_head.weight"]
    state = util.random_heads(num_heads=2, own_lm_head=False, dtype=torch.bfloat16)
    copies = ["0.1.weight"] if target == "E" else ["0.1.weight", "1.1.weight"]
    assert_same(head_state(there), spelled(target, state | dict.fromkeys(copies, lm_head)))
    back = convert(there, tmp_path / "back", "C", base=base_of(target, base))
    assert_same(head_state(back), state)
    assert json.loads((back / "config.json").read_text())["version"] == "2"


def test_copies_of_another_type_are_still_copies(tmp_path, base):
    lm_head = util.read_weights(base)["lm_head.weight"].to(torch.bfloat16)
    model = tmp_path / "bf16"
    model.mkdir()
    for path in base.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    save_file(util.read_weights(base) | {"lm_head.weight": lm_head}, model / "model.safetensors")
    folder = make(tmp_path / "heads", "B", base, num_heads=2)
    path = folder / "medusa_lm_head.safetensors"
    copies = dict.fromkeys(["0.1.weight", "1.1.weight"])
    save_file(load_file(path) | {name: lm_head.float().clone() for name in copies}, path)
    convert(folder, tmp_path / "out", "C", base=model)
    with pytest.raises(LoadError, match="projection of head 0 differs"):
        convert(folder, tmp_path / "no", "C", base=base)


@pytest.mark.parametrize("letter", "DF")
def test_whole_models_keep_the_base(tmp_path, base, letter):
    """Weights, tokenizer and settings as they were; converting on from D or F needs no --base."""
    folder = make(tmp_path / "heads", "B", base)
    there = convert(folder, tmp_path / "there", letter, base=base)
    stored = load_file(there / "model.safetensors")
    wanted = util.read_weights(base)
    assert_same({name: stored[name] for name in wanted}, wanted)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (there / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((there / "config.json").read_text())
    for key in ("medusa_num_heads", "medusa_num_layers", "medusa"):
        config.pop(key, None)
    assert config == json.loads((base / "config.json").read_text())
    other = convert(there, tmp_path / "other", "F" if letter == "D" else "D")
    assert load_file(other / "model.safetensors").keys() != stored.keys()
    alone = convert(other, tmp_path / "alone", "B")
    assert_same(head_state(alone), util.random_heads())
    assert json.loads((alone / "config.json").read_text())["base_model_name_or_path"]


def test_sharded_and_pickled_bases(tmp_path, base):
    wanted = util.read_weights(base)
    for index, options in enumerate([{"shards": 3}, {"pickled": True}]):
        other = util.make_model(tmp_path / f"base{index}", **options)
        folder = make(tmp_path / f"heads{index}", "B", base)
        there = convert(folder, tmp_path / f"out{index}", "D", base=other)
        stored = load_file(there / "model.safetensors")
        assert_same({name: stored[name] for name in wanted}, wanted)


def test_without_a_base_where_none_is_needed(tmp_path, base):
    for source, target in ("AB", "BA", "BE", "EB", "CC", "EE"):
        folder = make(tmp_path / (source + target), source, base, bias=True)
        there = convert(folder, tmp_path / f"{source}{target}out", target)
        state = util.random_heads(bias=True, own_lm_head=source != "C")
        assert_same(head_state(there), spelled(target, state))


@pytest.mark.parametrize(("source", "target"), [("D", "F"), ("F", "D"), ("D", "B"), ("F", "E")])
def test_a_tuned_model_is_its_own_base(tmp_path, base, source, target):
    tuned = make(tmp_path / "tuned", source, base)
    with pytest.raises(LoadError, match=r"is a whole model, and --base .* leave --base out"):
        convert(tuned, tmp_path / "no", target, base=base)
    there = convert(tuned, tmp_path / "there", target, base=tuned)
    if target in "BE":
        config = json.loads((there / "config.json").read_text())
        assert config["base_model_name_or_path"] == str(tuned)
        with pytest.warns(UserWarning, match="the heads alone; they are for the weights in"):
            convert(tuned, tmp_path / "again", target)


def test_another_base_than_the_heads_name(tmp_path, base):
    folder = make(tmp_path / "b", "B", base)
    with pytest.warns(UserWarning, match="they are for somebody/tiny, and --base is"):
        convert(folder, tmp_path / "e", "E", base=base)
    util.edit_config(folder, base_model_name_or_path=f"somebody/{base.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(folder, tmp_path / "again", "E", base=base)


@pytest.mark.parametrize("target", "ABDEF")
def test_the_stored_lm_head_of_e_is_kept(tmp_path, base, target):
    """With original_lm_head it should be the model's; what the file holds is not replaced."""
    folder = make(tmp_path / "e", "E", base, bias=True)
    path = folder / "model.safetensors"
    state = load_file(path)
    own = state["lm_heads.0.weight"]
    blocks = {name: value for name, value in state.items() if name.startswith("blocks.")}
    save_file(blocks | {"lm_heads.0.weight": own}, path)
    util.edit_config(folder, original_lm_head=True)
    needed = base if target in "DF" else None
    there = convert(folder, tmp_path / "there", target, base=needed)
    found = head_state(there)
    names = ["0.1.weight"] if target == "E" else [f"{head}.1.weight" for head in range(3)]
    copies = spelled(target, dict.fromkeys(names, own))
    assert_same({name: value for name, value in found.items() if name in copies}, copies)
    with pytest.raises(LoadError, match="projection of head 0 differs from the model's"):
        convert(folder, tmp_path / "c", "C", base=base)
    with pytest.raises(LoadError, match="name the model they are for with --base"):
        convert(folder, tmp_path / "c", "C")


def test_other_keys_of_the_config_come_along(tmp_path, base):
    folder = make(tmp_path / "b", "B", base)
    util.edit_config(folder, trained_on="letters", version="1")
    there = convert(convert(folder, tmp_path / "e", "E"), tmp_path / "back", "B")
    config = json.loads((there / "config.json").read_text())
    assert config == {
        "base_model_name_or_path": "somebody/tiny",
        "medusa_num_heads": 3,
        "medusa_num_layers": 1,
        "trained_on": "letters",
    }


def test_biases_of_e(tmp_path, base):
    """Zero biases are left out and come back as zeros of the weights' type; others are kept."""
    options = {"num_heads": 2, "dtype": torch.bfloat16}
    state = util.random_heads(bias=False, **options)
    folder = make(tmp_path / "e", "E", base, **options)
    there = convert(folder, tmp_path / "there", "B")
    zeros = {f"{h}.0.linear.bias": torch.zeros(D, dtype=torch.bfloat16) for h in range(2)}
    assert_same(head_state(there), state | zeros)
    back = convert(there, tmp_path / "back", "E")
    assert_same(head_state(back), spelled("E", state))
    assert json.loads((back / "config.json").read_text())["medusa_fc_bias"] is False

    path = there / "medusa_lm_head.safetensors"
    negative = load_file(path) | {"1.0.linear.bias": -zeros["1.0.linear.bias"]}
    save_file(negative, path)  # -0.0 is not nothing
    kept = convert(there, tmp_path / "kept", "E")
    assert_same(head_state(kept), spelled("E", negative))


def test_heads_without_layers(tmp_path, base):
    folder = make(tmp_path / "b", "B", base, num_layers=0)
    there = convert(folder, tmp_path / "e", "E")
    back = convert(there, tmp_path / "a", "A")
    assert_same(head_state(back), util.random_heads(num_layers=0))
    with pytest.raises(LoadError, match="no layers"):
        convert(folder, tmp_path / "c", "C", base=base)


def small_vocabulary(tmp_path: Path, base: Path) -> Path:
    """Format E with rows for 40 tokens."""
    folder = make(tmp_path / "small", "E", base)
    path = folder / "model.safetensors"
    state = load_file(path)
    for name in list(state):
        if name.startswith("lm_heads."):
            state[name] = state[name][:40].clone()
    save_file(state | {"token_map": torch.arange(3, 43)}, path)
    util.edit_config(folder, truncated_vocab_size=40)
    return folder


def test_token_maps_stay_in_e(tmp_path, base):
    folder = small_vocabulary(tmp_path, base)
    there = convert(folder, tmp_path / "e", "E")
    found, wanted = head_state(there), head_state(folder)
    assert torch.equal(found.pop("token_map").long(), wanted.pop("token_map"))
    assert_same(found, wanted)
    config = json.loads((there / "config.json").read_text())
    assert (config["vocab_size"], config["truncated_vocab_size"]) == (V, 40)
    assert inspect(base, there).heads.head_vocab == 40
    for target in "ABCDF":
        with pytest.raises(LoadError, match="guess 40 tokens of the vocabulary only, and their"):
            convert(folder, tmp_path / target, target, base=base)


REFUSED = [
    ("B", "C", {}, "name the model they are for with --base"),
    ("B", "C", {"base": True}, "projection of head 0 differs .* would be lost in format C"),
    ("C", "A", {}, "these heads share the model's; name the model they are for with --base"),
    ("C", "E", {}, "name the model they are for with --base"),
    ("B", "D", {}, "format D is a whole model .* --base"),
    ("B", "F", {}, "format F is a whole model .* --base"),
    ("B", "G", {}, "the format is 'G'; wanted one of A, B, C, D, E, F"),
    ("B", "AB", {}, "the format is 'AB'"),
    ("B", "", {}, "the format is ''"),
]


@pytest.mark.parametrize(("source", "target", "options", "words"), REFUSED)
def test_what_would_be_lost_is_named(tmp_path, base, source, target, options, words):
    folder = make(tmp_path / "source", source, base)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoadError, match=words) as error:
        convert(folder, tmp_path / "out", target, base=base if options else None)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_cannot_be_written(tmp_path, base, monkeypatch):
    folder = make(tmp_path / "source", "B", base)
    for out, words in (
        (folder, "exists already"),
        (folder / "config.json", "exists already"),
        (tmp_path / "no" / "such", "in an existing one"),
    ):
        with pytest.raises(LoadError, match=words):
            convert(folder, out, "A")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(LoadError, match="name a new directory"):
        convert(folder, ".", "A")
    assert convert(folder, tmp_path / "empty", "A").is_dir()


def test_nothing_stays_when_the_disk_is_full(tmp_path, base, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = make(tmp_path / "source", "B", base)
    monkeypatch.setattr("medusa_ext.loading.converting.write_tensors", full)
    with pytest.raises(LoadError, match="No space left on device; nothing was left"):
        convert(folder, tmp_path / "out", "E")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_belongs_to_heads_comes_along(tmp_path, base):
    folder = make(tmp_path / "source", "B", base)
    (folder / "calibration.json").write_text("{}")
    (folder / "README.md").write_text("card")
    there = convert(folder, tmp_path / "e", "E")
    assert (there / "README.md").read_text() == "card"
    whole = convert(folder, tmp_path / "d", "D", base=base)
    assert (whole / "calibration.json").read_text() == "{}"


@pytest.mark.parametrize("letter", "DF")
def test_the_heads_card_is_that_of_the_whole_model(tmp_path, base, letter):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "README.md").write_text("base")
    (model / "LICENSE").write_text("base's")
    folder = make(tmp_path / "source", "B", base)
    (folder / "README.md").write_text("heads")
    there = convert(folder, tmp_path / "there", letter, base=model)
    assert (there / "README.md").read_text() == "heads"
    assert (there / "README.base.md").read_text() == "base"
    assert (there / "LICENSE").read_text() == "base's"  # the heads have none
    again = convert(there, tmp_path / "again", "F" if letter == "D" else "D")
    assert (again / "README.md").read_text() == "heads"
    assert (again / "README.base.md").read_text() == "base"


def test_command(tmp_path, base, capsys):
    folder = make(tmp_path / "source", "B", base)
    out = tmp_path / "out"
    assert run(["convert", str(folder), str(out), "--to", "E"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert run(["convert", str(folder), str(tmp_path / "c"), "--to", "C"]) == 2
    assert "--base" in capsys.readouterr().err
