"""Official clients against a running server. `BITNET_URL` says where; scripts/test-clients.sh starts one."""

import json
import os
import urllib.request

import pytest

URL = os.environ["BITNET_URL"]
PROMPT = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture
def openai_client():
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="sk-local", max_retries=0)


def test_openai_chat(openai_client):
    answer = openai_client.chat.completions.create(
        model="builtin", messages=PROMPT, max_completion_tokens=8, temperature=0,
        logprobs=True, top_logprobs=2, n=2, seed=1, stop=["zzz"], user="someone",
    )
    assert len(answer.choices) == 2 and answer.usage.completion_tokens == 16
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    # What was answered can be sent back as it is.
    history = PROMPT + [answer.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    assert openai_client.chat.completions.create(model="builtin", messages=history, max_tokens=2).choices


def test_openai_chat_stream(openai_client):
    request = dict(model="builtin", messages=PROMPT, max_tokens=8, temperature=0)
    whole = openai_client.chat.completions.create(**request).choices[0].message.content
    chunks = list(openai_client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole
    assert chunks[-1].usage.completion_tokens == 8 and not chunks[-1].choices
    assert all(c.usage is None for c in chunks[:-1])
    # Its helper calls an answer that met the length limit an error, so only its events are read.
    with openai_client.chat.completions.stream(**request) as stream:
        assert "".join(e.delta for e in stream if e.type == "content.delta") == whole


WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"], "additionalProperties": False}}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_openai_tools(openai_client, choice):
    request = dict(model="builtin", messages=PROMPT, tools=[WEATHER], tool_choice=choice, max_tokens=300, temperature=0, parallel_tool_calls=False)
    answer = openai_client.chat.completions.create(**request).choices[0]
    assert answer.finish_reason == "tool_calls" and len(answer.message.tool_calls) == 1
    call = answer.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert len(arguments["city"]) <= 8 and 1 <= arguments["days"] <= 7 and len(arguments) == 2
    # The same arguments, in pieces.
    deltas = [c.choices[0].delta.tool_calls for c in openai_client.chat.completions.create(**request, stream=True)]
    pieces = [piece for delta in deltas for piece in delta or []]
    assert pieces[0].function.name == "get_weather" and pieces[0].id
    assert len(pieces) > 2 and "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    # The call and its result can be sent back.
    history = PROMPT + [answer.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    again = openai_client.chat.completions.create(model="builtin", messages=history, tools=[WEATHER], tool_choice="auto", max_tokens=4)
    assert again.choices[0].message.content


def test_openai_completions(openai_client):
    answer = openai_client.completions.create(
        model="builtin", prompt="Once upon a time", max_tokens=3, echo=True, logprobs=1, temperature=0)
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon a time")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None


def test_openai_responses(openai_client):
    request = dict(model="builtin", input="Once upon a time", max_output_tokens=8, temperature=0)
    whole = openai_client.responses.create(**request)
    assert whole.status == "incomplete" and whole.output_text
    with openai_client.responses.stream(**request) as stream:
        events = list(stream)
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_openai_embeddings_and_models(openai_client):
    vector = openai_client.embeddings.create(model="builtin", input="a dog").data[0].embedding
    assert len(vector) == 256 and abs(sum(x * x for x in vector) - 1) < 1e-3
    assert [m.id for m in openai_client.models.list()] == ["builtin"]
    assert openai_client.models.retrieve("builtin").object == "model"


def test_openai_errors_are_typed(openai_client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as error:
        openai_client.chat.completions.create(model="builtin", messages=PROMPT, temperature=3)
    assert error.value.param == "temperature" and error.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="none", messages=PROMPT)


def test_anthropic():
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=URL, api_key="sk-local", max_retries=0)
    # Newer packages name no `temperature`; the format has it still.
    request = dict(model="builtin", max_tokens=8, messages=PROMPT, extra_body={"temperature": 0})
    whole = client.messages.create(**request)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 8
    with client.messages.stream(**request) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == 8
    count = client.messages.count_tokens(model="builtin", messages=PROMPT)
    assert count.input_tokens > 0
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**{**request, "max_tokens": 0})


def test_ollama():
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=URL)
    options = {"num_predict": 8, "temperature": 0}
    whole = client.chat(model="builtin", messages=PROMPT, options=options)
    assert whole.done and whole.eval_count == 8
    text = "".join(p.message.content for p in client.chat("builtin", PROMPT, options=options, stream=True))
    assert text == whole.message.content
    assert client.generate("builtin", "Once upon a time", options=options).response == text
    assert len(client.embed("builtin", ["a", "b"]).embeddings) == 2
    assert client.list().models[0].model == "builtin"
    assert client.ps().models[0].name == "builtin"
    assert client.show("builtin").modelinfo["general.parameter_count"] > 0
    client.generate("builtin", "Once", options=options, keep_alive="5m")
    assert client.ps().models[0].expires_at.year < 9999
    # What `ollama stop` sends.
    assert client.generate("builtin", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    with pytest.raises(ollama.ResponseError):
        client.chat("none", PROMPT)


def test_prometheus_reads_the_metrics():
    parser = pytest.importorskip("prometheus_client.parser")
    text = urllib.request.urlopen(f"{URL}/metrics").read().decode()
    names = {family.name for family in parser.text_string_to_metric_families(text)}
    assert {"bitnet_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"} <= names
