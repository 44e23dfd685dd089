"""`medusa-ext train`: heads learn, runs repeat and resume to the bit, nothing is half-written."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainingArguments

from loading_util import make_gguf, make_heads, make_model, record, reference_model
from medusa_ext import Engine
from medusa_ext.loading import LoadError, open_checkpoint
from medusa_ext.loading.ngrams import NGRAMS_FILE, count_ngrams, read_ngrams
from medusa_ext.training import medusa1, medusa2
from medusa_ext.training.data import read_data
from medusa_ext.training.heads import lm_head, new_heads
from medusa_ext.training.hidden_cache import make_rows, open_hidden_states
from medusa_ext.training.medusa1 import HeadsModel
from medusa_ext.training.report import HiddenProgress, Progress
from medusa_ext.training.settings import METHODS, Settings
from medusa_ext.training.trainer import HeadsTrainer
from training_util import cycle, make_data, make_job, run


def weights(job: Any) -> dict[str, torch.Tensor]:
    """What a run wrote: the heads, or the whole model with them."""
    name = "medusa_lm_head" if job.settings.method == "medusa1" else "model"
    return load_file(job.out / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, float]]:
    """Heads that had time to learn the cycle, and their figures."""
    folder = tmp_path_factory.mktemp("learned")
    job = make_job(folder, max_steps=120, learning_rate=0.02, head_layers=2, held_out=0.1)
    return job, run(job)


def test_heads_learn(learned: tuple[Any, dict[str, float]]) -> None:
    """The cycle says every token ahead, so each head can know its own."""
    _, figures = learned
    assert all(figures[f"eval_head{head}_top1"] > 70 for head in range(3))  # of 16, at random 6
    assert figures["eval_tokens_per_step_16"] > 3.3  # of 4 with three heads


def test_the_folder_is_format_c_and_the_engine_runs_it(learned: tuple[Any, Any]) -> None:
    job, _ = learned
    state = weights(job)
    assert set(state) == {
        f"{h}.{layer}.linear.{kind}"
        for h in range(3)
        for layer in range(2)
        for kind in ("weight", "bias")
    }
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    loaded = record(job.model, job.out, dtype="f32")
    assert (loaded.heads_info.format, loaded.heads_info.shared_lm_head) == ("C", True)
    for name, value in state.items():
        head, layer, _, kind = name.split(".")
        found = torch.from_numpy(loaded.model.tensors[f"heads.{head}.{layer}.{kind}"].copy())
        assert torch.equal(found, value.float())
    with (
        Engine(job.model, job.out, threads=1) as engine,
        Engine(job.model, None, threads=1) as plain,
    ):
        options = {"max_new_tokens": 40, "temperature": 0.8, "seed": 3}
        drafted = engine.generate(cycle(0, 8), **options)
        assert drafted.token_ids == plain.generate(cycle(0, 8), **options).token_ids
        assert "3 Medusa heads" in repr(engine)


def test_the_folder_explains_itself(learned: tuple[Any, dict[str, float]]) -> None:
    job, figures = learned
    card = (job.out / "README.md").read_text()
    for text in ("48 records of data.jsonl", "medusa1", "| seed | 0 |", "Licence", "| 2 | "):
        assert text in card, text
    assert (job.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((job.out / "training.json").read_text())
    assert told["figures"] == figures
    steps = [entry["step"] for entry in told["history"] if "head2_loss" in entry]
    assert steps == list(range(2, 121, 2))
    assert not job.work.exists()
    tokens = json.loads((job.out / "draft_tokens.json").read_text())
    assert sorted(tokens) == list(range(320))
    assert set(tokens[:16]) == set(cycle(0, 16))  # what the data are made of
    table = read_ngrams(job.out / NGRAMS_FILE, "it", 320)
    assert table.contexts.tolist() == sorted(cycle(0, 16))
    following = dict(pairwise(cycle(0, 17)))
    assert table.tokens.tolist() == [following[token] for token in table.contexts.tolist()]
    data = read_data(job.data, vocab_size=320, max_context=128, held_out=0.1)
    assert table.unseen.tolist() == count_ngrams(data.learned(), 320).unseen.tolist()
    assert table.unseen.tolist() != count_ngrams(data.records, 320).unseen.tolist()


def test_heads_begin_as_the_model(tmp_path: Path) -> None:
    """Zero blocks: each head says what the model says, so its loss on the model's own token is
    the model's."""
    make_model(tmp_path / "m")
    heads = new_heads(open_checkpoint(tmp_path / "m"), 2, 3)
    x = torch.randn(5, 32)
    assert all(torch.equal(out, x) for out in heads(x))
    assert len(heads(x)) == 2


def test_one_seed_one_result(tmp_path: Path) -> None:
    first, again = make_job(tmp_path, "a"), make_job(tmp_path, "b")
    other = make_job(tmp_path, "c", seed=1)
    for job in (first, again, other):
        run(job)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize("method", ["medusa1", "self-distill", "medusa2"])
def test_a_killed_run_resumes_to_the_same_result(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two checkpoints, in the middle of an epoch; dropout and order go on."""
    changes = {"method": method, "accumulate": 2, "max_steps": 8, "heads_epochs": 0.5}
    whole = make_job(tmp_path, "whole", **changes)
    figures = run(whole)
    broken = make_job(tmp_path, "broken", **changes)
    step = HeadsTrainer.training_step

    def killed(self: HeadsTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 5 and self.args.output_dir == str(broken.work):
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(HeadsTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    assert not broken.out.exists()
    assert [path.name for path in broken.work.glob("checkpoint*")] == ["checkpoint-3"]
    with pytest.raises(LoadError, match="go on with --resume, or delete"):
        run(broken)
    monkeypatch.setattr(HeadsTrainer, "training_step", step)
    with pytest.raises(LoadError, match="belongs to a run with seed 0, not 1"):
        run(make_job(tmp_path, "broken", resume=True, seed=1, **changes))
    with pytest.raises(LoadError, match=r"run with options \{\}, not \{'max_grad_norm': 0\.5\}"):
        run(make_job(tmp_path, "broken", resume=True, options={"max_grad_norm": 0.5}, **changes))
    resumed = run(make_job(tmp_path, "broken", resume=True, **changes))
    assert same(weights(whole), weights(broken))
    assert resumed["eval_loss"] == figures["eval_loss"]


def test_going_on_from_heads(learned: tuple[Any, dict[str, float]]) -> None:
    """What is there is kept, further heads begin as the last one, further layers as zero."""
    job, _ = learned
    heads = new_heads(open_checkpoint(job.model), 4, 3, start=job.out)
    state = heads.tensors()
    for name, value in weights(job).items():
        assert torch.equal(state[name], value)
    assert torch.equal(state["3.1.linear.weight"], state["2.1.linear.weight"])
    assert not state["3.2.linear.weight"].any()
    with pytest.raises(LoadError, match="holds 3 heads of 2 layers; wanted at most 1 of 2"):
        new_heads(open_checkpoint(job.model), 1, 2, start=job.out)
    own = make_heads(job.out.parent / "own", "B")
    with pytest.raises(LoadError, match="go on with --own-lm-head"):
        new_heads(open_checkpoint(job.model), 3, 1, start=own)
    new_heads(open_checkpoint(job.model), 3, 1, own_lm_head=True, start=own)


@pytest.mark.parametrize(
    "changes",
    [{"own_lm_head": True}, {"soft_share": 0.5, "run_length": 4}, {"loss_vocab": 12}],
    ids=str,
)
def test_other_ways_to_learn(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged over the whole vocabulary of 320, whatever the loss knew."""
    monkeypatch.setattr(medusa1, "_SAMPLE", 64)
    changes = {"max_steps": 60, "learning_rate": 0.02, "head_layers": 2} | changes
    job = make_job(tmp_path, precision="f32", held_out=0.1, **changes)
    figures = run(job)
    assert figures["eval_head0_top5"] > 40
    if "own_lm_head" in changes:
        state = weights(job)
        assert state["0.2.weight"].shape == (320, 32)
        assert not torch.equal(state["0.2.weight"], state["1.2.weight"])
        assert record(job.model, job.out).heads_info.format == "B"
    if "loss_vocab" in changes:
        assert "The loss knows 12 tokens" in (job.out / "README.md").read_text()


def test_a_batch_is_counted_in_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them stay together."""
    sizes, paces, loss = [], [], HeadsModel._loss

    def seen(
        self: HeadsModel, outputs: list[torch.Tensor], labels: torch.Tensor, *teacher: Any
    ) -> torch.Tensor:
        sizes.append(len(labels))
        return loss(self, outputs, labels, *teacher)

    class Pace(Progress):
        def __init__(self, num_heads: int, tokens_per_step: float, console: Console) -> None:
            super().__init__(num_heads, tokens_per_step, console)
            paces.append(tokens_per_step)

    monkeypatch.setattr(HeadsModel, "_loss", seen)
    monkeypatch.setattr("medusa_ext.training.run.Progress", Pace)
    run(make_job(tmp_path, soft_share=0.5, run_length=8, max_steps=2, accumulate=2))
    assert len(sizes) == 4
    assert all(56 < size <= 64 for size in sizes)  # the last item of the data is shorter
    assert paces == [128]


def test_batches_as_the_methods_were_published() -> None:
    found = {}
    for method in METHODS:
        chosen = Settings(method=method).with_defaults()
        found[method] = chosen.batch_size, chosen.accumulate
    assert found == {"medusa1": (1024, 1), "medusa2": (8, 8), "self-distill": (8, 16)}


def test_own_projections_are_multiplied_in_bf16(tmp_path: Path) -> None:
    """They begin as copies of the model's, so the loss is the same to the bit."""
    make_model(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    x, labels = torch.randn(9, 32), torch.randint(320, (9, 2))
    found = []
    for own in (False, True):
        heads = new_heads(checkpoint, 2, 1, own_lm_head=own)
        model = HeadsModel(heads, lm_head(checkpoint), Settings()).train()
        found.append(model(x, labels)["loss"])
    assert torch.equal(*found)
    found[1].backward()
    assert {value.grad.dtype for value in heads.projections} == {torch.float32}


def test_soft_labels_are_the_models_own_distribution(tmp_path: Path) -> None:
    """The loss of a batch, from logits that the engine gives for the positions ahead."""
    job = make_job(tmp_path)
    checkpoint = open_checkpoint(job.model)
    settings = Settings(
        num_heads=2, soft_share=1.0, soft_top_k=320, run_length=3, precision="f32"
    ).with_defaults()
    data = read_data(job.data, vocab_size=320, max_context=128, held_out=0.1)
    rows = make_rows(data)
    states = open_hidden_states(checkpoint, data, tmp_path / "cache")
    learn, _ = medusa1.positions(states, rows, settings, 10)
    model, _ = medusa1.build(checkpoint, new_heads(checkpoint, 2, 1), rows, settings)
    batch = learn.__getitems__([4, 0])
    found = model.train()(**batch)["loss"]

    projection = model.lm_head.float()
    at = [learn.chosen[index] for index in (12, 13, 14, 0, 1, 2)]
    expected = torch.zeros(())
    for head in range(2):
        valid = [row for row in at if rows.labels(row[None], 2)[0, head] >= 0]
        log_p = (states.read(torch.tensor(valid).numpy()).float() @ projection.t()).log_softmax(-1)
        ahead = states.read((torch.tensor(valid) + 1 + head).numpy()).float() @ projection.t()
        expected += 0.8**head * -(ahead.softmax(-1) * log_p).sum(-1).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_sample_stands_for_all_rare_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of what the softmax divides by, over many draws, is that of the whole vocabulary."""
    monkeypatch.setattr(medusa1, "_SAMPLE", 40)
    make_model(tmp_path / "m")
    heads = new_heads(open_checkpoint(tmp_path / "m"), 1, 1)
    projection, x = torch.randn(320, 32) / 8, torch.randn(4, 32)
    model = HeadsModel(heads, projection, Settings(precision="f32"), np.arange(0, 320, 20))
    sums = []
    for _ in range(400):
        chosen, lift = model._draw()
        assert len(chosen) == 16 + 40
        sums.append((x @ projection[chosen].t() + lift.t()).exp().sum(-1))
    expected = (x @ projection.t()).exp().sum(-1)
    # One draw is off by about 20 %, so the mean of 400 by 1 %.
    torch.testing.assert_close(torch.stack(sums).mean(0), expected, rtol=0.05, atol=0)


def test_the_share_of_the_heads_rises_as_a_sine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, shares = make_job(tmp_path, method="self-distill", max_steps=4), []
    share = medusa2.TunedModel._heads_share

    def seen(self: medusa2.TunedModel) -> float:
        shares.append(share(self))
        return shares[-1]

    monkeypatch.setattr(medusa2.TunedModel, "_heads_share", seen)
    run(job)
    expected = [0.01 * math.sin(math.pi / 2 * step / 4) for step in range(4) for _ in range(3)]
    assert shares == pytest.approx(expected)


@pytest.mark.parametrize("method", ["medusa2", "self-distill"])
def test_medusa2_merges_into_a_model_that_loads(tmp_path: Path, method: str) -> None:
    """LoRA changed the model; the merged directory is what it was trained to be."""
    changes = {"method": method, "learning_rate": 5e-3, "precision": "f32", "head_share": 0.2}
    make_model(tmp_path / "model", tie_word_embeddings=True)
    make_data(tmp_path / "data.jsonl")
    for name in ("LICENSE", "calibration.json"):
        (tmp_path / "model" / name).write_text("{}")
    job = make_job(tmp_path, heads_epochs=0.5, **changes)
    figures = run(job)
    state, before = weights(job), load_file(Path(job.model) / "model.safetensors")
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(
        state["model.embed_tokens.weight"], before["model.embed_tokens.weight"].bfloat16()
    )
    assert "medusa_head.2.0.linear.bias" in state
    assert (job.out / "LICENSE").exists()
    assert not (job.out / "calibration.json").exists()  # of the model as it was
    assert len(read_ngrams(job.out / NGRAMS_FILE, "it", 320).contexts) == 16
    config = json.loads((job.out / "config.json").read_text())
    assert (config["medusa_num_heads"], config["tie_word_embeddings"]) == (3, False)

    # The figures, from transformers' own forward passes of the merged and the original model.
    data = read_data(job.data, vocab_size=320, max_context=128, held_out=0.02)
    learned, original, total = [], [], []
    merged, base = reference_model(job.out), reference_model(Path(job.model))
    for one, out in zip(data.records, data.held_out, strict=True):
        if out:
            ids = torch.from_numpy(one.ids)[None].long()
            at = torch.from_numpy(one.generated[1:]).nonzero()[:, 0]
            with torch.no_grad():
                p, q = (model(ids).logits[0, at].log_softmax(-1) for model in (merged, base))
            learned.append(-p[torch.arange(len(at)), ids[0, at + 1]])
            original.append(-q[torch.arange(len(at)), ids[0, at + 1]])
            total.append((q.exp() * (q - p)).sum(-1))
    for name, values in (("", learned), ("_before", original)):
        # The merged weights are rounded to bf16.
        expected = torch.cat(values).mean().item()
        assert figures[f"eval_base_loss{name}"] == pytest.approx(expected, rel=0.02)
    assert figures["eval_base_kl"] == pytest.approx(
        torch.cat(total).mean().item(), rel=0.1, abs=1e-3
    )
    if method == "medusa2":
        assert figures["eval_base_loss"] < figures["eval_base_loss_before"]
        assert "After the first stage" in (job.out / "README.md").read_text()
    with Engine(job.out, threads=1) as engine, Engine(job.out, None, threads=1) as plain:
        assert "3 Medusa heads" in repr(engine)
        found = engine.generate(cycle(0, 8), max_new_tokens=30)
        assert found.token_ids == plain.generate(cycle(0, 8), max_new_tokens=30).token_ids


def test_what_is_for_the_trainer_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both stages: an option, checkpointing of activations, and logs for TensorBoard."""
    pytest.importorskip("tensorboard")
    checkpoints, loss = [], medusa2.TunedModel._loss

    def seen(self: medusa2.TunedModel, *args: Any) -> torch.Tensor:
        checkpoints.append(self._causal.model.layers[0].gradient_checkpointing)
        return loss(self, *args)

    monkeypatch.setattr(medusa2.TunedModel, "_loss", seen)
    known = {field.name for field in fields(TrainingArguments)}
    name = {"activation_checkpointing", "gradient_checkpointing"} & known
    options = {min(name): True, "max_grad_norm": 1e-9}
    job = make_job(
        tmp_path, method="medusa2", heads_epochs=0.2, max_steps=2, options=options, tensorboard=True
    )
    run(job)
    assert checkpoints == [True, True]
    told = json.loads((job.out / "training.json").read_text())
    assert any(entry.get("grad_norm", 0) > 1e-9 for entry in told["history"])  # before it is cut
    for folder in (job.work, job.work / "heads.work"):
        assert list(folder.glob("runs/**/events*"))
    shutil.rmtree(job.out)
    run(job)  # logs are not what a run has reached


def test_a_gguf_model_learns_too(tmp_path: Path) -> None:
    """transformers expands the file to the weights that our loader reads."""
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl")
    path = make_gguf(tmp_path / "tiny.gguf", tmp_path / "model", kind="F16")
    job = make_job(tmp_path, model=str(path), method="self-distill", max_steps=3, lora_dropout=0.0)
    figures = run(job)
    causal = medusa2._load_causal(open_checkpoint(path, None), job.settings.with_defaults())
    ours = record(path, None, dtype="bf16").model.tensors
    for name, theirs in (("q_proj", "self_attn.q_proj"), ("down_proj", "mlp.down_proj")):
        found = causal.state_dict()[f"model.layers.1.{theirs}.weight"]
        stored = torch.from_numpy(ours[f"layers.1.{name}.weight"].copy())
        assert torch.equal(found, stored.bfloat16())
    assert figures["eval_base_kl"] < 0.01
    with Engine(job.out, threads=1) as engine, Engine(path, None, threads=1) as original:
        assert engine.eos_token_id == original.eos_token_id
        assert engine.tokenizer.encode("at the") == original.tokenizer.encode("at the")


def test_two_processes(tmp_path: Path) -> None:
    """Under accelerate's launcher: the same batches, divided, give nearly the same heads."""
    alone = make_job(tmp_path, "alone", precision="f32", max_steps=6)
    run(alone)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    command += ["-m", "medusa_ext", "train", alone.model, "--data", str(alone.data[0])]
    command += ["--out", str(tmp_path / "both"), "--num-heads", "3", "--batch-size", "32"]
    command += ["--warmup", "2", "--max-steps", "6", "--precision", "f32", "--threads", "1"]
    shutil.rmtree(tmp_path / "data.hidden")  # one of them computes it again
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("48 records of data.jsonl") == 1
    both, expected = load_file(tmp_path / "both" / "medusa_lm_head.safetensors"), weights(alone)
    for name, value in expected.items():
        # The means of two halves are not quite the mean of all: some rows have no third label.
        # The first steps of Adam take signs of gradients, however small.
        torch.testing.assert_close(both[name].float(), value.float(), atol=4e-3, rtol=0.1)


def test_inference_imports_nothing_of_training() -> None:
    code = (
        "import sys, medusa_ext, medusa_ext.cli\n"
        "found = {'torch', 'peft', 'accelerate', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_progress_on_a_terminal_and_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"loss": 3.21, "head0_loss": 2.5, "head1_loss": 4.5, "learning_rate": 0.1}
    figures = {f"eval_head{h}_top{n}": 10.0 * h + n for h in range(2) for n in (1, 5, 10)}
    figures |= {"eval_loss": 3.3, "eval_tokens_per_step_16": 1.8, "eval_tokens_per_step_64": 2.1}
    progress = Progress(2, 1000.0, Console(force_terminal=True, width=160))
    progress.step, progress.total = 10, 40
    progress.last |= logs | figures
    with progress.console.capture() as shown:
        progress.console.print(progress.table())
    for text in ("step 10/40", "tokens/s", "left", "2.50", "11.00", "20.00", "2.10 tokens/step"):
        assert text in shown.get(), text
    assert "heads 2.50 4.50" in progress.line(logs)
    assert "top-5 5.0 15.0 %" in progress.line(figures)
    assert progress.line({"learning_rate": 0.1}) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_hidden_states_show_how_long_they_take(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter((100.0, 110.0, 140.0, 145.0))
    monkeypatch.setattr("medusa_ext.training.report.time.monotonic", lambda: next(now))
    shown = StringIO()
    progress = HiddenProgress(Console(file=shown, force_terminal=terminal, width=160))
    for done in (100, 2000, 2500):
        progress(done, 6000)
    line = "hidden states: 2,000/6,000 tokens, 50 tokens/s, 1:20 left\n"
    assert shown.getvalue() == ("" if terminal else line)
    assert "2,500/6,000 tokens" in str(progress.status.status)
