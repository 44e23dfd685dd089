"""`medusa-ext calibrate`: held-out text -> ranks -> the tree, its step times, and a check."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medusa_ext import _core
from medusa_ext.calibration.file import (
    STATIC,
    Calibration,
    device_of,
    kind_of_row,
    kind_of_trees,
    predictions,
    read_calibration,
    write_calibration,
)
from medusa_ext.calibration.guesses import short
from medusa_ext.calibration.predict import Content, statistics
from medusa_ext.calibration.ranks import collect
from medusa_ext.calibration.step_times import PREFILL_CHUNK, Decoders, answer
from medusa_ext.calibration.texts import Text, read_data, read_prompts
from medusa_ext.device import check_model, kind_of, open_device
from medusa_ext.distill.prompts import Prompt
from medusa_ext.distill.records import read_records
from medusa_ext.loading import (
    LoadedModel,
    LoadError,
    check_types,
    load_checkpoint,
    open_checkpoint,
)
from medusa_ext.loading.exporting import CALIBRATION_FILE
from medusa_ext.loading.ngrams import (
    NGRAMS_FILE,
    Ngrams,
    count_ngrams,
    find_ngrams,
    read_ngrams,
    save_ngrams,
)
from medusa_ext.memory import Guesses, Limits, Sizes, check_memory
from medusa_ext.options import integer
from medusa_ext.prompts import PromptEncoder
from medusa_ext.trees import MAX_NODES, MAX_RANKS

NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
TIMED_PROMPTS = 8
TIMED_TOKENS = 64
_ANSWERS_AT_ONCE = 8

# progress(what, how many in all) -> done(how many more)
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Request:
    """What to calibrate, and how.

    Attributes:
        model: as for `Engine`.
        heads: as for `Engine`.
        data: JSONL of records or prompts to learn from; None: only step times are measured, for
            heads that carry a calibration.
        ngrams: JSONL of records to count anew which tokens follow which; None given: what
            ngrams.safetensors beside the heads says.
        prompts: JSONL of prompts for the check; None: no check.
        out: folder of calibration.json; None: that of the heads.
        nodes: numbers of nodes to measure, the root counted; 1, plain decoding, always is. None
            given: those that were calibrated before, or NODES.
        max_new_tokens: of an answer to a prompt.
        device: as for `Engine`.
        weights: as for `Engine`.
        dtype: as for `Engine`.
        threads: as for `Engine`.
        lookup: whether the text so far takes part where decoding is timed and checked; None: as in
            an `Engine` on this device, which on a GPU takes the static tree.
        local_files_only: as for `Engine`.
    """

    model: str
    heads: str = "auto"
    data: Path | None = None
    ngrams: Sequence[Path] = ()
    prompts: Path | None = None
    out: Path | None = None
    nodes: Sequence[int] = ()
    max_new_tokens: int = 128
    device: str = "auto"
    weights: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    lookup: bool | None = None
    local_files_only: bool = False


def calibrate(request: Request, progress: Progress) -> tuple[Content, Path]:
    """Calibrate heads and write calibration.json.

    Returns:
        The file's content, and its path.

    Raises:
        LoadError, ValueError: something given is impossible; nothing was written.
        NotImplementedError, MemoryError, medusa_ext.CudaError: as `Engine`.
    """
    check_types(request.weights, request.dtype)
    integer("max_new_tokens", request.max_new_tokens, 2)
    backend = open_device(request.device, threads=request.threads)
    checkpoint = open_checkpoint(
        request.model, request.heads, local_files_only=request.local_files_only
    )
    info, config = checkpoint.heads_info, checkpoint.config
    if info is None:
        raise LoadError(
            f"{request.model} has no Medusa heads; name them: medusa-ext calibrate MODEL HEADS"
        )
    path = _output(request.out or info.path)
    data, content = None, dict[str, Any]()
    if request.data is not None:
        data = read_data(
            request.data,
            model=request.model,
            vocab_size=config["vocab_size"],
            max_context=config["max_context"],
        )
    elif path.is_file():
        content = read_calibration(path, config).content
        if request.lookup and "guesses" not in content:
            raise LoadError(
                f"{path} does not say what lookup is worth; make it again with --data, or leave "
                "--lookup out"
            )
        if request.ngrams:
            raise LoadError(
                "--ngrams changes what everything else follows from; give held-out text with "
                "--data too"
            )
    else:
        raise LoadError(
            f"{path} does not exist yet; give held-out text with --data, which it is made from"
        )
    nodes = _sizes(request.nodes, content, path)
    ngrams, beside = find_ngrams(checkpoint), path.with_name(NGRAMS_FILE)
    if data is None and beside.is_file():  # that which the calibration beside it knows
        ngrams = read_ngrams(beside, str(beside), config["vocab_size"])
    if request.data in request.ngrams:
        warnings.warn(
            f"{request.data} is counted by --ngrams and predicted on: what is said of it is too "
            "good; give text of its own with --data",
            stacklevel=2,
        )
    if request.ngrams:
        records = (
            record
            for file in request.ngrams
            for record in read_records(
                file, vocab_size=config["vocab_size"], max_context=config["max_context"]
            )
        )
        ngrams = count_ngrams(records, config["vocab_size"])
    asked = [] if request.prompts is None else read_prompts(request.prompts)
    kind = kind_of(backend.name)
    stored = checkpoint.stored(request.weights, request.dtype, kind)
    check_model(config, stored.dtype, kind)
    limits = Limits(max_batch=_ANSWERS_AT_ONCE).within(config["max_context"])
    guesses = Guesses(max(nodes), config["heads"]["num_heads"])
    sizes = Sizes(checkpoint, kind, stored, limits, guesses)
    check_memory(sizes, backend)

    loaded = load_checkpoint(
        checkpoint, weights=request.weights, dtype=request.dtype, backend=backend
    )
    work = _Work(loaded, request.max_new_tokens, progress)
    prompts = [] if not asked else work.encode(asked)
    texts = [] if data is None else work.texts(data)
    seen = [text.tokens[: text.answers[0][0]] for text in texts]
    timed = work.timed(seen or prompts)
    context = work.context(timed, prompts)
    _check_sessions(sizes, len(nodes), context, backend)
    if data is not None:
        content = {
            "version": 1,
            "model": request.model,
            "vocab_size": config["vocab_size"],
            "data": "" if request.data is None else request.data.name,
            **work.statistics(texts, nodes, ngrams),
            "step_times": [],
        }
    nodes = [count for count in nodes if count <= len(content["tree"]) + 1]
    calibration = Calibration(content["tree"], content["step_times"], content, ngrams)
    trees = kind_of_trees(request.lookup, "auto", calibration, kind)
    decoders = Decoders(loaded.model, calibration, nodes, context, trees)
    row = {
        "device": kind,
        "detail": backend.detail,
        "weights": stored.text,
        "dtype": stored.dtype,
        "threads": backend.threads,
        "guesses": trees,
    }
    row |= work.step_times(decoders, predictions(content, trees), timed)
    others = [other for other in content["step_times"] if device_of(other) != device_of(row)]
    content["step_times"] = [*others, row]
    if asked:
        known = {tuple(prompt) for prompt in seen}
        repeated = sum(tuple(prompt) in known for prompt in prompts)
        if repeated:
            warnings.warn(
                f"{repeated} of the {len(prompts)} prompts of the check were calibrated on; what "
                "it says of these is no prediction",
                stacklevel=2,
            )
        content["check"] = work.check(decoders, asked, prompts, content, row)
    if ngrams is not None and (request.ngrams or (data is not None and not beside.is_file())):
        save_ngrams(beside, ngrams)
    write_calibration(path, content)
    return content, path


def _output(folder: Path) -> Path:
    """The file to write, in a folder that can be written to."""
    if not folder.is_dir():
        raise LoadError(f"cannot write into {folder}; give an existing directory with --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LoadError(f"no permission to write into {folder}; give another directory with --out")
    return folder / CALIBRATION_FILE


def _sizes(asked: Sequence[int], content: Content, path: Path) -> list[int]:
    """Numbers of nodes to measure; without new data only those that are predicted."""
    wanted = {integer("nodes", count, 1, MAX_NODES) for count in asked}
    if not content:
        return sorted({1, *(wanted or NODES)})
    known = {row["nodes"] for row in content["predicted"]}
    if wanted - known:
        raise LoadError(
            f"{path} predicts nothing for {_listed(wanted - known)} nodes; it knows "
            f"{_listed(known)}: give --nodes of these, or --data too"
        )
    return sorted({1, *(wanted or known)})


def _listed(counts: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(counts)))


def _check_sessions(sizes: Sizes, count: int, context: int, backend: _core.Backend) -> None:
    """Refuse, with MemoryError, more sessions than the device holds beside the model."""
    limits = Limits(
        max_batch=count,
        max_context=context,
        cache_tokens=count * context,
        prefill_chunk=min(count * PREFILL_CHUNK, 8192),
    )
    # What a GPU has free lacks the weights already.
    rest = sizes.checkpoint if sizes.device == "cpu" else replace(sizes.checkpoint, entries=[])
    try:
        check_memory(replace(sizes, checkpoint=rest, limits=limits), backend)
    except MemoryError as error:
        reason = str(error).rpartition("; ")[0]
        raise MemoryError(
            f"{count} sizes of trees are timed side by side, with a context of {context} tokens: "
            f"{reason}; give fewer --nodes or shorter prompts"
        ) from None


class _Work:
    """A loaded model and what is done with it."""

    def __init__(self, loaded: LoadedModel, max_new_tokens: int, progress: Progress) -> None:
        self.loaded, self.config = loaded, loaded.config
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.max_context: int = self.config["max_context"]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the first turns, with the chat template where the model has one."""
        encoder = PromptEncoder(
            self.loaded.tokenizer, self.loaded.chat_template, self.config["vocab_size"]
        )
        most = self.max_context - 1  # of new tokens
        room = self.max_context - integer("max_new_tokens", self.max_new_tokens, 2, most)
        asked: list[object] = []
        for one in prompts:
            system = [] if one.system is None else [{"role": "system", "content": one.system}]
            messages = [*system, {"role": "user", "content": one.turns[0]}]
            asked.append(messages if self.loaded.chat_template else one.turns[0])
        return encoder.encode_batch(asked, room)[0]

    def texts(self, data: list[Text] | list[Prompt]) -> list[Text]:
        """Records as they are; prompts with the model's answers."""
        texts = [one for one in data if isinstance(one, Text)]
        prompts = [one for one in data if isinstance(one, Prompt)]
        if not prompts:
            return texts
        encoded = self.encode(prompts)
        session = _core.Session(self.loaded.model, None, max_batch=_ANSWERS_AT_ONCE)
        done = self.progress("answers", len(prompts))
        answers = answer(
            session, encoded, self.max_new_tokens, self.loaded.eos_ids, lambda: done(1)
        )
        return [
            Text(tokens + made, [(len(tokens), len(tokens) + len(made))], one.category or "")
            for one, tokens, made in zip(prompts, encoded, answers, strict=True)
        ]

    def statistics(
        self, texts: Sequence[Text], nodes: Sequence[int], ngrams: Ngrams | None
    ) -> Content:
        """What the texts say of heads and trees, see `predict`."""
        heads = self.config["heads"]
        ranks = collect(
            self.loaded.model,
            texts,
            num_heads=heads["num_heads"],
            num_ranks=min(MAX_RANKS, heads["head_vocab"]),
            hidden_size=self.config["hidden_size"],
            done=self.progress("ranks", sum(len(text.tokens) for text in texts)),
        )
        sizes = [count for count in nodes if count > 1] or NODES[1:]
        return statistics(ranks, ngrams, nodes, sizes)

    def timed(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Some of the prompts, of every kind, to take the time of steps after."""
        room = self.max_context - TIMED_TOKENS
        fitting = [prompt for prompt in prompts if len(prompt) <= room]
        fitting = fitting[:: -(-len(fitting) // TIMED_PROMPTS) or 1]
        # The text hardly matters: what a step takes depends on its rows.
        return fitting or [list(range(min(TIMED_TOKENS, self.config["vocab_size"])))]

    def context(self, timed: Sequence[list[int]], checked: Sequence[list[int]]) -> int:
        """Tokens that a session must hold."""
        ends = [len(prompt) + TIMED_TOKENS for prompt in timed]
        ends += [len(prompt) + self.max_new_tokens for prompt in checked]
        return min(max(ends) + 1, self.max_context)

    def step_times(
        self, decoders: Decoders, predicted: dict[int, Content], prompts: Sequence[list[int]]
    ) -> Content:
        """Seconds of a step, tokens/s that follow, and the best number of nodes."""
        done = self.progress("step times", len(prompts) * len(decoders.sessions))
        seconds = decoders.step_times(prompts, TIMED_TOKENS, lambda: done(1))
        rates = {
            count: row["tokens_per_later_step"] / seconds[count]
            for count, row in predicted.items()
            if count in seconds
        }
        return {
            "seconds": {str(count): short(value) for count, value in seconds.items()},
            "tokens_per_s": {str(count): short(rate) for count, rate in rates.items()},
            "nodes": max(rates, key=lambda count: rates[count], default=1),
        }

    def check(
        self,
        decoders: Decoders,
        asked: Sequence[Prompt],
        prompts: Sequence[list[int]],
        content: Content,
        times: Content,
    ) -> Content:
        """Decode prompts that were not used: what was predicted, and what is."""
        nodes = list(decoders.sessions)
        done = self.progress("check", len(prompts) * len(nodes))
        measured: dict[tuple[str, int], _Measured] = {}
        for one, tokens in zip(asked, prompts, strict=True):
            texts = set()
            for count in nodes:
                made, stats = decoders.decode(
                    count, tokens, self.max_new_tokens, self.loaded.eos_ids
                )
                texts.add(tuple(made))
                for category in {one.category or "", ""}:
                    measured.setdefault((category, count), _Measured()).add(len(made), stats)
                done(1)
            if len(texts) > 1:
                raise _core.InternalError("trees changed the text; please report this")
        kind = kind_of_row(times)
        predicted = predictions(content, kind)
        by_category = {}
        for name in sorted({one.category for one in asked if one.category}):
            known = content["by_category"].get(name, {})
            known = known.get("tokens_per_step" if kind == STATIC else kind, {})
            by_category[name] = {
                str(count): {
                    "predicted": known.get(str(count)),
                    "measured": short(measured[name, count].tokens_per_step),
                }
                for count in nodes
            }
        return {
            "device": device_of(times),
            "prompts": len(prompts),
            "max_new_tokens": self.max_new_tokens,
            "all": [
                {
                    "nodes": count,
                    "predicted": predicted[count]["tokens_per_step"],
                    "measured": short(measured["", count].tokens_per_step),
                    "predicted_tokens_per_s": times["tokens_per_s"].get(str(count)),
                    "measured_tokens_per_s": short(measured["", count].tokens_per_s),
                }
                for count in nodes
                if count in predicted
            ],
            "by_category": by_category,
        }


@dataclass
class _Measured:
    """Sums over texts."""

    tokens: int = 0
    steps: int = 0
    later_tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, stats: _core.RequestStats) -> None:
        self.tokens += tokens
        self.steps += stats.steps
        self.later_tokens += tokens - 1  # the first one comes with the prefill
        self.seconds += stats.decode_s

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(self.steps, 1)

    @property
    def tokens_per_s(self) -> float:
        return self.later_tokens / self.seconds if self.seconds else 0.0
