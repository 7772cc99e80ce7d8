"""The engines that the benchmark knows, as data; one more is an entry here and a module for its worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineMode:
    """One way to run an exported model.

    what: what it is, for `--help`. export_to: the name in `adaskip.engines.registry`. package: what its environment
    must have. worker: the module with the class `Times`. drafts: the exported model
    drafts for the full one, on text instead of random tokens, which no draft could foresee.
    """

    what: str
    export_to: str
    package: str
    worker: str
    drafts: bool = False


_VLLM = ("vllm", "vllm", "adaskip.studies.engines.vllm_times")
_LLAMA_CPP = ("gguf", "llama_cpp")
ENGINE_MODES = {
    "vllm": EngineMode("vLLM, compiled, on the exported folder", *_VLLM),
    "vllm-draft": EngineMode("vLLM on the full model, with the exported folder as its draft", *_VLLM, drafts=True),
    "llama-cpp": EngineMode("llama.cpp on the exported file", *_LLAMA_CPP, "adaskip.studies.engines.llama_cpp_times"),
    "llama-cpp-draft": EngineMode(
        "llama.cpp on the full model, with the exported file as its draft",
        *_LLAMA_CPP,
        "adaskip.studies.engines.llama_cpp_draft",
        drafts=True,
    ),
}
