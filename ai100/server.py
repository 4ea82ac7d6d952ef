"""`python -m ai100.server`: the `ai100` contender. OpenAI's API, `GET /slots` and `POST /topic`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from ai100.cli import SettingsMaker, with_settings
from ai100.engine import AI100Engine, SlotRow
from ai100.settings import START_ERRORS, open_engine
from kvarena.contenders.ai100 import SPEC
from kvarena.contenders.command_line import Host, LoadFormat, Port, ServedModelName
from kvarena.engines.store_metrics import StoreCollector
from kvarena.server.app import create_app, serve
from kvarena.server.errors import ApiError
from kvarena.server.protocol import Messages, Salt, TemplateFields
from kvarena.server.requests import JsonRoute, conversation_of, render_chat
from kvarena.server.state import ERRORS, ApiConfig, ServerDep, engine_of

router = APIRouter(route_class=JsonRoute)

MAX_WAITING = 16
_one_at_a_time = CapacityLimiter(1)
"""Pages ask for the topic at each pause in typing; these requests must not take the threads of all others."""

EngineDep = Annotated[AI100Engine, Depends(engine_of(AI100Engine))]


class SlotRows(BaseModel):
    """`num_evictions`: slots that were taken from a topic for another."""

    slots: list[SlotRow]
    ctx_len: int
    num_evictions: int


@router.get("/slots")
async def slots(engine: EngineDep) -> SlotRows:
    num_evictions = engine.batcher.slots.num_evictions
    return SlotRows(slots=engine.slot_rows(), ctx_len=engine.max_model_len, num_evictions=num_evictions)


class TopicRequest(TemplateFields):
    """A chat's request, of which the answer isn't wanted yet: its further fields are ignored."""

    messages: Messages
    model: str | None = None
    cache_salt: Salt | None = None
    session_id: str | None = None


class TopicAnswer(BaseModel):
    """`is_new`: nothing of the conversation was answered in this topic yet."""

    topic: str
    is_new: bool


@router.post("/topic", responses=ERRORS)
async def topic(body: TopicRequest, request: Request, server: ServerDep, engine: EngineDep) -> TopicAnswer:
    """Which topic the last message would go to. Nothing is answered or remembered, and no slot is touched."""
    server.check_model(body.model)
    if _one_at_a_time.statistics().tasks_waiting >= MAX_WAITING:
        raise ApiError(503, "too many topics are asked for; the answer tells its own")
    find = partial(_find_topic, body, conversation_of(request, body.session_id), engine)
    return await to_thread.run_sync(find, limiter=_one_at_a_time)


def _find_topic(body: TopicRequest, conversation: str | None, engine: AI100Engine) -> TopicAnswer:
    messages = render_chat(engine.tokenizer, body.messages, body).messages
    try:
        name, is_new = engine.topic_of(messages, body.cache_salt or "", conversation)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    return TopicAnswer(topic=name, is_new=is_new)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@with_settings
def main(
    make_settings: SettingsMaker,
    served_model_name: ServedModelName = None,
    host: Host = "127.0.0.1",
    port: Port = SPEC.port,
    separator: Annotated[str | None, typer.Option(help="Text between notes. [default: the model's own]")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Prefill the whole history on every turn.")] = False,
    load_format: LoadFormat = "auto",
) -> None:
    """Serve multi-turn chat on KV slots."""
    try:
        settings = make_settings(
            random_weights=load_format == "dummy",
            use_cache=not no_cache,
            served_model_name=served_model_name,
            separator=separator,
        )
        engine = open_engine(settings)
    except START_ERRORS as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    config = ApiConfig.from_environment()
    serve(create_app(engine, config, routers=[router], collectors=[StoreCollector(engine)]), host, port)


if __name__ == "__main__":
    app()
