"""From what a user names (model, prompt, device) to what runs: the steps that all commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from skipopu.hw.config import OverlayConfig, preset

from .bundle import MAGIC, load_bundle
from .compiled import Compiled
from .compiler import compile_model
from .devices import DEVICES, open_device
from .errors import BundleError, DeviceError, ModelError, RequestError
from .generation import Generator
from .load import load_model
from .lora import merged
from .model import Model
from .plan import KvSizes
from .routers import Routers, check_kv, find_routers
from .routes import Force, RandomRoutes, always_executing
from .runtime import Accelerator

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_CONFIG", "REFERENCE", "ReferenceGenerator", "Routing", "check_device", "compile_source",
           "open_accelerator", "open_source", "parse_devices", "prompt_tokens", "route_source"]

DEFAULT_CONFIG = "sim"
REFERENCE = "reference"  # not a device: it runs models, not programs


def open_source(spec: str, lora: str | None = None, weights: str | None = None) -> Model | Compiled:
    """What MODEL names: a bundle as Compiled, anything else as Model. Raises ModelError or BundleError.

    lora : SkipGPT checkpoint whose deltas are added to the weights of a Model (`merge_skipgpt_lora`)
    weights : kind of the linear weights of a Model, see `load_model`
    """
    try:
        with open(spec, "rb") as file:
            is_bundle = file.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder, a name, or nothing: `load_model` says what
        is_bundle = False
    if is_bundle:
        for option, value in (("--lora", lora), ("--weights", weights)):
            if value is not None:
                raise BundleError(f"a bundle is made with its weights; give {option} to compile")
        return load_bundle(spec)
    model = load_model(spec, weights)
    if lora is None:
        return model
    from .skipgpt_import import merge_skipgpt_lora
    return merge_skipgpt_lora(lora, model)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a user asks of routers: a file or name, another KV mode than theirs, a rate of forced skips and its seed."""

    routers: str | None = None
    kv: str | None = None
    force_skip: float | None = None
    seed: int = 0


def route_source(source: Model | Compiled, asked: Routing) -> tuple[Model | Compiled, Routers | None, Force | None]:
    """The model with its routers' LoRA factors, the routers (None without), what takes the place of their decisions.

    A KV mode or forced skips without routers give the model routers that skip nothing by themselves; KV mode "reuse" if
    none is named. Raises RouterError for routers that cannot be used, an unknown KV mode or an impossible rate,
    BundleError for routers beside a bundle, which holds its own, and for forced skips on one without.
    """
    force = None if asked.force_skip is None else RandomRoutes(asked.force_skip, asked.seed)
    if asked.kv is not None:
        check_kv(asked.kv)
    if isinstance(source, Compiled):
        if asked.routers is not None or asked.kv is not None:
            raise BundleError("a bundle is made with its routers and KV mode; give --routers and --kv to compile")
        if force is not None and not source.map.kv:
            raise BundleError("the bundle is made without routers, so that nothing can skip; compile the model with "
                              "--routers or --kv")
        return source, None, force
    if asked.routers is None:
        if asked.kv is None and force is None:
            return source, None, None
        return source, always_executing(source, asked.kv or "reuse"), force
    routers = find_routers(asked.routers, source)
    return *merged(source, replace(routers, kv=asked.kv or routers.kv)), force


def compile_source(source: Model | Compiled, config: str | None = None, context: int | None = None,
                   routers: Routers | None = None, kv: KvSizes | None = None) -> Compiled:
    """The compiled model: a Model is compiled for ``config`` (by default `sim`), a bundle must have been.

    kv : sizes and format of KV records, not for a bundle, which has its own
    Raises ConfigError for an unknown configuration, BundleError for a bundle of another configuration or context,
    CompileError if the model does not fit, RouterError for routers that the overlay cannot run.
    """
    chosen: OverlayConfig | None = None if config is None else preset(config)
    if isinstance(source, Model):
        return compile_model(source, chosen or preset(DEFAULT_CONFIG), context, routers, kv=kv)
    if kv is not None:
        raise BundleError("a bundle is made with its KV memory; give --buffer, --kv-share and --kv-format to "
                          "compile")
    if chosen is not None and chosen.config_hash != source.config.config_hash:
        raise BundleError(f"the bundle is made for configuration {source.config.name} "
                          f"({source.config.config_hash:#010x}), not {chosen.name} ({chosen.config_hash:#010x}); "
                          f"compile the model for {chosen.name}")
    if context is not None and context != source.map.context:
        raise BundleError(f"the bundle is made for {source.map.context} positions, not {context}; compile the model "
                          f"for {context}")
    return source


def prompt_tokens(source: Model | Compiled, text: str | None, ids: str | None = None, chat: bool = False) -> list[int]:
    """Token ids of a prompt given as text or as comma-separated ids.

    chat : put the text into the model's chat template, as what the user says
    Raises RequestError for ids that are none, or a prompt without tokens, ModelError if the model lacks a tokenizer or
    template.
    """
    name = source.config.name if isinstance(source, Model) else source.map.model
    if ids is not None:
        try:
            tokens = [int(part) for part in ids.split(",")] if ids.strip() else []
        except ValueError:
            raise RequestError(f"prompt tokens must be numbers with commas, like 5,17,9, not {ids!r}") from None
    elif source.tokenizer is None:
        raise ModelError(f"model {name} has no tokenizer; give the prompt with --prompt-tokens")
    elif not text:
        tokens = []  # even where a chat template would wrap the empty prompt in markers
    elif chat:
        if source.chat is None:
            raise ModelError(f"model {name} has no chat template; leave out --chat")
        tokens = source.tokenizer.encode(source.chat.render([{"role": "user", "content": text}]), bos=False)
    else:
        tokens = source.tokenizer.encode(text)
    if not tokens:
        raise RequestError("the prompt is empty; give at least one token")
    return tokens


def parse_devices(names: str) -> list[str]:
    """The two device names of ``compare``. Raises DeviceError if they are not two devices equal bit for bit."""
    parts = [part.strip() for part in names.split(",")]
    for part in parts:
        check_device(part)
    if REFERENCE in parts:
        raise DeviceError("the reference computes in floats and equals no device bit for bit; use eval to measure how "
                          f"near a device comes, or compare two of: {', '.join(DEVICES)}")
    if len(parts) != 2:
        raise DeviceError(f"--devices must name two of {', '.join(DEVICES)} with a comma, not {names!r}")
    return parts


def check_device(name: str) -> None:
    """Raises DeviceError if there is neither a device nor the reference of that name."""
    if name not in (known := (REFERENCE, *DEVICES)):
        near = get_close_matches(name, known, 1)
        raise DeviceError(f"unknown device {name!r}{f', did you mean {near[0]!r}?' if near else ''}; known: "
                          f"{', '.join(known)}")


def open_accelerator(name: str, compiled: Compiled, log: Callable[[str], None] | None = None,
                     force: Force | None = None, memory: str | None = None, **options: Any) -> Accelerator:
    """``compiled`` loaded on a newly opened device of that name.

    log : is told of steps that take long, where the device has such; options : of the device
    force : takes the place of the routers' decisions; memory : timing of simulated memory, "ideal" or "hbm"
    Raises DeviceError also for a memory where the device has none to choose.
    """
    beat_bytes = compiled.config.port_bits // 8
    options = device_options(name, log, memory) | options
    return Accelerator(open_device(name, compiled.config, compiled.map.memory * beat_bytes, **options), compiled,
                       force=force)


def device_options(name: str, log: Callable[[str], None] | None, memory: str | None = None) -> dict[str, Any]:
    """``log`` and ``memory`` as options of the device of that name; nothing for an unknown device.

    Raises DeviceError for a memory if the device's constructor takes none; a log is left out then.
    """
    module, _, kind = DEVICES.get(name, "").partition(":")
    try:
        taken = inspect.signature(getattr(import_module(module), kind)).parameters if module else {}
    except ImportError:
        taken = {}
    if module and taken and memory is not None and "memory" not in taken:
        raise DeviceError(f"device {name} has no memory timing to choose; --memory is for simulated hardware, like rtl")
    return {key: value for key, value in (("log", log), ("memory", memory)) if value is not None and key in taken}


class ReferenceGenerator(Generator):
    """The float reference with the interface of an accelerator; ``context`` defaults to the model's.

    routers : let them decide what runs, on the model with their LoRA factors merged; force : takes the place of their
        decisions
    """

    def __init__(self, model: Model, context: int | None = None, routers: Routers | None = None,
                 force: Force | None = None) -> None:
        from skipopu.golden.reference import ReferenceModel
        from skipopu.golden.routed import RoutedReference
        if context is not None and not 1 <= context <= model.config.context:
            raise RequestError(f"context must be 1..{model.config.context} positions for model {model.config.name}, "
                               f"not {context}")
        self.vocab, self.eos_ids = model.config.vocab, model.config.eos_ids
        self.context = context or model.config.context
        self.model: ReferenceModel = (ReferenceModel(model) if routers is None
                                      else RoutedReference(*merged(model, routers), force=force))
        self._last: torch.Tensor | None = None

    @property
    def decisions(self) -> np.ndarray | None:
        return getattr(self.model, "decisions", None)

    def prefill(self, tokens: Sequence[int]) -> int:
        self.check_tokens(tokens)
        self._last = self.model.step(tokens)[-1:]
        self.position += len(tokens)
        return int(self._last.argmax())

    def step(self, token: int) -> int:
        return self.prefill([token])

    def logits(self) -> np.ndarray:
        if self._last is None:
            raise RequestError("no tokens were read yet")
        return self._last.numpy()

    def evaluate(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        self.check_tokens(tokens)
        rows = self.model.step(tokens)
        self._last = rows[-1:]
        self.position += len(tokens)
        yield rows.numpy()

    def clear(self) -> None:
        self.model.reset()
        self.position, self.finish, self._last = 0, "", None
