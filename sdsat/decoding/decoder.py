"""A model, ready to decode: its engine, what passes cost on it, what planners have learned."""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sdsat.config import CONTEXT, DecodeConfig, InputError, SatIds, require, several, whole
from sdsat.decoding.kept import KeptCache
from sdsat.decoding.lock import FairLock
from sdsat.decoding.loop import Loop
from sdsat.decoding.plan import Planner
from sdsat.decoding.planners import Planners
from sdsat.decoding.resolve import checked, resolved, strategies_of
from sdsat.decoding.sequence import (
    Chooser,
    Generation,
    OnBatchTokens,
    OnTokens,
    Request,
    num_slots,
)
from sdsat.engines.base import BatchCaches, Engine, OnRead, PassInput
from sdsat.engines.calibrate import measured_costs
from sdsat.engines.choose import check_engine, choose_engine, refuse_in_fork
from sdsat.method.costs import CostCurve
from sdsat.method.tree import make_tree
from sdsat.models import embedded
from sdsat.models.loading import load
from sdsat.models.sat_model import SatModel
from sdsat.models.weights import Snapshot

Arrivals = Callable[[int], abc.Sequence[Request]]


class Decoder:
    """A model, the engine that runs its passes, and what is known of their costs and its drafts.

    Attributes:
        model: what is decoded.
        costs: seconds that passes take, measured when first needed.
        planners: those of strategies that learn, by settings.
        lock: held by the thread whose passes run.
    """

    def __init__(self, model: SatModel, engine: str | Engine = "auto", graphs: bool = True) -> None:
        """Choose an engine for a model.

        Args:
            model: its weights and modules may change: see `renew`.
            engine: 'native', 'transformers', 'auto' for native where it can be had (a CPU, float32
                or bfloat16, a C++ compiler); or an engine of this model, which then stays as it is.
            graphs: whether, on a GPU, passes are recorded as CUDA graphs.

        Raises:
            InputError: for an engine that can't be had.
        """
        require(isinstance(model, SatModel), f"model={model!r}: expected a SatModel")
        check_engine("auto" if isinstance(engine, Engine) else engine, graphs)
        self.model = model
        self.costs: CostCurve | None = None
        self.planners = Planners()
        self.lock = FairLock()
        self._wanted = engine if isinstance(engine, str) else None
        self._graphs = graphs
        self._engine = None if isinstance(engine, str) else engine
        self._made_of: Snapshot | None = None
        self.renew()

    @classmethod
    def load(
        cls,
        name: str = embedded.NAME,
        dtype: str = "bfloat16",
        device: str | None = None,
        sat_token_id: SatIds | None = None,
        engine: str = "auto",
        graphs: bool = True,
        trained_k: int | None = None,
        context: int = CONTEXT,
    ) -> Decoder:
        """Load a model (see `models.loading.load`) and choose its engine.

        Args:
            name: a hub id, a directory, a GGUF file, an adapter directory or an embedded name.
            dtype: as of `models.loading.load`.
            device: 'cpu', a GPU number, or several joined by +; None for the first GPU, else the
                CPU.
            sat_token_id: of the SAT, or one a depth, in place of what the checkpoint says.
            engine: as of `Decoder`.
            graphs: as of `Decoder`.
            trained_k: how many SATs the checkpoint was trained for, in place of what it says.
            context: positions of the cache that memory must be left for.

        Raises:
            InputError: in one line, for anything that can't be loaded.
        """
        check_engine(engine, graphs)
        model = load(name, dtype, device, sat_token_id, trained_k, context)
        return cls(model, engine, graphs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engine out of a copy and a pickle: it has addresses of this process."""
        fresh = {"planners": Planners(), "lock": FairLock(), "_made_of": None}
        engine = None if self._wanted is not None else self._engine
        return {**self.__dict__, **fresh, "_engine": engine}

    def __copy__(self) -> Decoder:
        """Share the model and its engine, as `copy.copy` of any other object does."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    @property
    def engine(self) -> Engine:
        """What runs the passes."""
        if self._engine is None:
            self.renew()
        assert self._engine is not None
        return self._engine

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies that can be used here."""
        return strategies_of(self.engine)

    def renew(self) -> None:
        """Make the engine again if weights or modules changed since it was made.

        Every generation begins with this. What was learned of the ones before is forgotten. Raises
        InputError, one line, where the model can't be decoded any more, and in a forked process.
        """
        if self._wanted is None:
            return
        refuse_in_fork(self.model)
        with self.lock.held():
            if self._made_of is not None and self._made_of.holds():
                return
            with torch.inference_mode(False), torch.no_grad():
                if self._made_of is not None:
                    self.costs = None
                if self._engine is not None:
                    self._engine.close()
                self._engine = self._made_of = None
                self.planners.clear()
                self.model.follow()
                self._engine = choose_engine(self.model, self._wanted, self._graphs)
                self._made_of = Snapshot(self.model.lm, self.model.adapter)

    def resolved(self, config: DecodeConfig) -> DecodeConfig:
        """Choose all that the settings leave open: see `resolve.resolved`.

        Raises InputError where SATs are wanted of a model that has none.
        """
        return resolved(self.engine, config)

    def cost_curve(self, anew: bool = False) -> CostCurve:
        """Return what passes cost here: `costs`, measured if that is None, or anew.

        Raises InputError as `renew`.
        """
        self.renew()
        if self.costs is None or anew:
            self.costs = measured_costs(self.engine, anew)
        return self.costs

    def generate(
        self,
        prompt_ids: list[int],
        config: DecodeConfig,
        on_tokens: OnTokens | None = None,
        chooser: Chooser | None = None,
        kept: KeptCache | None = None,
        on_read: OnRead | None = None,
    ) -> Generation:
        """Continue a prompt. The output is the same for every strategy, k and tree.

        Args:
            prompt_ids: its tokens, one at least.
            config: how.
            on_tokens: called after each step with the new tokens and, for each, whether it was an
                accepted draft; the output ends there if it returns True.
            chooser: (logits [V] after all tokens so far) -> (the next token, whether the output
                ends with it); it then chooses instead of config.sampling, which only drafts go by.
            kept: of an earlier generation: what the prompt begins with as its text did is not read
                again. Then it holds this one's.
            on_read: called with (tokens read, how many are to be read) while the prompt is read.

        Returns:
            The output, and what it cost.

        Raises:
            InputError: where the prompt, the settings and the model do not fit together.
        """
        self.renew()
        request = self.request(0, prompt_ids, config, chooser)
        _check_callables("on_tokens", [on_tokens])
        _check_callables("on_read", [on_read])
        kept = KeptCache() if kept is None else kept
        require(isinstance(kept, KeptCache), f"kept={kept!r}: expected a KeptCache")
        report = None
        if on_tokens is not None:
            report = lambda _, tokens, drafted: on_tokens(tokens, drafted)  # noqa: E731
        return next(self._decode([request], 1, request.slots, report, None, kept, on_read))[1]

    def request(
        self,
        number: int,
        prompt_ids: list[int],
        config: DecodeConfig,
        chooser: Chooser | None = None,
    ) -> Request:
        """Resolve the settings of a generation, and check them.

        Args:
            number: names it in what `iterate_arrivals` gives.
            prompt_ids: as of `generate`.
            config: as of `generate`.
            chooser: as of `generate`.

        Raises:
            InputError: where the prompt, the settings and the model do not fit together.
        """
        config = checked(self.engine, prompt_ids, config)
        _check_callables("chooser", [chooser])
        return Request(number, prompt_ids, config, chooser)

    def generate_batch(
        self,
        prompts: abc.Sequence[list[int]],
        configs: DecodeConfig | abc.Sequence[DecodeConfig],
        on_tokens: OnBatchTokens | None = None,
        batch_size: int = 32,
        choosers: abc.Sequence[Chooser | None] | None = None,
    ) -> list[Generation]:
        """Continue every prompt, up to `batch_size` of them in each pass.

        A prompt that waits enters when another one's output ends. Each output is the one that
        `generate` gives for that prompt alone: bit for bit on the native engine, in float32
        anywhere. Seconds in the results are those of all live sequences at once.

        Args:
            prompts: tokens of each.
            configs: one for all or one a prompt; all settings may differ.
            on_tokens: as of `generate`, with the prompt's index before.
            batch_size: sequences in a pass, at most.
            choosers: as of `generate`, one a prompt.

        Returns:
            The results in the order of the prompts.

        Raises:
            InputError: naming the index, where a prompt, its settings and the model do not fit.
        """
        outs = self.iterate_batch(prompts, configs, on_tokens, batch_size, choosers)
        return [out for _, out in sorted(outs, key=lambda item: item[0])]

    def iterate_batch(
        self,
        prompts: abc.Sequence[list[int]],
        configs: DecodeConfig | abc.Sequence[DecodeConfig],
        on_tokens: OnBatchTokens | None = None,
        batch_size: int = 32,
        choosers: abc.Sequence[Chooser | None] | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Continue every prompt, and yield each result when it is there.

        Bad input is refused at once.

        Args:
            prompts: as of `generate_batch`.
            configs: as of `generate_batch`.
            on_tokens: as of `generate_batch`.
            batch_size: as of `generate_batch`.
            choosers: as of `generate_batch`.

        Returns:
            (index of the prompt, its result), in the order of their ends.

        Raises:
            InputError: as of `generate_batch`.
        """
        self.renew()
        whole("batch_size", batch_size, "1 or more", 1)
        prompts = several("prompts", prompts, "a list of lists of token ids")
        each: list[DecodeConfig] = []
        if isinstance(configs, DecodeConfig):
            each += [configs] * len(prompts)
        else:
            each += several("configs", configs, "a DecodeConfig, or a list of them")
        require(
            len(each) == len(prompts),
            f"configs: {len(each)} for {len(prompts)} prompts; expected one, or one a prompt",
        )
        expected = f"a list of {len(prompts)}, one a prompt"
        asked = (
            [None] * len(prompts) if choosers is None else several("choosers", choosers, expected)
        )
        require(len(asked) == len(prompts), f"choosers: {len(asked)}; expected {expected}")
        _check_callables("choosers", asked)
        _check_callables("on_tokens", [on_tokens])
        requests = list[Request]()
        for number, one in enumerate(zip(prompts, each, asked, strict=True)):
            try:
                requests.append(self.request(number, *one))
            except InputError as error:
                raise InputError(f"prompts[{number}]: {error}") from None
        slots = max((request.slots for request in requests), default=0)
        return self._decode(requests, min(batch_size, len(requests)), slots, on_tokens)

    def iterate_arrivals(
        self,
        arrivals: Arrivals,
        context: int,
        on_tokens: OnBatchTokens | None = None,
        batch_size: int = 32,
    ) -> Iterator[tuple[int, Generation]]:
        """Continue prompts that come while others go on, and yield each result when it is there.

        Args:
            arrivals: called before each pass with how many sequences may enter; returns so many at
                most, made by `request`. When there are none, and none is live, the iterator ends.
            context: tokens of prompt and output together, at most.
            on_tokens: as of `generate_batch`.
            batch_size: as of `generate_batch`.

        Returns:
            (number of the request, its result), in the order of their ends.
        """
        self.renew()
        return self._decode([], batch_size, num_slots(0, context), on_tokens, arrivals)

    @torch.inference_mode()
    def next_logits(self, token_ids: list[int], prompt_length: int, config: DecodeConfig) -> Tensor:
        """Compute [V] logits that AR sees after `token_ids`: teacher forcing, bit for bit.

        prompt_length: how many of the tokens are the prompt. config: of the generation, for its
        length. Raises InputError as `renew`.
        """
        self.renew()
        engine = self.engine
        cache = engine.new_cache(num_slots(prompt_length, config.max_new_tokens))
        prompt = torch.tensor(token_ids[: prompt_length - 1], dtype=torch.long)
        engine.prefill(cache, prompt.to(self.model.device))
        for token in token_ids[prompt_length - 1 :]:
            logits = engine.forward([PassInput(cache, [token], make_tree("chain", 0))]).logits
            cache.commit((0,))
        return logits[0]

    def planner(self, config: DecodeConfig) -> Planner:
        """Make the planner of a generation, or find the one that has learned: see `planners`."""
        return self.planners.of(config, self.model.adapter, self._known_costs)

    def _known_costs(self, anew: bool) -> CostCurve:
        """Return the cost curve; where it is known without `renew`, which decoding has called."""
        return self.cost_curve(anew) if self.costs is None or anew else self.costs

    @torch.inference_mode()
    def _decode(
        self,
        requests: abc.Sequence[Request],
        size: int,
        slots: int,
        on_tokens: OnBatchTokens | None,
        arrivals: Arrivals | None = None,
        kept: KeptCache | None = None,
        on_read: OnRead | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Run the loop, and yield (number of the request, its result) at each end.

        Other threads' passes come between these, never beside them; while the caller has what a
        pass made, the model is free.

        Args:
            requests: what waits from the beginning.
            size: how many sequences are live at most; each pass carries what their plans want.
            slots: of the longest of their caches.
            on_tokens: as of `generate_batch`.
            arrivals: as of `iterate_arrivals`.
            kept: where a single sequence begins, and what keeps it; None: nothing does.
            on_read: as of `generate`.
        """
        size = max(1, size)
        waiting = deque[tuple[Request, Planner]]()

        def wait(some: abc.Sequence[Request]) -> None:
            planned = [(each, self.planner(each.config)) for each in some]
            waiting.extend(planned)
            self.engine.prepare(rounded=any(planner.rounds for _, planner in planned))

        with self.lock.held():
            _ = self.engine.row_policy  # it is found now, before seconds count
            wait(requests)
        engine = self.engine
        caches: BatchCaches
        caches = kept.caches(engine, on_read) if kept else engine.batch_caches(size, slots)
        loop = Loop(engine, caches)
        while True:
            free = size - len(loop.live)
            came = arrivals(free - len(waiting)) if arrivals and free > len(waiting) else ()
            if not (waiting or loop.live or came):
                return
            with self.lock.held():
                self._refuse_change(engine)
                if came:
                    wait(came)
                # Several prompts are read in one pass where that can be.
                if waiting and 16 * free >= size:
                    count = min(free, len(waiting))
                    new = loop.enter([waiting.popleft() for _ in range(count)])
                    if kept is not None:
                        kept.keep(engine, *new)
                events = loop.step()
            for sequence, event in zip(loop.live, events, strict=True):
                if on_tokens is not None and on_tokens(*event) is True and not sequence.out.finish:
                    sequence.end("caller")
            for sequence in loop.leave():
                yield sequence.number, sequence.out
                if self._made_of is not None and not self._made_of.holds():
                    self.renew()  # which the next step sees

    def _refuse_change(self, engine: Engine) -> None:
        """Refuse to go on with sequences whose keys and values another engine has made."""
        require(
            self._engine is engine,
            f"model {self.model.name}: its weights or modules changed while outputs of a batch "
            "were still to come; expected them to stay until the last one is there",
        )


def _check_callables(name: str, values: abc.Sequence[Any]) -> None:
    """Refuse what can't be called and is not None, with an InputError."""
    for value in values:
        good = value is None or callable(value)
        require(good, f"{name}={value!r}: expected a function")
