"""Answers per second and time to the first token with 1, 4, 16 and 32 clients: three ways to serve one model.

    python benchmarks/serve.py --size mini                        the miniature
    python benchmarks/serve.py --size width --threads 2           Phi-2's width, two layers
    python benchmarks/serve.py --size mini --http                 also through Ray Serve and HTTP

* ``one at a time``: ``generate`` under a lock, as the original demo serves.
* ``static batches``: what waits is padded and given to ``generate`` together (at most 16), the transformers way.
* ``engine``: this project's continuous batching.

Every client asks its next question when it has its answer; every question has an image of its own, which is encoded, so
nothing is reused. Answer lengths are forced, so that random weights do for all of them. Questions are the same. CPU
time per answer is what stays comparable on a machine where others work too.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import queue
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from serving_common import Question, make_checkpoint, make_questions, percentile
from transformers import StoppingCriteria, StoppingCriteriaList

from tinygptv.data.conversation import ChatImage, ChatMessage, encode_conversation
from tinygptv.data.images import normalise_pixels
from tinygptv.inference.assistant import Assistant
from tinygptv.inference.loading import load_for_inference
from tinygptv.inference.sampling import SamplingParams

MAX_BATCH = 16


@dataclass
class Timing:
    """One answer, in seconds since it was asked for."""

    first_token: float
    finished: float
    num_tokens: int


class Watch(StoppingCriteria):
    """Notes when ``generate`` has its first token."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids, scores, **kwargs):
        self.first = self.first or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Generate:
    """``generate`` for one or several questions."""

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model, processor

    def answer(self, questions: list[Question]) -> tuple[float, list[list[int]]]:
        size = self.model.config.vision_config.image_size
        images = [ChatImage.from_bytes(q.image, size) for q in questions]
        layout = self.processor.layout()
        rows = [
            encode_conversation([ChatMessage("user", q.text, (image,))], layout)[0]
            for q, image in zip(questions, images, strict=True)
        ]
        inputs = {name: torch.from_numpy(array) for name, array in self.processor.pad(rows).items()}
        pixels = normalise_pixels(torch.stack([torch.from_numpy(image.pixels) for image in images]))
        longest, watch = max(q.num_tokens for q in questions), Watch()
        output = self.model.generate(
            **inputs,
            pixel_values=pixels,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        return watch.first, [ids[: q.num_tokens] for ids, q in zip(new, questions, strict=True)]


class OneAtATime(Generate):
    """The demo's way."""

    name = "one at a time"

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.lock = threading.Lock()

    def ask(self, question: Question) -> tuple[float, list[int]]:
        with self.lock:
            first, (ids,) = self.answer([question])
        return first, ids

    def close(self) -> None:
        pass


class StaticBatches(Generate):
    """transformers' own batching."""

    name = "static batches"

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.worker = threading.Thread(target=self.run, daemon=True)
        self.worker.start()

    def ask(self, question: Question) -> tuple[float, list[int]]:
        reply: queue.SimpleQueue = queue.SimpleQueue()
        self.waiting.put((question, reply))
        return reply.get()

    def run(self) -> None:
        while (job := self.waiting.get()) is not None:
            time.sleep(0.002)  # who comes at the same time comes along
            batch = [job]
            while len(batch) < MAX_BATCH and not self.waiting.empty():
                batch.append(self.waiting.get())
            first, answers = self.answer([question for question, _ in batch])
            for (_, reply), ids in zip(batch, answers, strict=True):
                reply.put((first, ids))

    def close(self) -> None:
        self.waiting.put(None)
        self.worker.join()


class EngineServer:
    """This project's way."""

    name = "engine"

    def __init__(self, model, processor) -> None:
        self.assistant = Assistant(model, processor, max_batch_size=MAX_BATCH, context_length=384, kept_images=1)

    def ask(self, question: Question) -> tuple[float, list[int]]:
        params = SamplingParams(max_tokens=question.num_tokens, ignore_end=True)
        message = ChatMessage("user", question.text, (self.assistant.open(question.image),))
        first, ids = None, []
        for delta in self.assistant.iterate([message], params):
            first = first or time.perf_counter()
            ids += delta.token_ids
        return first, ids

    def close(self) -> None:
        self.assistant.close()


def run(server, clients: int, questions: list[Question]) -> tuple[float, float, list[Timing], list[list[int]]]:
    """All questions by so many clients; seconds, CPU seconds, timings and answers, in the questions' order."""

    def ask(question: Question) -> tuple[Timing, list[int]]:
        started = time.perf_counter()
        first, ids = server.ask(question)
        return Timing(first - started, time.perf_counter() - started, len(ids)), ids

    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(ask, questions))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return seconds, cpu_seconds, [timing for timing, _ in results], [ids for _, ids in results]


def report(name: str, clients: int, seconds: float, cpu_s: float, timings: list[Timing], baseline: float) -> str:
    rate = len(timings) / seconds
    tokens = sum(timing.num_tokens for timing in timings) / seconds
    first = [timing.first_token * 1e3 for timing in timings]
    whole = [timing.finished * 1e3 for timing in timings]
    cpu = f"{cpu_s / len(timings) * 1e3:.0f}" if cpu_s else "-"
    delays = [f"{percentile(values, share):.0f}" for values in (first, whole) for share in (0.5, 0.95)]
    cells = [name, clients, f"{rate:.1f}", f"{tokens:.0f}", f"{rate / baseline:.1f} x", cpu, *delays]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


HEAD = """| server | clients | answers/s | tokens/s | gain | CPU ms each | 1st token ms p50 | p95 | answer p50 | p95 |
|---|---|---|---|---|---|---|---|---|---|"""


async def run_http(address: str, clients: int, questions: list[Question]) -> tuple[float, list[Timing]]:
    """The same over HTTP; lengths cannot be forced there, so stop and EOS never occur: a bias forbids them."""
    import aiohttp

    pending, timings = iter(questions), []

    async def client(session):
        for question in pending:
            url = f"data:image/jpeg;base64,{base64.b64encode(question.image).decode()}"
            parts = [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": {"url": url}}]
            body = {
                "model": "tinygpt-v",
                "messages": [{"role": "user", "content": parts}],
                "max_tokens": question.num_tokens,
                "logit_bias": {"0": -100},
                "stream": True,
            }
            started, first = time.perf_counter(), None
            async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                async for line in response.content:
                    if line.startswith(b"data: {") and b'"role"' not in line:
                        first = first or time.perf_counter()
            timings.append(Timing((first or started) - started, time.perf_counter() - started, question.num_tokens))

    started = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return time.perf_counter() - started, timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("mini", "width"), default="mini")
    parser.add_argument("--artifact", help="a checkpoint folder instead of random weights")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=3, help="questions per client")
    parser.add_argument("--at-least", type=int, default=24, help="questions in all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--http", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.artifact or make_checkpoint(Path(folder) / "model", options.size)
        model, processor = load_for_inference(checkpoint)
        print(f"size {options.size}, {options.threads} threads, load before: {os.getloadavg()[0]:.1f}\n\n{HEAD}")
        baselines = {}
        for kind in (OneAtATime, StaticBatches, EngineServer):
            server = kind(model, processor)
            run(server, 2, make_questions(4, 4, seed=99))
            for clients in options.clients:
                count = max(options.at_least, options.rounds * clients)
                seconds, cpu_s, timings, answers = run(server, clients, make_questions(count, count))
                if kind is OneAtATime:
                    baselines[clients] = (count / seconds, answers)
                same = sum(a == b for a, b in zip(answers, baselines[clients][1], strict=True))
                line = report(server.name, clients, seconds, cpu_s, timings, baselines[clients][0])
                print(line + (f" {same} of {count} answers equal |" if kind is not OneAtATime else ""), flush=True)
            server.close()
        if options.http:
            bench_http(checkpoint, options, {clients: rate for clients, (rate, _) in baselines.items()})
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


def bench_http(checkpoint, options, baselines) -> None:
    from pipelines.serving.run import serving
    from pipelines.settings import ServeSettings

    settings = ServeSettings(artifact=str(checkpoint), port=0, threads=options.threads, quiet=True, context_length=384)
    with serving(settings) as address:
        asyncio.run(run_http(address, 2, make_questions(8, 8, seed=99)))
        for clients in options.clients:
            count = max(options.at_least, options.rounds * clients)
            seconds, timings = asyncio.run(run_http(address, clients, make_questions(count, count)))
            print(report("engine over HTTP", clients, seconds, 0, timings, baselines[clients]), flush=True)


if __name__ == "__main__":
    main()
