"""A request on its way through mlx-lm's engine, and what it comes to for the client."""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop, Queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm import server as host

from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.serving.answers import ClientGone


@dataclass(eq=False)
class Job:
    """A request on its way through mlx-lm, and the queue of replies to it."""

    segments: list[Segment]
    chat: bool
    loop: AbstractEventLoop  # of who waits for the replies
    k: int  # the merge factor at which it is read
    context: host.GenerationContext | None = None
    cancelled: bool = False  # by the client
    alone: bool = False  # not in a batch
    over: bool = False  # mlx-lm needs its blocks only until it takes up another prompt
    failed: bool = False
    lengths: list[int] = field(default_factory=list)  # original tokens of each position
    merged_tokens: int = 0  # of them, those that were read in merged form
    generated: int = 0
    first_token_at: float | None = None  # as time.monotonic()
    earlier: int = 0  # tokens generated in earlier rounds of the same answer
    messages: tuple[()] = ()  # mlx-lm looks for images in them
    _replies: Queue = field(default_factory=Queue)

    def put(self, reply: Any) -> None:
        """Takes a reply from mlx-lm: a context, progress, a token, an error, or None at the end."""
        if isinstance(reply, host.GenerationContext):
            self.context = reply
        elif reply is None or isinstance(reply, Exception):
            self.over, self.failed = True, reply is not None
        elif self.cancelled:
            if self.alone and isinstance(reply, tuple):
                # mlx-lm would read the prompt to its end.
                raise ClientGone("cancelled while its prompt was read")
            # mlx-lm looks at this next, and takes it out of the batch before another comes in.
            self.context.stop()
            self.over = True
        self.tell(reply)

    def tell(self, reply: Any) -> None:
        """Gives the client's side a reply, from any thread."""
        self.loop.call_soon_threadsafe(self._replies.put_nowait, reply)

    async def next(self) -> Any:
        """The next reply; an error is raised."""
        reply = await self._replies.get()
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, host.Response):
            self.generated += 1
            self.first_token_at = self.first_token_at or time.monotonic()
        return reply

    def followed_by(self, segments: list[Segment]) -> Job:
        """The next job of the same answer, with another prompt."""
        carried = {"earlier": self.earlier + self.generated, "first_token_at": self.first_token_at}
        return Job(segments, self.chat, self.loop, self.k, **carried)

    @property
    def cached_tokens(self) -> int:
        """How many original tokens a KV cache held already."""
        positions = self.context.prompt_cache_count if self.context else 0
        return sum(self.lengths[: max(positions, 0)])


def usage_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """The counts that a client gets for its prompts."""
    prompt = sum(sum(job.lengths) for job in jobs)
    generated = sum(job.earlier + job.generated for job in jobs)
    merged = sum(job.merged_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "compressed_tokens": sum(len(job.lengths) for job in jobs),
        "merged_tokens": merged,
        "raw_tokens": prompt - merged,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs)},
    }
