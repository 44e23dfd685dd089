"""What `medusa-ext train` refuses, and what is left where a run cannot go on."""

import errno
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from loading_util import make_model
from medusa_ext import cli, training
from medusa_ext.loading import LoadError
from medusa_ext.training import loss, medusa1
from medusa_ext.training.files import lock_folder
from medusa_ext.training.trainer import HeadsTrainer, TrainingError
from training_util import cycle, make_data, make_job, run, write_records


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, original, calls = make_job(tmp_path), loss.cross_entropy, []

    def sick(*args: Any, **kwargs: Any) -> Any:
        total, terms = original(*args, **kwargs)
        calls.append(total)
        return (total * float("nan") if len(calls) > 3 * 7 else total), terms

    monkeypatch.setattr(medusa1, "cross_entropy", sick)
    with pytest.raises(
        TrainingError, match=r"nan at step 8; delete .*heads\.work and start anew with a lower"
    ):
        run(job)
    assert (job.work / "checkpoint-6" / "trainer_state.json").exists()
    assert not job.out.exists()


@pytest.mark.parametrize(
    ("max_steps", "message"),
    [(1, "the held-out loss is nan after step 1"), (2, "is not finite after step 1")],
)
def test_a_step_that_blows_up_is_not_kept(tmp_path: Path, max_steps: int, message: str) -> None:
    """The last one, which is evaluated, and one before a checkpoint."""
    changes = {"max_steps": max_steps, "warmup": 0, "learning_rate": 1e39}
    job = make_job(tmp_path, save_every=1, **changes)
    with pytest.raises(TrainingError, match=message):
        run(job)
    assert not job.out.exists()
    assert not list(job.work.glob("checkpoint-*"))


def test_weights_are_looked_at_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the held-out text has no label for the head that blew up."""
    original = HeadsTrainer.evaluate

    def spoil(self: HeadsTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        figures = original(self, *args, **kwargs)
        next(self.model.parameters()).data.fill_(float("nan"))
        return figures

    monkeypatch.setattr(HeadsTrainer, "evaluate", spoil)
    job = make_job(tmp_path, max_steps=1, eval_every=100)
    with pytest.raises(TrainingError, match=r"heads\.blocks\..* is not finite after step 1"):
        run(job)
    assert not job.out.exists()


def test_weights_that_the_trainer_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP may rename them."""

    def renamed(_: Any, model: torch.nn.Module, **__: Any) -> dict[str, torch.Tensor]:
        return {f"_fsdp_wrapped_module.{k}": v for k, v in model.state_dict().items()}

    monkeypatch.setattr("accelerate.Accelerator.get_state_dict", renamed)
    job = make_job(tmp_path, max_steps=1)
    with pytest.raises(TrainingError, match=r"heads\.blocks\.0.* was trained, but is not among"):
        run(job)
    assert not job.out.exists()


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = make_job(tmp_path, save_every=100)
    with monkeypatch.context() as patch:
        patch.setattr("medusa_ext.training.report.Card.text", full)
        with pytest.raises(LoadError, match=r"cannot write .*heads: No space left on device"):
            run(job)
    assert not job.out.exists()
    assert not list(tmp_path.glob(".*"))

    job = make_job(tmp_path, "other")
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(LoadError, match=r"cannot write .*checkpoint-3: No space left"):
            run(job)
    assert sorted(path.name for path in job.work.iterdir()) == [".lock", "job.json"]

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # less than the heads
    try:
        with pytest.raises(LoadError, match=r"cannot write .*checkpoint-3: .*too large"):
            run(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in job.work.iterdir()) == [".lock", "job.json"]


def test_what_cannot_be_read_is_not_called_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(medusa1.CachedPositions, "__getitems__", broken)
    with pytest.raises(OSError, match="Input/output error"):
        run(make_job(tmp_path))


def test_a_run_that_only_lacks_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained again; a damaged checkpoint is named."""

    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("stopped")

    whole = make_job(tmp_path, "whole", max_steps=4)
    figures = run(whole)
    broken = make_job(tmp_path, "broken", max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr("medusa_ext.training.report.Card.text", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run(broken)
    job = make_job(tmp_path, "broken", max_steps=4, resume=True)
    path = job.work / "checkpoint-4" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:100])
    with pytest.raises(LoadError, match=r"cannot read .*checkpoint-4: .*; delete .*broken\.work"):
        run(job)
    path.write_bytes(data)
    monkeypatch.setattr(HeadsTrainer, "training_step", stop)
    assert run(job)["eval_loss"] == figures["eval_loss"]
    name = "medusa_lm_head.safetensors"
    assert (job.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with (
        lock_folder(job.work, wait=False),
        pytest.raises(LoadError, match=r"another run is writing to .*heads\.work; wait for it"),
    ):
        run(job)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rate", "is decided by the run; give --learning-rate instead"),
        ("output_dir", "is decided by the run; give --out instead"),
        ("label_names", "is decided by the run; leave it out"),
        ("no_such_option", "the Trainer refuses these arguments"),
    ],
)
def test_trainer_options_that_are_not_the_users(tmp_path: Path, name: str, message: str) -> None:
    job = make_job(tmp_path, options={name: 1})
    with pytest.raises(LoadError, match=message):
        run(job)
    assert not job.work.exists()


def test_several_gpus_need_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    with pytest.raises(LoadError, match=r"sees 4 GPUs; .* accelerate launch --num_processes 4 -m"):
        run(make_job(tmp_path))


@pytest.mark.parametrize("method", ["medusa1", "self-distill"])
def test_answers_too_short_for_heads(tmp_path: Path, method: str) -> None:
    job = make_job(tmp_path, method=method)
    write_records(job.data[0], [(cycle(i, 4), [0, 0, 1, 0]) for i in range(9)])
    with pytest.raises(LoadError, match=r"data\.jsonl: no answer of the records to learn from"):
        run(job)
    assert not job.work.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "medusa3"], "method is 'medusa3'; wanted one of medusa1, medusa2"),
        (["--num-heads", "0"], "num_heads is 0; wanted 1 or more"),
        (["--learning-rate", "nan"], "learning_rate is nan; wanted more than 0"),
        (["--head-layers", "0"], "leaves nothing to train"),
        (["--held-out", "1"], "held_out is 1.0; wanted from 0 to below 1"),
        (["--precision", "f16"], "precision is 'f16'; wanted bf16 or f32"),
        (["--eval-positions", "-5"], "eval_positions is -5; wanted 1 or more"),
        (["--save-every", "0"], "save_every is 0; wanted 1 or more"),
        (["--threads", "0"], "threads is 0; wanted 1 or more"),
        (["--method", "medusa2", "--loss-vocab", "9"], "are for the method medusa1"),
        (["--init-from", "nowhere"], "nowhere holds no Medusa heads"),
        (["--out", "."], "exists; give --out a folder that does not"),
        (["--data", "none.jsonl"], "cannot read none.jsonl: No such file"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    make_data(Path("data.jsonl"), 4)
    given = ["train", "model", "--out", "heads"]
    given += [] if "--data" in arguments else ["--data", "data.jsonl"]
    before = sorted(path.name for path in Path().iterdir())
    assert cli.run([*given, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) in (
        before,
        sorted([*before, "heads.work"]),
    )


def test_data_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model")
    path = write_records(tmp_path / "d.jsonl", [([5, 49000, 7], [0, 1, 1])])
    arguments = [
        "train",
        str(tmp_path / "model"),
        "--data",
        str(path),
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.run(arguments) == 2
    assert (
        "d.jsonl, line 1: token 49000 is outside the model's vocabulary of 320"
        in capsys.readouterr().err
    )


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = training.importlib.util.find_spec
    monkeypatch.setattr(
        training.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    assert cli.run(["train", "demo", "--data", "d.jsonl", "--out", "o"]) == 2
    assert 'training needs peft; install what it needs with: pip install "medusa_ext[train]"' in (
        capsys.readouterr().err
    )
