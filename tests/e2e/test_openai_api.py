"""OpenAI's API on a converted model: one real server, asked through the official client."""

import json
import logging
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.conftest import Converted, Server, serve
from vllm_requant import hf
from vllm_requant.bench.servers import server_command

# the first test waits for the conversion
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

KEY = "key-of-this-test"
MAX_MODEL_LEN = 512  # what serve() asks for
# float32: the same request must give the same text in whatever batch it is computed
FLAGS = ("--dtype", "float32", "--api-key", KEY, "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
PROMPT = "The capital of France is"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(converted.folder, tmp_path_factory.mktemp("log") / "api.log", *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client.with_options(api_key=KEY)


@pytest.fixture(scope="module")
def root(client: openai.OpenAI) -> openai.OpenAI:
    """The client for vLLM's own paths beside ``/v1``."""
    return client.with_options(base_url=str(client.base_url).removesuffix("v1/"))


def complete(client: openai.OpenAI, **options: Any) -> Any:
    wanted: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return client.completions.create(**wanted | options)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    wanted: dict[str, Any] = {"model": "m", "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**wanted | options)


def post(root: openai.OpenAI, path: str, **body: Any) -> Any:
    return root.post(path, cast_to=object, body={"model": "m", **body})


def status(url: str, content: bytes | None = None, key: str | None = None) -> tuple[int, str]:
    """Status and body of a request that no client would make."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def test_completion_goes_on_from_the_prompt(client: openai.OpenAI) -> None:
    done = complete(client)
    assert done.choices[0].text.startswith(" Paris")
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (5, 12, 17)
    assert done.model == "m"


def test_prompt_as_tokens_is_the_prompt_as_text(client: openai.OpenAI, converted: Converted) -> None:
    ids = hf.load_tokenizer(converted.folder)(PROMPT).input_ids
    assert complete(client, prompt=ids).choices[0].text == complete(client).choices[0].text


def test_several_prompts_get_an_answer_each(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Water boils at a temperature of"]
    both = complete(client, prompt=prompts).choices
    assert [choice.index for choice in both] == [0, 1]
    assert [choice.text for choice in both] == [complete(client, prompt=one).choices[0].text for one in prompts]


def test_chat_answers_the_question(client: openai.OpenAI) -> None:
    done = chat(client)
    assert done.choices[0].message.role == "assistant"
    assert "Paris" in done.choices[0].message.content
    assert done.choices[0].finish_reason == "stop"


def test_streamed_chunks_join_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = chat(client)
    *chunks, last = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert not last.choices and last.usage == whole.usage

    texts = [chunk.choices[0].text for chunk in complete(client, stream=True)]
    assert len(texts) > 2 and "".join(texts) == complete(client).choices[0].text


def test_logprobs_of_a_completion_are_a_sorted_part_of_a_distribution(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=5).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [sum(map(len, found.tokens[:index])) for index in range(len(found.tokens))]
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        values = list(top.values())
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert 0 < sum(map(math.exp, values)) <= 1
        # greedy
        assert next(iter(top)) == token and values[0] == value


def test_top_logprobs_of_a_chat_are_a_sorted_part_of_a_distribution(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=4).choices[0]
    tokens = choice.logprobs.content
    text = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert text.removesuffix("<|im_end|>") == choice.message.content
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 4 and values == sorted(values, reverse=True)
        assert 0 < sum(map(math.exp, values)) <= 1
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, values[0])


def test_logprobs_of_the_prompt_are_those_of_generating_it(client: openai.OpenAI, converted: Converted) -> None:
    ids = hf.load_tokenizer(converted.folder)(PROMPT).input_ids
    first = complete(client, prompt=ids, logprobs=1, extra_body={"return_token_ids": True}).choices[0]
    echoed = complete(client, prompt=ids + first.token_ids, max_tokens=1, logprobs=1, echo=True).choices[0]
    assert echoed.text.startswith(PROMPT + first.text)
    read = slice(len(ids), len(ids) + len(first.token_ids))
    assert echoed.logprobs.tokens[read] == first.logprobs.tokens
    assert echoed.logprobs.token_logprobs[read] == pytest.approx(first.logprobs.token_logprobs, abs=1e-3)


def test_n_choices_are_drawn_independently(client: openai.OpenAI) -> None:
    choices = complete(client, n=4, temperature=1, seed=7).choices
    assert sorted(choice.index for choice in choices) == [0, 1, 2, 3]
    assert len({choice.text for choice in choices}) == 4


def test_seed_decides_the_text(client: openai.OpenAI) -> None:
    first, again, other = (complete(client, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_text_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=32).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    choice = complete(client, max_tokens=32, stop=[stop]).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    kept = complete(client, max_tokens=32, stop=[stop], extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == choice.text + stop


WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CLOCK: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}


def _tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    # strict: without it vLLM, like OpenAI, lets the arguments be any JSON
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}


TOOLS = [_tool("get_weather", WEATHER), _tool("get_time", CLOCK)]
FORECAST: Any = [{"role": "user", "content": "What will the weather be in Paris during the next 3 days?"}]


@pytest.mark.parametrize(("name", "schema"), [("get_weather", WEATHER), ("get_time", CLOCK)])
def test_named_tool_is_called_as_its_schema_says(client: openai.OpenAI, name: str, schema: dict[str, Any]) -> None:
    choice = chat(
        client,
        messages=FORECAST,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": name}},
        max_tokens=100,
    ).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == name
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_required_tool_is_called_and_its_answer_is_used(client: openai.OpenAI) -> None:
    options: Any = {"messages": FORECAST, "tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 100}
    choice = chat(client, **options).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, WEATHER)
    assert arguments["city"] == "Paris"

    streamed = [chunk.choices[0].delta for chunk in chat(client, stream=True, **options)]
    parts = [part.function for delta in streamed for part in delta.tool_calls or []]
    assert "".join(part.name or "" for part in parts) == "get_weather"
    assert json.loads("".join(part.arguments or "" for part in parts)) == arguments

    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
    told = chat(client, messages=[*FORECAST, choice.message.model_dump(exclude_none=True), result], tools=TOOLS[:1])
    assert told.usage.prompt_tokens > chat(client, messages=FORECAST, tools=TOOLS[:1]).usage.prompt_tokens
    assert told.choices[0].message.content


def test_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 16},
            "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
            "kind": {"enum": ["village", "town", "city"]},
        },
        "required": ["city", "population", "kind"],
        "additionalProperties": False,
    }
    question: Any = [{"role": "user", "content": "Tell me about Paris."}]
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    choice = chat(client, messages=question, max_tokens=100, response_format=wanted).choices[0]
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), schema)
    # unasked it would not have
    with pytest.raises(json.JSONDecodeError):
        json.loads(chat(client, messages=question).choices[0].message.content)


def test_models_names_what_is_served(client: openai.OpenAI, converted: Converted) -> None:
    (model,) = client.models.list().data
    served: Any = model
    assert (served.id, served.max_model_len, served.root) == ("m", MAX_MODEL_LEN, str(converted.folder))


def test_tokenize_and_detokenize_are_the_checkpoints_tokenizer(root: openai.OpenAI, converted: Converted) -> None:
    text = "Où est l'été ? 東京 🙂\n\tx  y"
    found = post(root, "/tokenize", prompt=text)
    assert found["tokens"] == hf.load_tokenizer(converted.folder)(text).input_ids
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), MAX_MODEL_LEN)
    assert post(root, "/detokenize", tokens=found["tokens"]) == {"prompt": text}


def test_tokenize_applies_the_chat_template(client: openai.OpenAI, root: openai.OpenAI) -> None:
    assert post(root, "/tokenize", messages=QUESTION)["count"] == chat(client).usage.prompt_tokens


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        complete(client, model="other")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": [5] * (MAX_MODEL_LEN + 1)}, f"maximum context length is {MAX_MODEL_LEN} tokens"),
        ({"prompt": ""}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"logprobs": 1000}, "logprobs"),
    ],
)
def test_bad_parameter_is_refused_by_name(client: openai.OpenAI, options: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        complete(client, **options)


def test_schema_that_is_none_is_refused(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        chat(client, response_format=wanted)
    assert "Paris" in chat(client).choices[0].message.content


def test_malformed_json_is_refused(client: openai.OpenAI) -> None:
    code, body = status(f"{client.base_url}completions", b'{"model": "m", "prompt"', KEY)
    assert code == 400
    assert "JSON decode error" in json.loads(body)["error"]["message"]


def test_key_is_asked_for(server: Server, client: openai.OpenAI, root: openai.OpenAI) -> None:
    for key in ("none", KEY[:-1], f"{KEY}x"):
        stranger = server.client.with_options(api_key=key)
        with pytest.raises(openai.AuthenticationError):
            complete(stranger)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    assert status(f"{client.base_url}models")[0] == 401
    assert status(f"{client.base_url}models", key=KEY)[0] == 200
    # vLLM leaves what watches a server open
    assert [status(f"{root.base_url}{path}")[0] for path in ("health", "metrics")] == [200, 200]


def test_requant_serve_becomes_vllms_server(server: Server, converted: Converted) -> None:
    """The process that was started as ours runs vLLM's command line, with what was asked for and nothing else."""
    running = Path(f"/proc/{server.pid}/cmdline").read_text().rstrip("\0").split("\0")
    assert running[:4] == server_command(str(converted.folder), [])
    assert set(running[4:]) == {
        *("--host", "127.0.0.1", "--port", str(server.client.base_url.port), "--served-model-name", "m"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager", *FLAGS),
    }


@pytest.fixture
def level_of_root() -> Iterator[None]:
    """Kept: importing vLLM's app sets it, after which no test of this process would see a warning."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.mark.usefixtures("level_of_root")
def test_no_route_or_middleware_is_ours() -> None:
    """vLLM's app, built with its plugins loaded."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m", "--api-key", KEY])
    app = build_app(arguments, ("generate",))
    routes = {route.path: route.endpoint.__module__ for route in app.routes if hasattr(route, "endpoint")}
    middleware = [added.cls.__module__ for added in app.user_middleware]
    assert routes["/v1/chat/completions"].startswith("vllm.") and any(name.startswith("vllm.") for name in middleware)
    assert not [name for name in (*routes.values(), *middleware) if name.startswith("vllm_requant")]
