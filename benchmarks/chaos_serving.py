"""Overload, dead replicas, clients that leave, a new artifact under load, autoscaling; and 10,000 answers checked.

    python benchmarks/chaos_serving.py                              all scenarios, a few minutes
    python benchmarks/chaos_serving.py --only overload --scale 1

Starts a local Ray cluster and a small model with random weights, whose right answers are computed beforehand in this
process. Prints one line of results per scenario; exits with 1 where one of them fails.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from serving_common import Question, make_checkpoint, make_questions, percentile

from pipelines.settings import ServeSettings


@dataclass
class Tally:
    """What came back."""

    statuses: collections.Counter = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: int = 0
    clean_errors: int = 0
    no_retry_after: int = 0

    @property
    def right(self) -> int:
        """Answers that are what they should be."""
        return len(self.seconds) - self.wrong

    def line(self) -> str:
        """The counts in one line."""
        slow = f"p50 {percentile(self.seconds, 0.5):.2f} s, p95 {percentile(self.seconds, 0.95):.2f} s"
        statuses = ", ".join(f"{n} x {status}" for status, n in sorted(self.statuses.items(), key=str))
        return f"{statuses}; right {self.right}, wrong {self.wrong}, lost {self.lost}; {slow}"


def body_of(question: Question, stream: bool = False, max_tokens: int = 0) -> dict:
    url = f"data:image/jpeg;base64,{base64.b64encode(question.image).decode()}"
    parts = [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": {"url": url}}]
    return {
        "model": "tinygpt-v",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": max_tokens or question.num_tokens,
        "stream": stream,
    }


async def ask(session, address: str, question: Question, wanted: set[str], tally: Tally, stream: bool = False) -> None:
    """One request, judged."""
    started = time.perf_counter()
    try:
        async with session.post(f"{address}/v1/chat/completions", json=body_of(question, stream)) as response:
            text = await (read_stream(response, tally) if stream else read_whole(response, tally))
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
        tally.lost += 1
        tally.statuses[type(error).__name__] += 1
        return
    if text is not None:
        tally.seconds.append(time.perf_counter() - started)
        tally.wrong += text not in wanted


async def read_whole(response, tally: Tally) -> str | None:
    tally.statuses[response.status] += 1
    content = await response.json()
    if response.status == 200:
        return content["choices"][0]["message"]["content"]
    tally.no_retry_after += response.status in (429, 503) and "Retry-After" not in response.headers
    return None


async def read_stream(response, tally: Tally) -> str | None:
    if response.status != 200:
        return await read_whole(response, tally)
    text, ended = "", False
    async for raw in response.content:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            ended = True
        elif line.startswith("data: "):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                tally.clean_errors += 1
                tally.statuses["error event"] += 1
                return None
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    if not ended:
        tally.lost += 1
        tally.statuses["cut stream"] += 1
        return None
    tally.statuses[200] += 1
    return text


class Service:
    """The deployed model, and what its answers must be."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.scale = scale
        self.questions = make_questions(60, 20)
        # Seeds whose random weights give different answers to different questions; right_answers makes sure.
        self.checkpoints = [make_checkpoint(folder / str(seed), seed=seed) for seed in (1, 3)]
        self.wanted = [right_answers(checkpoint, self.questions) for checkpoint in self.checkpoints]
        self.address = ""

    def deploy(self, seed: int = 0, **changes) -> None:
        """(Re)deploy; waits until it is healthy."""
        from pipelines.serving.run import deploy

        settings = ServeSettings(
            artifact=str(self.checkpoints[seed]),
            port=0,
            context_length=256,
            cpus_per_replica=0.5,
            **{"max_batch_size": 16, "max_queue": 64, **changes},
        )
        self.address = deploy(settings)

    async def load(self, count: int, clients: int, seeds=(0,), stream: bool = False, stop=None) -> Tally:
        """So many requests by so many clients, each asking again at once."""
        tally, numbers = Tally(), iter(range(count))

        async def client(session):
            for i in numbers:
                if stop is not None and stop.is_set():
                    return
                number = i % len(self.questions)
                wanted = {self.wanted[seed][number] for seed in seeds}
                await ask(session, self.address, self.questions[number], wanted, tally, stream)

        async with connection() as session:
            await asyncio.gather(*(client(session) for _ in range(clients)))
        return tally

    async def engine(self, name: str) -> float:
        """Sum of an engine counter over the replicas."""
        return sum(float(line.split()[-1]) for line in await self._metrics(f"tinygptv_engine_{name}"))

    async def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        return [int(line.split('"')[1]) for line in await self._metrics("tinygptv_engine_slots")]

    async def _metrics(self, name: str) -> list[str]:
        """Lines of a metric, one for each replica."""
        async with connection() as session, session.get(f"{self.address}/metrics") as response:
            return [line for line in (await response.text()).splitlines() if line.startswith(f"{name}{{")]


def right_answers(checkpoint: Path, questions: list[Question]) -> list[str]:
    """What the model says to each question, computed in this process."""
    import torch

    from tinygptv.data.conversation import ChatMessage
    from tinygptv.inference.assistant import Assistant
    from tinygptv.inference.sampling import SamplingParams

    torch.set_num_threads(1)
    assistant = Assistant.load(checkpoint, max_batch_size=1, context_length=256)
    answers = [
        assistant.answer(
            [ChatMessage("user", q.text, (assistant.open(q.image),))], SamplingParams(max_tokens=q.num_tokens)
        )
        for q in questions
    ]
    assistant.close()
    assert len(set(answers)) > len(questions) // 2, "answers that are all alike prove nothing"
    return answers


def connection() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=300)
    )


async def until(condition, seconds: float = 120) -> float:
    """Wait for a condition; returns the seconds that it took."""
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        if await condition():
            return time.perf_counter() - started
        await asyncio.sleep(0.3)
    raise TimeoutError("a condition did not come true")


# ---------------------------------------------------------------------------------------------------- scenarios


async def correct(service: Service) -> tuple[bool, str]:
    """10,000 answers by 32 clients, none wrong, none lost."""
    service.deploy()
    count = int(10_000 * service.scale)
    started = time.perf_counter()
    whole = await service.load(count * 4 // 5, 32)
    streams = await service.load(count // 5, 32, stream=True)
    seconds = time.perf_counter() - started
    good = whole.right + streams.right == count
    return good, f"whole: {whole.line()} | streams: {streams.line()} | {count / seconds:.0f} answers/s"


async def overload(service: Service) -> tuple[bool, str]:
    """Ten times as many clients as the server takes, all at once."""
    service.deploy()
    capacity = 16 + 64
    (pid,) = await service.replicas()
    before = psutil.Process(pid).memory_info().rss
    calm = await service.load(capacity, 16)
    tally = await service.load(10 * capacity, 10 * capacity)
    grown = (psutil.Process(pid).memory_info().rss - before) / 1e6
    after = await service.load(50, 8)
    admitted, refused = tally.statuses[200], tally.statuses[429] + tally.statuses[503]
    bound = 3 * percentile(calm.seconds, 0.95) * capacity / 16
    good = (
        admitted + refused == 10 * capacity
        and refused > 0
        and tally.wrong == tally.lost == tally.no_retry_after == 0
        and percentile(tally.seconds, 0.95) < bound
        and after.right == 50
    )
    return good, f"{tally.line()}; refusals without Retry-After {tally.no_retry_after}; memory {grown:+.0f} MB"


async def killed(service: Service) -> tuple[bool, str]:
    """A replica of two is killed while 16 clients stream."""
    service.deploy(num_replicas=2)
    await until(lambda: has_replicas(service, 2))
    pids = await service.replicas()
    load = asyncio.create_task(service.load(int(600 * service.scale), 16, stream=True))
    await asyncio.sleep(2)
    os.kill(pids[0], signal.SIGKILL)
    tally = await load
    back = await until(lambda: has_replicas(service, 2))
    after = await service.load(50, 8)
    good = tally.wrong == tally.lost == 0 and tally.clean_errors <= 16 and after.right == 50
    return (
        good,
        f"{tally.line()}; clean error events {tally.clean_errors}; two replicas again {back:.0f} s after the load",
    )


async def gone(service: Service) -> tuple[bool, str]:
    """200 clients leave in the middle of their answers."""
    service.deploy()
    before = await service.engine("cancelled_total")

    async def leave(session, question):
        async with session.post(
            f"{service.address}/v1/chat/completions", json=body_of(question, True, 180)
        ) as response:
            await response.content.readline()
            response.close()

    count, seconds = int(200 * service.scale), 0.0
    async with connection() as session:
        for start in range(0, count, 20):
            await asyncio.gather(
                *(leave(session, service.questions[i % 60]) for i in range(start, min(start + 20, count)))
            )
            seconds = max(seconds, await until(lambda: is_idle(service), 30))
    cancelled = await service.engine("cancelled_total") - before
    after = await service.load(50, 8)
    return (
        after.right == 50,
        f"{cancelled:.0f} of {count} cancelled in the engine, slots free after at most {seconds:.1f} s",
    )


async def update(service: Service) -> tuple[bool, str]:
    """A new artifact while 8 clients ask; every answer is the old one or the new one."""
    service.deploy(0)
    stop = asyncio.Event()
    load = asyncio.create_task(service.load(1_000_000, 8, seeds=(0, 1), stop=stop))
    await asyncio.sleep(2)
    started = time.perf_counter()
    await asyncio.to_thread(service.deploy, 1)
    seconds = time.perf_counter() - started
    await asyncio.sleep(2)
    stop.set()
    tally = await load
    after = await service.load(50, 8, seeds=(1,))
    good = tally.right == sum(tally.statuses.values()) and after.right == 50
    return good, f"{tally.line()}; the update took {seconds:.0f} s"


async def scaling(service: Service) -> tuple[bool, str]:
    """One to three replicas under load, and back."""
    service.deploy(num_replicas=1, max_replicas=3, max_batch_size=4, max_queue=200)
    stop, seen = asyncio.Event(), []
    load = asyncio.create_task(service.load(1_000_000, 40, stop=stop))
    up = await until(lambda: has_replicas(service, 2, seen), 200)
    stop.set()
    tally = await load
    down = await until(lambda: has_replicas(service, 1, seen), 900)
    return (
        tally.wrong == tally.lost == 0,
        f"{tally.line()}; up after {up:.0f} s (most {max(seen)}), down after {down:.0f} s",
    )


async def has_replicas(service: Service, count: int, seen: list[int] | None = None) -> bool:
    number = len(await service.replicas())
    if seen is not None:
        seen.append(number)
    return number == count if count == 1 else number >= count


async def is_idle(service: Service) -> bool:
    return await service.engine("running") == 0


SCENARIOS = {scenario.__name__: scenario for scenario in (correct, overload, killed, gone, update, scaling)}


@contextmanager
def cluster():
    import ray
    from ray import serve

    from pipelines.cluster import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    ray.init(address="local", num_cpus=4, object_store_memory=300 * 2**20, log_to_driver=False)
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the numbers of requests")
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder, cluster():
        service = Service(Path(folder), options.scale)
        for name in options.only:
            started = time.perf_counter()
            good, counts = asyncio.run(SCENARIOS[name](service))
            failed += [] if good else [name]
            verdict = "as it must be" if good else "NOT AS IT MUST BE"
            took = f"{time.perf_counter() - started:.0f} s, load {os.getloadavg()[0]:.1f}"
            print(f"* **{name}** ({SCENARIOS[name].__doc__.strip('.')}): {verdict}. {counts}. [{took}]", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
