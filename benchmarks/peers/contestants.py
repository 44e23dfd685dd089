"""How each engine is loaded and asked, with the settings that make it fastest on a CPU.

All get token ids and give token ids; no text is made. Each import stands where it is needed: every
engine runs in a process of its own, and none of them must be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.peers.trace import Trace

OURS = ("medusa-heads", "medusa-lookup", "medusa-plain")  # the first one present leads the ratios
PLAIN = "medusa-plain"


@dataclass(frozen=True)
class Job:
    """What a contestant is to load; the same for all.

    Attributes:
        model: a .gguf file, or for medusa_ext alone whatever its Engine takes.
        heads: Medusa heads that Engine takes; None where the model has none.
        weights: for Engine(weights=...); None leaves its default.
        converted: the folder of the model in the form of CTranslate2, for it alone.
        threads: of the CPU.
        context: tokens of prompt and answer together, and room for guesses beyond.
        eos_ids: tokens that end an answer.
    """

    model: str
    heads: str | None
    weights: str | None
    converted: str | None
    threads: int
    context: int
    eos_ids: list[int]


@dataclass
class Loaded:
    """A contestant in memory.

    Attributes:
        detail: what it computes with, in a few words.
        answer: from a prompt and the most tokens to make, into a trace; greedy, nothing reused.
    """

    detail: str
    answer: Callable[[Sequence[int], int, Trace], None]


@dataclass(frozen=True)
class Contestant:
    """An entry of the contest.

    Attributes:
        load: make it ready.
        modules: that it imports; what they need in memory is no cost of the model.
        package: what brings the modules, by its name in a package index.
        needs_gguf: it reads nothing but .gguf files.
    """

    load: Callable[[Job], Loaded]
    modules: tuple[str, ...]
    package: str
    needs_gguf: bool = True

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        for module in self.modules:
            name = module.partition(".")[0]
            if find_spec(name) is None:
                return f"{name} is not installed; pip install {self.package}"
        return None


def _drafted(tokens: int) -> str:
    return f", {tokens} drafted" if tokens else ""


def _medusa(job: Job, heads: str | None) -> Loaded:
    from medusa_ext import Engine

    options: dict[str, Any] = {} if job.weights is None else {"weights": job.weights}
    engine = Engine(
        job.model,
        heads,
        device="cpu",
        threads=job.threads,
        max_batch=1,
        max_context=job.context,
        **options,
    )

    # The session below generate(), which would reuse what prompts have in common.
    session = engine._session

    def answer(ids: Sequence[int], max_tokens: int, trace: Trace) -> None:
        session.submit(
            ids, max_new_tokens=max_tokens, eos_ids=engine.eos_token_id, reuse_prefix=False
        )
        while not session.idle:
            for event in session.step():
                trace.emit(event.tokens)

    info = engine.info
    tree = f", {1 + len(engine.tree)} nodes" if engine.tree else ""
    return Loaded(f"{info['weights']}, {info['drafter']}{tree}", answer)


def _medusa_plain(job: Job) -> Loaded:
    return _medusa(job, None)


def _medusa_heads(job: Job) -> Loaded:
    if job.heads is None:
        raise ValueError("no Medusa heads for this model; give --heads")
    return _medusa(job, job.heads)


def _medusa_lookup(job: Job) -> Loaded:
    return _medusa(job, "prompt-lookup")


def _llama_cpp(job: Job, draft_tokens: int = 0) -> Loaded:
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    class Counting(Llama):
        """Counts its passes."""

        passes = 0

        def eval(self, tokens: Sequence[int]) -> None:
            self.passes += 1
            super().eval(tokens)

    model = Counting(
        job.model,
        n_ctx=job.context,
        n_batch=512,
        n_ubatch=512,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        flash_attn=True,
        logits_all=bool(draft_tokens),  # drafting needs them; else it fails beyond n_batch tokens
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=draft_tokens)
        if draft_tokens
        else None,
        verbose=False,
    )

    def answer(ids: Sequence[int], max_tokens: int, trace: Trace) -> None:
        model.reset()  # else generate() keeps what this prompt has in common with the last
        passes = None
        for token in model.generate(list(ids), temp=0.0, repeat_penalty=1.0):
            trace.emit([token], same_pass=model.passes == passes)
            passes = model.passes
            if token in job.eos_ids or len(trace.tokens) >= max_tokens:
                break

    return Loaded(f"blocks of the file, flash attention{_drafted(draft_tokens)}", answer)


def _llama_cpp_plain(job: Job) -> Loaded:
    return _llama_cpp(job)


def _llama_cpp_lookup(job: Job) -> Loaded:
    return _llama_cpp(job, draft_tokens=2)  # what its README advises for CPUs


def _openvino(job: Job, draft_tokens: int = 0) -> Loaded:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = job.context  # a prompt in one pass
    drafting: dict[str, bool] = {"prompt_lookup": True} if draft_tokens else {}
    pipeline = genai.LLMPipeline(
        job.model,
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_NUM_THREADS=job.threads,
        PERFORMANCE_HINT="LATENCY",
        ENABLE_CPU_PINNING=False,  # as the others: what else runs may take any core
        **drafting,
    )

    class Into(genai.StreamerBase):
        """Hands every token to a trace."""

        def __init__(self, trace: Trace) -> None:
            super().__init__()
            self.trace = trace

        def write(self, tokens: int | list[int]) -> genai.StreamingStatus:
            self.trace.emit([tokens] if isinstance(tokens, int) else tokens)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def answer(ids: Sequence[int], max_tokens: int, trace: Trace) -> None:
        config = genai.GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            stop_token_ids=set(job.eos_ids),
            apply_chat_template=False,
        )
        if draft_tokens:
            config.num_assistant_tokens = draft_tokens
            config.max_ngram_size = 3
        prompt = openvino.Tensor(np.array([ids], np.int64))
        mask = openvino.Tensor(np.ones((1, len(ids)), np.int64))
        pipeline.generate(genai.TokenizedInputs(prompt, mask), config, Into(trace))

    return Loaded(f"blocks of the file{_drafted(draft_tokens)}", answer)


def _openvino_plain(job: Job) -> Loaded:
    return _openvino(job)


def _openvino_lookup(job: Job) -> Loaded:
    return _openvino(job, draft_tokens=5)  # as its sample of prompt lookup


def load_torch_model(path: Path) -> Any:  # noqa: ANN401 - a transformers model
    """A .gguf file in transformers, bf16."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).eval()


def _transformers(job: Job, draft_tokens: int = 0) -> Loaded:
    import torch
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(job.threads)
    model = load_torch_model(Path(job.model))

    class Into(BaseStreamer):
        """Hands what comes after the prompt to a trace."""

        def __init__(self, trace: Trace) -> None:
            self.trace = trace
            self.is_prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self.is_prompt:
                self.trace.emit(value.flatten().tolist())
            self.is_prompt = False

        def end(self) -> None:
            pass

    def answer(ids: Sequence[int], max_tokens: int, trace: Trace) -> None:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=job.eos_ids,
                pad_token_id=job.eos_ids[0] if job.eos_ids else 0,
                streamer=Into(trace),
                prompt_lookup_num_tokens=draft_tokens or None,
            )

    attention = model.config._attn_implementation
    return Loaded(f"bf16, {attention}{_drafted(draft_tokens)}", answer)


def _transformers_plain(job: Job) -> Loaded:
    return _transformers(job)


def _transformers_lookup(job: Job) -> Loaded:
    return _transformers(job, draft_tokens=10)


def _ctranslate2(job: Job) -> Loaded:
    import json

    import ctranslate2

    if job.converted is None:
        raise ValueError("the model was not converted")
    vocabulary = json.loads((Path(job.converted) / "vocabulary.json").read_text("utf-8"))
    model = ctranslate2.Generator(
        job.converted, device="cpu", compute_type="int8", inter_threads=1, intra_threads=job.threads
    )

    def answer(ids: Sequence[int], max_tokens: int, trace: Trace) -> None:
        def take(step: ctranslate2.GenerationStepResult) -> bool:
            trace.emit([step.token_id])
            return False

        model.generate_batch(
            [[vocabulary[token] for token in ids]],
            max_length=max_tokens,
            sampling_topk=1,
            beam_size=1,
            end_token=job.eos_ids,
            include_prompt_in_result=False,
            callback=take,
        )

    return Loaded(f"{model.compute_type}", answer)


_TORCH = "torch transformers gguf accelerate"
_TORCH_MODULES = ("torch", "transformers.generation.utils", "gguf", "accelerate")
_OPENVINO_MODULES = ("openvino", "openvino_genai")
_OWN_MODULES = ("medusa_ext.engine", "transformers")

CONTESTANTS = {
    "medusa-plain": Contestant(_medusa_plain, _OWN_MODULES, "medusa_ext", needs_gguf=False),
    "medusa-heads": Contestant(_medusa_heads, _OWN_MODULES, "medusa_ext", needs_gguf=False),
    "medusa-lookup": Contestant(_medusa_lookup, _OWN_MODULES, "medusa_ext", needs_gguf=False),
    "llama.cpp": Contestant(_llama_cpp_plain, ("llama_cpp",), "llama-cpp-python"),
    "llama.cpp-lookup": Contestant(_llama_cpp_lookup, ("llama_cpp",), "llama-cpp-python"),
    "openvino": Contestant(_openvino_plain, _OPENVINO_MODULES, "openvino-genai"),
    "openvino-lookup": Contestant(_openvino_lookup, _OPENVINO_MODULES, "openvino-genai"),
    "ctranslate2": Contestant(_ctranslate2, ("ctranslate2",), "ctranslate2"),
    "transformers": Contestant(_transformers_plain, _TORCH_MODULES, _TORCH),
    "transformers-lookup": Contestant(_transformers_lookup, _TORCH_MODULES, _TORCH),
}
