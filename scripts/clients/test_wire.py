"""Answers and streams against the published schemas, as the official packages carry them: their types
are generated from OpenAI's and Anthropic's API descriptions. Strict: no number for a string, no unknown
value of an enumeration, nothing required left out."""

import json
import os
import urllib.request

import pytest

TypeAdapter = pytest.importorskip("pydantic").TypeAdapter

URL = os.environ["BITNET_URL"]
PROMPT = [{"role": "user", "content": "Once upon a time"}]
TOOL = {"type": "function", "function": {
    "name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"], "additionalProperties": False}}}
CHAT = {"model": "builtin", "messages": PROMPT, "max_tokens": 6, "temperature": 0}
COMPLETION = {"model": "builtin", "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
RESPONSE = {"model": "builtin", "input": "Once upon a time", "max_output_tokens": 6, "temperature": 0}
MESSAGE = {"model": "builtin", "messages": PROMPT, "max_tokens": 6, "temperature": 0}


def send(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"content-type": "application/json"})
    return urllib.request.urlopen(request).read().decode()


def events(path, body):
    lines = send(path, {**body, "stream": True}).splitlines()
    data = [line[6:] for line in lines if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"], data[-1] == "[DONE]"


def check(kind, value):
    # From text, so that strictness allows what JSON cannot say otherwise.
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)


@pytest.mark.parametrize("extra", [
    {}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}, {"tools": [TOOL]}, {"stop": ["a", "e"]},
    {"max_tokens": 500, "seed": 3, "temperature": 1.5}, {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": TOOL["function"]["parameters"]}}, "max_tokens": 100},
])
def test_openai_chat(extra):
    pytest.importorskip("openai")
    pytest.importorskip("openai")
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    body = {**CHAT, **extra}
    check(ChatCompletion, json.loads(send("/v1/chat/completions", body)))
    for options in [{}, {"stream_options": {"include_usage": True}}]:
        chunks, done = events("/v1/chat/completions", {**body, **options})
        assert done
        for chunk in chunks:
            check(ChatCompletionChunk, chunk)


@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"logprobs": 2}, {"echo": True, "logprobs": 1, "max_tokens": 0}])
def test_openai_completions(extra):
    pytest.importorskip("openai")
    pytest.importorskip("openai")
    from openai.types import Completion

    answer = json.loads(send("/v1/completions", {**COMPLETION, **extra}))
    if "echo" in extra:
        # Nothing comes before the first token of a prompt. OpenAI's own answers say null here and
        # evaluation programs expect it; the schema forgets it.
        logprobs = answer["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        logprobs["token_logprobs"][0], logprobs["top_logprobs"][0] = 0.0, {}
    check(Completion, answer)


@pytest.mark.parametrize("extra", [
    {}, {"instructions": "Be brief.", "metadata": {"a": "b"}}, {"tools": [{**TOOL["function"], "type": "function", "strict": False}]},
    {"tools": [{**TOOL["function"], "type": "function", "strict": True}], "tool_choice": "required", "max_output_tokens": 200},
])
def test_openai_responses(extra):
    pytest.importorskip("openai")
    pytest.importorskip("openai")
    from openai.types.responses import Response, ResponseStreamEvent

    body = {**RESPONSE, **extra}
    check(Response, json.loads(send("/v1/responses", body)))
    found, _ = events("/v1/responses", body)
    for event in found:
        check(ResponseStreamEvent, event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))


def test_openai_embeddings_and_models():
    pytest.importorskip("openai")
    pytest.importorskip("openai")
    from openai.types import CreateEmbeddingResponse, Model

    check(CreateEmbeddingResponse, json.loads(send("/v1/embeddings", {"model": "builtin", "input": ["a", "b"]})))
    check(list[Model], json.loads(send("/v1/models"))["data"])
    check(Model, json.loads(send("/v1/models/builtin")))


@pytest.mark.parametrize("extra", [
    {}, {"tools": [{"name": "f", "input_schema": TOOL["function"]["parameters"]}], "tool_choice": {"type": "any"}, "max_tokens": 200},
])
def test_anthropic(extra):
    pytest.importorskip("anthropic")
    pytest.importorskip("anthropic")
    from anthropic.types import Message, RawMessageStreamEvent

    body = {**MESSAGE, **extra}
    check(Message, json.loads(send("/v1/messages", body)))
    for event in events("/v1/messages", body)[0]:
        if event["type"] != "ping":  # in the protocol, not among the types
            check(RawMessageStreamEvent, event)


def test_ollama():
    pytest.importorskip("ollama")
    pytest.importorskip("ollama")
    from ollama import ChatResponse, EmbedResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

    options = {"num_predict": 4}
    check(ChatResponse, json.loads(send("/api/chat", {"model": "builtin", "messages": PROMPT, "stream": False, "options": options})))
    check(GenerateResponse, json.loads(send("/api/generate", {"model": "builtin", "prompt": "a", "stream": False, "options": options})))
    check(EmbedResponse, json.loads(send("/api/embed", {"model": "builtin", "input": "a"})))
    # Dates are read from text, which strictness forbids.
    for kind, path, body in [(ListResponse, "/api/tags", None), (ProcessResponse, "/api/ps", None), (ShowResponse, "/api/show", {"model": "builtin"})]:
        kind.model_validate(json.loads(send(path, body)))
