"""The engine: a loaded model that completes prompts, one step of several tokens at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.answers import Answer, Batch, Stream, Submission, complete
from medusa_ext.calibration.file import (
    LOOKUP,
    STATIC,
    Calibration,
    auto_tree,
    check_lookup,
    find_calibration,
    kind_of_trees,
)
from medusa_ext.chat import Chat
from medusa_ext.detokenize import DetokenizerFactory, Transformers
from medusa_ext.device import check_model, kind_of, open_device
from medusa_ext.loading import (
    HeadVocab,
    check_head_vocab,
    check_types,
    load_checkpoint,
    open_checkpoint,
)
from medusa_ext.memory import Guesses, Limits, Sizes, check_memory, fits
from medusa_ext.options import Options, integer, parse_options, shown
from medusa_ext.prompts import PromptEncoder
from medusa_ext.pump import Pump
from medusa_ext.text_builder import TextBuilder
from medusa_ext.trees import MAX_RANKS, Tree, is_auto, resolve_tree, tree_for
from medusa_ext.tuning import best_nodes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from medusa_ext.options import GenerateOptions

# A Result, or a list of them for a batch or several samples.
Results: TypeAlias = Any


class Engine:
    """A model, its drafter and a cache; any number of threads may use one engine."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        heads: str | os.PathLike[str] | None = "auto",
        *,
        device: str = "auto",
        weights: str = "auto",
        dtype: str = "auto",
        tree: Tree = "auto",
        max_batch: int = 8,
        max_context: int | None = None,
        threads: int | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int = 512,
        head_vocab: HeadVocab = "auto",
        lookup: bool | None = None,
        isa: str = "",
        drafter: _core.Drafter | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a model.

        Args:
            model: a directory, a `.gguf` file, a file that `medusa-ext export` wrote, a hub id, or
                "demo".
            heads: a directory or hub id of Medusa heads, "prompt-lookup", None for plain decoding,
                or "auto": the heads that come with the model, else prompt lookup.
            device: "cpu", "cuda" or "cuda:N" for the GPU of that number, or "auto": "cuda" where
                it can be used, unless threads or isa are given, which are the CPU's.
            weights: as which they are stored: "auto" (as in the file; on a GPU, where blocks have
                no products, `dtype`), "q8" or "q4" (quantised in loading, with a scale for 32
                values; on a CPU alone), "bf16", "f16" or "f32".
            dtype: of the cache, and of weights that are not in blocks: "auto" (as in the file, bf16
                where that is quantised), "bf16", "f16" or "f32".
            tree: of guesses from Medusa heads: "auto" (what `medusa-ext calibrate` found, on a CPU
                with as many nodes as are fastest here, see `medusa_ext.tuning`; else the best nodes
                of a published tree, 16 on a CPU and 64 on a GPU), another number of nodes, a name,
                a JSON file, a list (or array) of paths, or a `TreeSpec`. With "auto" or a number,
                and calibrated heads, each step on a CPU grows a tree of its own of as many nodes.
            max_batch: sequences that decode side by side; more requests wait.
            max_context: tokens of prompt and output together, at most the model's own; None: the
                model's own.
            threads: of the CPU; None: one per core that this process may use.
            cache_tokens: tokens of all sequences that the cache holds; None: min(max_batch *
                max_context, 16384). At most 2**30.
            prefill_chunk: tokens of a prompt that one step takes at most, up to 8192.
            head_vocab: how many tokens Medusa heads choose among, the most frequent ones; "auto":
                those of draft_tokens.json beside the heads, or all where there is none; None: all.
                Fewer make a step faster and guess a little worse; never another output.
            lookup: whether what followed the same tokens earlier in the text takes part in trees
                that steps grow. It takes calibrated heads, and a tree that is "auto" or a number of
                nodes. None: where that is so, on a CPU; on a GPU trees then come from the host.
                Typical acceptance goes without. Not heads="prompt-lookup", which guesses where
                there are no heads.
            isa: instruction set of the CPU's kernels, "" for the best: "generic", "avx2" or
                "avx512".
            drafter: your own `medusa_ext.Drafter`, instead of heads.
            local_files_only: never ask the network for a hub id.

        Raises:
            ValueError: an argument is impossible, or the model cannot be loaded; nothing stays.
            NotImplementedError: this build has no backend for the device, or the device's kernels
                do not compute this model.
            MemoryError: the device has less memory than this takes; says what would fit.
            medusa_ext.CudaError: the GPU cannot be used.
        """
        self._pump: Pump | None = None
        check_types(weights, dtype)
        limits = Limits(max_batch, max_context, cache_tokens, prefill_chunk)
        check_head_vocab(head_vocab)
        check_lookup(lookup, tree)
        if drafter is not None:
            if not isinstance(drafter, _core.Drafter):
                raise ValueError(f"drafter must be a medusa_ext.Drafter, got {shown(drafter)}")
            if heads is not None and not (isinstance(heads, str) and heads == "auto"):
                raise ValueError(f"give heads or a drafter, not both; got heads={shown(heads)}")
            heads = None
        if not is_auto(tree):
            resolve_tree(tree, MAX_RANKS)  # before any file is read; its depth is checked below

        backend = open_device(device, threads=threads, isa=isa)
        checkpoint = open_checkpoint(
            model, heads, head_vocab=head_vocab, local_files_only=local_files_only
        )
        # What depends on the model's configuration, before the weights are read.
        kind = kind_of(backend.name)
        stored = checkpoint.stored(weights, dtype, kind)
        check_model(checkpoint.config, stored.dtype, kind)
        found = find_calibration(checkpoint)
        if lookup and not checkpoint.config["heads"]["num_heads"]:
            raise ValueError(
                "lookup is True, but it takes part beside Medusa heads; there are none: leave it "
                'out (heads="prompt-lookup" guesses from the text already)'
            )
        self._trees = kind_of_trees(lookup, tree, found, kind)
        auto = auto_tree(found, kind, stored, backend.threads, self._trees)
        self._tree = tree_for(checkpoint.config, tree, *auto)
        static = self._tree if self._trees == STATIC else None
        if static is not None and static.depth > backend.max_tree_depth:
            raise ValueError(
                f"the tree has depth {static.depth}; {backend.name} computes trees of depth "
                f"{backend.max_tree_depth} or less"
            )
        if self._tree is None and drafter is None and heads is not None:
            drafter = _core.prompt_lookup_drafter()
        limits = limits.within(checkpoint.config["max_context"])
        heads_run = None if self._trees == STATIC else checkpoint.config["heads"]["num_heads"]
        guesses = Guesses.of(self._tree, drafter, heads_run)
        sizes = Sizes(checkpoint, kind, stored, limits, guesses)
        check_memory(sizes, backend)

        loaded = load_checkpoint(checkpoint, weights=weights, dtype=dtype, backend=backend)
        self._model = loaded.model
        self._weights = stored.text
        self._config = loaded.config
        self._name = os.fspath(model)
        self._tokenizer = loaded.tokenizer
        self._eos_ids = tuple(loaded.eos_ids)
        self._encoder = PromptEncoder(
            loaded.tokenizer, loaded.chat_template, self._config["vocab_size"]
        )
        self._detokenizers = DetokenizerFactory(loaded.tokenizer)
        self._drafter = drafter
        self._drafter_name = "none" if drafter is None else type(drafter).__name__
        if self._tree is not None:
            if found is not None and is_auto(tree) and kind == "cpu":
                self._tree = self._tuned(self._tree, found, sizes, backend)
            self._drafter_name = f"{self._config['heads']['num_heads']} Medusa heads"
            if self._tree.num_nodes > 1:
                if found is None or self._trees == STATIC:
                    self._drafter = _core.medusa_drafter(self._model, self._tree)
                else:
                    self._drafter = found.drafter(self._model, self._tree.num_nodes, self._trees)
                    sources = [self._drafter_name]
                    sources += ["n-grams"] if found.ngrams is not None else []
                    sources += ["lookup"] if self._trees == LOOKUP else []
                    self._drafter_name = f"{', '.join(sources)}; dynamic trees"
        elif heads is not None:
            self._drafter_name = "prompt lookup"
        self._session = _core.Session(
            self._model,
            self._drafter,
            max_batch=limits.max_batch,
            max_context=limits.context,
            cache_tokens=limits.tokens,
            prefill_chunk=limits.prefill_chunk,
        )
        self._max_batch = limits.max_batch
        self._pid = os.getpid()
        self._pump = Pump(self._session)

    def generate(self, prompt: object, **options: Unpack[GenerateOptions]) -> Results:
        """Complete one prompt or a batch of prompts.

        Args:
            prompt: raw text, token ids (list or 1-D array), chat messages (list of dictionaries
                with "role" and "content"), or a list of these. Text in a batch does not depend on
                what else is in the batch.
            **options: see `Options` for names, meaning and allowed values.

        Returns:
            A `Result`; for a batch a list of them in the order of the prompts. With
            num_return_sequences n > 1 a list in which the n samples of each prompt follow one
            another.

        Raises:
            TypeError: an option does not exist.
            ValueError: a prompt or an option is not allowed; nothing was started.
            RuntimeError: the engine is closed, or decoding failed.
        """
        pump = self._open_pump()
        prompts, is_batch = self._encoder.encode_batch(prompt, self.max_context - 1)
        checked = self._options(options, len(prompts))
        submissions, answers = [], []
        for prompt_index, tokens in enumerate(prompts):
            for sample_index in range(checked.num_return_sequences):
                submissions.append(self._submission(tokens, checked, prompt_index, sample_index))
                answers.append(self._answer(checked))
        results = complete(pump, submissions, answers)
        return results if is_batch or checked.num_return_sequences > 1 else results[0]

    def stream(self, prompt: object, **options: Unpack[GenerateOptions]) -> Stream:
        """Complete one prompt and receive the text in pieces as it becomes final.

        Args:
            prompt: as for `generate`, but one prompt.
            **options: as for `generate`, with one sample.

        Returns:
            An iterator of `Piece`; joined they are exactly the text that `generate` gives, and the
            last one carries the `Result`. Closing or dropping it ends the request.

        Raises:
            TypeError, ValueError, RuntimeError: as `generate`, at once.
        """
        return Stream(self._open_pump(), *self._prepare(prompt, options))

    def batch(self) -> Batch:
        """Begin a batch that takes more prompts while others of it are being made."""
        return Batch(self._open_pump(), self._prepare)

    def chat(self, system: str | None = None) -> Chat:
        """Begin a conversation.

        Args:
            system: the system message; None: what the model's chat template says without one.
        """
        self._open_pump()
        return Chat(self, system)

    def score(
        self, prompt: object, *, return_hidden: bool = False, chunk: int = 512
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run the model over a text without generating.

        Args:
            prompt: as for `generate`, but one prompt; S tokens, up to the model's own context.
            return_hidden: return the hidden states too.
            chunk: tokens that one pass takes at most, up to 65536; does not change the values.

        Returns:
            Logits [S, V] f32; row i judges the token that follows token i. With return_hidden the
            pair of the logits and the hidden states after the final norm [S, d] f32. Both export
            DLPack.

        Raises:
            ValueError: as `generate`.
        """
        pump = self._open_pump()
        integer("chunk", chunk, 1, 65536)
        prompts, is_batch = self._encoder.encode_batch(
            prompt, self._config["max_context"], generates=False
        )
        if is_batch:
            raise ValueError(f"score takes one text, got {len(prompts)}; call it once for each")
        tokens = prompts[0]
        logits = np.empty((len(tokens), self._config["vocab_size"]), np.float32)
        hidden = (
            np.empty((len(tokens), self._config["hidden_size"]), np.float32)
            if return_hidden
            else None
        )
        # The model's threads serve one caller at a time.
        pump.alone(lambda: _core.score(self._model, tokens, chunk, logits, hidden))
        return logits if hidden is None else (logits, hidden)

    def close(self) -> None:
        """Give back the memory. Requests that still run in other threads end with an error."""
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.close()
            del self._session, self._drafter, self._model

    @property
    def max_context(self) -> int:
        """Tokens of prompt and output together."""
        self._open_pump()
        return self._session.max_context

    @property
    def max_batch(self) -> int:
        """Texts that are made side by side."""
        return self._max_batch

    @property
    def encoder(self) -> PromptEncoder:
        """From prompts to token ids."""
        return self._encoder

    @property
    def tokenizer(self) -> Transformers:
        """The model's transformers tokenizer."""
        return self._tokenizer

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The ids that end a text, from the model's generation config."""
        return self._eos_ids

    @property
    def tree(self) -> list[list[int]] | None:
        """Paths of the tree of guesses; None where the drafter makes its own or there is none.

        Where steps grow trees of their own (see `info`), that of as many nodes which would be best
        if it were the same for all.
        """
        return None if self._tree is None else self._tree.paths()

    @property
    def info(self) -> Mapping[str, Any]:
        """What was loaded: model, family, sizes, types, drafter and its nodes, backend."""
        self._open_pump()
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        return {
            "model": self._name,
            "family": self._config["family"],
            **{name: self._config[name] for name in sizes},
            "max_context": self.max_context,
            "weights": self._weights,
            "dtype": self._model.dtype,
            "drafter": self._drafter_name,
            "nodes": Guesses.of(self._tree, self._drafter).max_nodes,
            "backend": f"{self._model.backend.name}, {self._model.backend.detail}",
        }

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes reserved for weights, cache and workspace, and of 1,000 tokens in the cache."""
        self._open_pump()
        stats = self._session.stats()
        return {
            "weight_bytes": stats.weight_bytes,
            "cache_bytes": stats.cache_bytes,
            "workspace_bytes": stats.workspace_bytes,
            "kv_bytes_per_1000_tokens": 1000 * self._model.kv_bytes_per_token,
        }

    def session_stats(self) -> _core.SessionStats:
        """Return the session's counts: requests, pages, steps, set-backs."""
        self._open_pump()
        return self._session.stats()

    def _tuned(
        self, tree: _core.TreeSpec, found: Calibration, sizes: Sizes, backend: _core.Backend
    ) -> _core.TreeSpec:
        """The calibrated tree with as many nodes as are fastest on this machine."""
        heads = sizes.checkpoint.config["heads"]["num_heads"]
        nodes = best_nodes(
            self._model,
            found,
            lambda count: fits(replace(sizes, guesses=Guesses(count, heads)), backend),
            self._trees,
        )
        return tree if nodes is None else _core.TreeSpec.from_paths(found.tree[: nodes - 1])

    def _prepare(self, prompt: object, options: Mapping[str, Any]) -> tuple[Submission, Answer]:
        """Check one prompt with the options of one sample."""
        prompts, is_batch = self._encoder.encode_batch(prompt, self.max_context - 1)
        if is_batch:
            raise ValueError(
                f"stream takes one prompt, got {len(prompts)}; use generate, or one stream each"
            )
        checked = self._options(options, 1)
        if checked.num_return_sequences != 1:
            raise ValueError(
                "stream gives one sample, got"
                f" num_return_sequences={checked.num_return_sequences}; use generate"
            )
        return self._submission(prompts[0], checked, 0, 0), self._answer(checked)

    def _options(self, given: Mapping[str, Any], num_prompts: int) -> Options:
        return parse_options(given, num_prompts=num_prompts, vocab_size=self._config["vocab_size"])

    def _answer(self, options: Options) -> Answer:
        return Answer(
            self._open_pump(), TextBuilder(self._detokenizers.new(), options.stop_strings)
        )

    def _submission(
        self, tokens: list[int], options: Options, prompt_index: int, sample_index: int
    ) -> Submission:
        sampling = options.sampling(prompt_index, sample_index)
        eos_ids = self._eos_ids if options.eos_token_id is None else options.eos_token_id
        return partial(  # not a closure: see Pump.submit
            self._session.submit,
            tokens,
            max_new_tokens=options.max_new_tokens or 0,
            sampling=sampling,
            eos_ids=eos_ids,
        )

    def _open_pump(self) -> Pump:
        if self._pump is None:
            raise RuntimeError("this engine is closed; make a new one")
        if self._pid != os.getpid():
            raise RuntimeError(
                "this engine belongs to the process that made it; make one after the fork"
            )
        return self._pump

    def __enter__(self) -> Engine:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError(
            "an Engine cannot be pickled or copied;"
            " make one in each process from the same arguments"
        )

    def __repr__(self) -> str:
        """Show model, drafter, type, context and backend."""
        if self._pump is None:
            return "Engine(closed)"
        return (
            f"Engine({self._name!r}, drafter={self._drafter_name!r}, weights={self._weights!r},"
            f" dtype={self._model.dtype!r}, max_context={self._session.max_context},"
            f" backend={self._model.backend.detail!r})"
        )
