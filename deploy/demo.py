"""The whole road on one machine: convert a model, hold it against the original, serve it, ask it something.

Run by ``make demo``. What exists already is used again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vllm_requant.bench.servers import REQUANT, ServerError, free_port, start_server, stop, wait_until_healthy

QUESTION = "What is the capital of France, and what is it known for?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model to convert")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the logs")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in each")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "checkpoint"

    step("1/4  convert: 4-bit SqueezeLLM + ReQuant")
    if (checkpoint / "config.json").exists():
        print(f"{checkpoint} exists, used again")
    else:
        run(
            [
                *REQUANT,
                "convert",
                arguments.model,
                "-o",
                str(checkpoint),
                "--bits",
                "4",
                "--num-samples",
                str(arguments.num_samples),
                "--seq-len",
                str(arguments.seq_len),
            ]
        )
    facts = json.loads(run([*REQUANT, "inspect", str(checkpoint), "--json"], capture=True))

    step("2/4  evaluate against the original, on text it was not calibrated on")
    results = arguments.work / "eval.json"
    if not results.exists() or results.stat().st_mtime < (checkpoint / "config.json").stat().st_mtime:
        command = [*REQUANT, "eval", str(checkpoint), "--against", arguments.model, "--json"]
        results.write_text(run([*command, "--seq-len", "512", "--max-tokens", "8192"], capture=True))
    (evaluation,) = json.loads(results.read_text())["evaluations"]
    scores = evaluation["scores"]

    step("3/4  serve it with vLLM (eager, so that it starts within a minute or two)")
    log_path = arguments.work / "server.log"
    port = free_port()
    command = [*REQUANT, "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "2048", "--enforce-eager", "--served-model-name", "demo"]
    server = start_server(command, log_path)
    try:
        print(f"ready after {wait_until_healthy(server, port, log_path):.0f} s")
        step("4/4  ask over the OpenAI API, streaming")
        tokens, seconds = ask(port)
    finally:
        stop(server)

    size = facts["bytes"]
    step("done")
    print(f"bits per weight      {facts['bits_per_weight']:.3f} (16 before; every stored byte counted)")
    print(f"checkpoint           {size['total'] / 2**20:.0f} MiB ({size['total_16bit'] / 2**20:.0f} MiB in 16 bit)")
    print(f"perplexity           {scores['perplexity']:.3f} (original {scores['reference_perplexity']:.3f})")
    print(f"KL divergence        {scores['kl_divergence']:.4f} nats a token")
    print(f"top-1 agreement      {100 * scores['top1_agreement']:.1f} %")
    print(f"decoding             {tokens / seconds:.1f} tokens/s (one request, eager)")
    print(f"serve it yourself    {Path(sys.executable).parent}/requant serve {checkpoint}")


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def run(command: list[str], *, capture: bool = False) -> str:
    """Run a command; its log goes on to this terminal, its result is returned if asked for."""
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        sys.exit(f"failed with status {done.returncode}: {' '.join(command)}")
    return done.stdout or ""


def ask(port: int) -> tuple[int, float]:
    """Stream an answer; return generated tokens after the first and the seconds they took."""
    from openai import OpenAI

    client: Any = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    print(f"> {QUESTION}")
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=96,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, last, generated = None, 0.0, 0
    for chunk in stream:
        if chunk.usage is not None:
            generated = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.monotonic()
            first = first if first is not None else last
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()
    if first is None or generated < 2:
        sys.exit("the server sent no text")
    return generated - 1, last - first


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:
        sys.exit(str(error))
