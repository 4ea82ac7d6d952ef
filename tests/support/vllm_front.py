"""vLLM's own HTTP front: its routes, request models, renderer and checks, before an engine that answers at once, and
around it the part of our middleware that gives errors their form.

A verdict on a request is given before its first token, so it needs no model's weights: what is served here refuses what
a server of vLLM's refuses.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.api_router import router as chat_router
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.api_router import router as completion_router
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from kvarena.server.vllm_middleware import OpenAIErrors


class CheckingEngine:
    """Takes what vLLM's engine takes, and says one token. The part of `vllm.engine.protocol.EngineClient` in use."""

    errored = False

    def __init__(self, model: Path, max_model_len: int) -> None:
        self.model_config = ModelConfig(str(model), max_model_len=max_model_len)
        self.vllm_config = VllmConfig(
            model_config=self.model_config,
            cache_config=CacheConfig(),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
        )
        self.renderer = renderer_from_config(self.vllm_config)
        self.input_processor = InputProcessor(self.vllm_config, self.renderer)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Everybody is let in."""

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, priority: int = 0, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        checked = self.input_processor.process_inputs(
            request_id, prompt, sampling_params, ("generate",), priority=priority
        )
        logprobs: Any = [{1: Logprob(-0.5, 1, "x")}] if sampling_params.logprobs is not None else None
        outputs = [
            CompletionOutput(index, "x", [1], -0.5, logprobs, finish_reason="length")
            for index in range(sampling_params.n)
        ]
        yield RequestOutput(request_id, "", checked.prompt_token_ids, None, outputs, finished=True)


def vllm_front(model: Path, name: str, max_model_len: int) -> FastAPI:
    """An application of vLLM's, with the two paths that generate."""
    engine: Any = CheckingEngine(model, max_model_len)
    models = OpenAIServingModels(engine, [BaseModelPath(name=name, model_path=str(model))])
    renderer = OnlineRenderer(
        engine.model_config,
        engine.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    app.state.openai_serving_completion = OpenAIServingCompletion(
        engine, models, online_renderer=renderer, request_logger=None
    )
    app.state.openai_serving_chat = OpenAIServingChat(
        engine,
        models,
        "assistant",
        online_renderer=renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    app.include_router(chat_router)
    app.include_router(completion_router)
    init_exception_handler(app)
    app.add_middleware(OpenAIErrors)
    return app
