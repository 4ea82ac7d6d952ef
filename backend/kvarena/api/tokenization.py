"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from kvarena.api.json_body import JsonRoute
from kvarena.api.prompts import check_token_ids, render_chat
from kvarena.api.request_models import DetokenizeRequest, TokenizeRequest
from kvarena.api.response_models import DetokenizedPrompt, Tokens
from kvarena.api.server import ERRORS, Server, TheServer

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, server: TheServer) -> Tokens:
    server.check_model(body.model)
    return await asyncio.to_thread(_tokenize, body, server)


def _tokenize(body: TokenizeRequest, server: Server) -> Tokens:
    tokenizer = server.engine.tokenizer
    if body.prompt is not None:
        text, adds_special = body.prompt, body.add_special_tokens is not False
    else:
        text = render_chat(tokenizer, body.messages or [], body).text
        adds_special = bool(body.add_special_tokens)
    ids = tokenizer.encode(text, add_special_tokens=adds_special)
    names = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=server.engine.max_model_len, tokens=ids, token_strs=names)


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, server: TheServer) -> DetokenizedPrompt:
    server.check_model(body.model)
    ids = check_token_ids(body.tokens, server.engine.tokenizer, "tokens")
    prompt = await asyncio.to_thread(server.engine.tokenizer.decode, ids, skip_special_tokens=False)
    return DetokenizedPrompt(prompt=prompt)
