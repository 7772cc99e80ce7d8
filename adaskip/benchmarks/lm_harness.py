"""Model type `adaskip` of lm-evaluation-harness: its type `hf`, with sublayers skipped.

lm_eval does not discover model types of other packages. `adaskip lm-eval` registers this one and then runs lm_eval's
own command line; in Python, importing this module registers it.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel

from adaskip.common.optional import optional_import
from adaskip.common.own_options import declared_options, parse_options
from adaskip.core.blocks import decoder_layers
from adaskip.core.context import skipping
from adaskip.core.model_plan import strategy_of
from adaskip.core.plan import Budget, SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.core.wrappers import unwrapped
from adaskip.models import internlm
from adaskip.models.checkpoints import read_config
from adaskip.models.gguf_file import gguf_options, is_gguf
from adaskip.models.loading import load_tokenizer
from adaskip.models.packaged import is_packaged
from adaskip.models.registry import registry
from adaskip.models.rope import fix_dynamic_rope
from adaskip.models.source import find_source, read_architecture
from adaskip.strategies import FULL, STRATEGIES, build, profile_type, strategy_name

with optional_import():
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

MODEL_TYPE = "adaskip"
MAX_DECODE_STEPS = "max_decode_steps"


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm_eval's command line, which reads `sys.argv`. Raises SystemExit where it ends with a message of its own."""
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


@register_model(MODEL_TYPE)
class AdaSkipLM(HFLM):
    """A model that skips sublayers in every request, and is the stock model between them.

    Args:
        pretrained: as for `hf`: a folder, a Hub id or a loaded model; also a name of `configs/models.yaml` and a .gguf
            file.
        plan: folder, repository or published name of a saved plan. Or:
        strategy: name of a strategy, or package.module:Class. budget: sublayers to skip. phase: default e2e.
        profile: file, repository or published name of the profile that the strategy needs.
        allow_other_weights: only warn if plan or profile were made for other weights of a model of this shape.
        options: keep_kv, options of the strategy, such as learning_window, and all arguments of `hf`.

    The model is loaded by `hf`, but InternLM as stock LLaMA, and dynamic-NTK rope as in `adaskip.models.rope`.
    max_decode_steps of SkipDecode is by default each task's max_gen_toks, as in `adaskip run`.

    Log-likelihoods are scores of a text that is read at once: it counts as prompt, so that in phase decode nothing is
    skipped, and a warning says so. Strategy pop is refused there, as its answers run through the full model.

    Raises:
        ValueError: arguments that do not fit together, before anything is loaded; then what `skipping` refuses.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        plan: str | None = None,
        strategy: str | None = None,
        budget: int | None = None,
        phase: str | None = None,
        profile: str | None = None,
        allow_other_weights: bool = False,
        **options: Any,
    ):
        strategy = None if strategy is None else strategy_name(strategy)
        names = {name for known in STRATEGIES.values() for name in declared_options(known)} | {"keep_kv"}
        own = {name: options.pop(name) for name in sorted(names & options.keys())}
        settings = {"strategy": strategy, "budget": budget, "phase": phase, "profile": profile, **own}
        given = {name: value for name, value in settings.items() if value is not None}
        source = _read_plan(plan, given) if plan is not None else _read_profile(given)
        if not isinstance(source, SkipPlan):
            given |= _parsed(given["strategy"], own)
        with _unknown_arguments_refused():
            super().__init__(**_weights(pretrained, options), **options)
        model = unwrapped(self.model)
        decoder_layers(model)  # raises if there are none
        if isinstance(pretrained, str):
            fix_dynamic_rope(model)
        if not isinstance(source, SkipPlan):
            source = _strategy(model, source, given, allow_other_weights)
        self.strategy = strategy_of(source, model, allow_other_weights=allow_other_weights)
        has_steps = MAX_DECODE_STEPS in {field.name for field in fields(self.strategy)}
        self._ends_with_answer = has_steps and MAX_DECODE_STEPS not in given
        with skipping(self.model, self.strategy):
            pass  # what cannot be skipped is refused here, before the first request

    def loglikelihood(self, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        """As of `hf`, under the strategy."""
        self._check_scored()
        with skipping(self.model, self.strategy):
            return super().loglikelihood(*args, **options)

    def loglikelihood_rolling(self, *args: Any, **options: Any) -> list[float]:
        """As of `hf`, under the strategy."""
        self._check_scored()
        with skipping(self.model, self.strategy):
            return super().loglikelihood_rolling(*args, **options)

    def _model_generate(self, context: Any, max_length: int, *args: Any, **options: Any) -> Any:
        """As of `hf`, under the strategy. context: [B, S]. max_length: in tokens, with the context."""
        strategy = self.strategy
        if self._ends_with_answer:
            strategy = replace(strategy, max_decode_steps=max_length - context.shape[1])
        with skipping(self.model, strategy):
            return super()._model_generate(context, max_length, *args, **options)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        if _is_internlm(pretrained):
            self._config = read_architecture(Path(pretrained))
        else:
            super()._get_config(pretrained, **options)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        if not tokenizer and _is_internlm(pretrained):
            tokenizer = load_tokenizer(Path(pretrained))
        super()._create_tokenizer(pretrained, tokenizer, **options)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        if _is_internlm(pretrained):
            self.AUTO_MODEL_CLASS = LlamaForCausalLM  # its weights have LLaMA's names
            options["config"] = self.config
        super()._create_model(pretrained, **options)

    def _check_scored(self) -> None:
        """Refuse scores of a text that is read at once under a set that keeps the K/V, as strategy pop has it."""
        if self.strategy.is_prompt_only:
            raise ValueError(
                f"log-likelihoods score every token of a text that is read at once, of which strategy "
                f"{self.strategy.name} runs only the last in the full model; allowed: tasks that generate"
            )


def _read_plan(name: str, given: dict[str, Any]) -> SkipPlan:
    if given:
        raise ValueError(f"a plan says by itself what is skipped and when: leave out {', '.join(given)}, or plan")
    return SkipPlan.from_pretrained(name)


def _read_profile(given: dict[str, Any]) -> Any:
    """The profile that the strategy needs, None if it needs none."""
    if (name := given.get("strategy")) is None or strategy_name(name) == FULL:
        raise ValueError(
            f"model type {MODEL_TYPE} needs plan=FOLDER or strategy=NAME,budget=SUBLAYERS; allowed strategies: "
            f"{', '.join(STRATEGIES)}; the full model is model type hf"
        )
    if not isinstance(budget := given.get("budget"), int) or budget < 1:
        raise ValueError(f"strategy {name} needs budget=N, the number of sublayers to skip, at least 1; got {budget}")
    kind, profile = profile_type(strategy_name(name)), given.get("profile")
    if (kind is None) != (profile is None):
        needs = "no profile" if kind is None else f"profile=FILE ({kind.__name__}), which adaskip calibrate makes"
        raise ValueError(f"strategy {name} needs {needs}; got {profile}")
    return None if kind is None else kind.load(str(profile))


def _strategy(model: PreTrainedModel, profile: Any, given: dict[str, Any], allow_other_weights: bool) -> Strategy:
    """The strategy for a loaded model, whose profile must be of that model."""
    if profile is not None:
        profile.check_fits(model, allow_other_weights=allow_other_weights)
    built = build(
        strategy_name(given["strategy"]),
        phase=given.get("phase", "e2e"),
        budget=Budget(sublayers=given["budget"]),
        num_layers=len(decoder_layers(model)),
        profile=profile,
        **{name: value for name, value in given.items() if name not in ("strategy", "phase", "budget", "profile")},
    )
    assert built is not None, "of the full model alone there is none"
    return built


def _parsed(strategy: str, own: dict[str, Any]) -> dict[str, Any]:
    """The options of the strategy, with their types checked; `keep_kv`, which every strategy has, is left as it is."""
    spelled = [f"{name}={value}" for name, value in own.items() if name != "keep_kv" and value is not None]
    return parse_options(strategy, STRATEGIES[strategy], spelled, "--model_args")


def _weights(pretrained: str | PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `hf` for a model of `configs/models.yaml` or a .gguf file; others are passed on."""
    if not isinstance(pretrained, str):
        if unknown := sorted(options.keys() - inspect.signature(HFLM.__init__).parameters.keys()):
            raise _unknown_argument(unknown[0])
        return {"pretrained": pretrained}
    if not (pretrained in registry() or is_packaged(pretrained) or is_gguf(Path(pretrained))):
        return {"pretrained": pretrained}
    has_adapter = options.get("peft") or options.get("delta")  # whose revision it then is
    names = [name for name in ("gguf_file", "subfolder", "revision") if options.get(name)]
    if names and not (names == ["revision"] and has_adapter):
        raise ValueError(f"pretrained={pretrained} says by itself where its weights are: leave out {', '.join(names)}")
    found = gguf_options(find_source(pretrained).path)
    return {"pretrained": str(found.pop("pretrained_model_name_or_path")), **found}


def _is_internlm(pretrained: Any) -> bool:
    folder = Path(pretrained) if isinstance(pretrained, str) else None
    if folder is None or not (folder / "config.json").is_file():
        return False
    return read_config(folder)["model_type"] == internlm.MODEL_TYPE


@contextmanager
def _unknown_arguments_refused() -> Iterator[None]:
    """Turn transformers' TypeError for an argument that neither it nor `hf` knows into a ValueError."""
    try:
        yield
    except TypeError as error:
        if (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))) is None:
            raise
        raise _unknown_argument(found.group(1)) from None


def _unknown_argument(name: str) -> ValueError:
    return ValueError(
        f"model type {MODEL_TYPE} has no argument {name}; allowed: those of model type hf, plan, strategy, budget, "
        "phase, profile, allow_other_weights, keep_kv and options of the strategy"
    )
