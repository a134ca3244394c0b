"""The sections of gpu.py: each measures one thing and yields the rows of the table, one by one."""

import gc
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from multiprocessing import get_context

import against_trl
import common
import gpu_attention
import torch
from common import as_rows, batches, forward_flops, make_model, make_pairs
from model import loss_of, plain_logps

from training import logps
from training.logps import install_head, response_logps
from training.models import micro_batches, start_accelerator
from utils import first_line

# Of the shape: pairs for the speed of log-probabilities, pairs an update, tokens of a forward pass, longest prompt or
# response, and (prompt, response) lengths of the pairs whose peak memory is measured.
SIZES = {
    "1.5B": (64, 32, 8192, 1024, [(200, 300), (1, 2046), (1, 4095)]),
    "tiny": (2, 2, 128, 24, [(4, 8), (1, 15)]),
}


@dataclass
class Row:
    """A line of the table.

    good: whether the goal was met; None: there is none
    exact: a figure of exactness; where it is not good, the command fails
    """

    what: str
    figure: str
    goal: str = ""
    good: bool | None = None
    exact: bool = False


@dataclass
class Bench:
    """What the sections share."""

    device: str
    shape: str
    rows: list[tuple[str, Row]] = field(default_factory=list)
    prepared: tuple | None = None  # (model, optimizer, accelerator)

    def __post_init__(self):
        self.config = common.make_config(self.shape)
        self.pairs_timed, self.pairs_updated, self.tokens, self.longest, self.lengths = SIZES[self.shape]

    @cached_property
    def rate(self):
        """Of large matrix products in bfloat16, FLOP/s."""
        return self.matrix_rate(torch.bfloat16)

    def matrix_rate(self, dtype):
        return common.matrix_rate(self.device, dtype, size=256 if self.shape == "tiny" else 0)

    def pairs(self, count):
        return make_pairs("", count, self.longest, self.config.vocab_size)

    def model(self):
        """A model with float32 weights, as training has it before accelerate prepares it."""
        return install_head(make_model(self.shape, device=self.device))

    def training(self, model=None):
        """(model, optimizer, accelerator) as training has them; made once. In bfloat16, on a GPU under FSDP 2."""
        if self.prepared is None:
            accelerator = start_accelerator(seed=0, mixed_precision="bf16", cpu=self.device == "cpu")
            model = model or self.model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
            self.prepared = *accelerator.prepare(model.train(), optimizer), accelerator
        return self.prepared

    def free(self):
        """Gives the GPU's memory to other processes."""
        if self.prepared:
            self.prepared[2].free_memory()
            self.prepared = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def ours(self, model, pairs):
        return response_logps(model, as_rows(pairs), torch.device(self.device))

    def plain(self, model, pairs):
        return plain_logps(model, pairs, self.device)

    def seconds(self, function):
        """Of one call, after another one that warms up."""
        function()
        return common.seconds(function, self.device)


# ---------------------------------------------------------------------------------------------- sections


def rates(bench) -> Iterator[Row]:
    """What the card itself does; benchmarks/cost.py takes these figures."""
    for name, rate in (("bfloat16", bench.rate), ("float32", bench.matrix_rate(torch.float32))):
        yield Row(f"matrix products, {name}", f"{rate / 1e12:.2f} TFLOP/s")
    on_gpu = bench.device == "cuda"
    source = torch.empty(2**30 if on_gpu else 2**24, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    taken = bench.seconds(lambda: target.copy_(source))
    yield Row("memory, read and written", f"{2 * source.numel() / taken / 1e12:.3f} TB/s")
    host = torch.empty(2**28 if on_gpu else 2**20, dtype=torch.uint8, pin_memory=on_gpu)
    taken = bench.seconds(lambda: target[: host.numel()].copy_(host, non_blocking=True))
    yield Row("host to device, pinned", f"{host.numel() / taken / 1e9:.1f} GB/s")
    small = torch.zeros(8, device=bench.device)
    taken = bench.seconds(lambda: [small.add_(1) for _ in range(1000)])
    yield Row("launching a kernel", f"{1e3 * taken:.1f} µs")


def exactness(bench) -> Iterator[Row]:
    """Log-probabilities and gradients against the plain way, in float32 and as training computes them."""
    pairs, model = bench.pairs(4), bench.model()
    values, gradients = logps_and_gradients(bench, model, bench.plain, pairs)
    expected = values, {name: gradient.cpu() for name, gradient in gradients.items()}  # there is more room
    del gradients
    nats, gradient = differences(logps_and_gradients(bench, model, bench.ours, pairs), expected)
    yield Row("float32, log-probabilities", f"{nats:.1e} nats", "at most 1e-3", nats <= 1e-3, exact=True)
    yield Row("float32, gradients", f"{gradient:.1e} relative", "at most 1e-4", gradient <= 1e-4, exact=True)
    model, *_ = bench.training(model)
    found = {}
    for name, way in {"plain": bench.plain, "ours": bench.ours}.items():
        found[name] = differences(logps_and_gradients(bench, model, way, pairs), expected)
    names = ("log-probabilities", "nats"), ("gradients", "relative")
    for (what, unit), plain, ours in zip(names, found["plain"], found["ours"]):
        goal = f"at most twice the plain way's {plain:.1e}"
        yield Row(f"bfloat16, {what}", f"{ours:.1e} {unit} from float32", goal, ours <= 2 * plain, exact=True)


def logps_and_gradients(bench, model, way, pairs):
    """(the pairs' log-probabilities, {parameter: its gradient}) of the sum of their losses."""
    model.zero_grad()
    found = []
    for pair in pairs:
        values = way(model, [pair])
        loss_of(values).backward()
        found.append(values.detach().float())
    gradients = {name: local(parameter.grad) for name, parameter in model.named_parameters()}
    model.zero_grad()
    return torch.cat(found), gradients


def local(tensor):
    """Of one process, what FSDP has sharded is all there."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def differences(found, expected):
    """(largest difference of a log-probability in nats, relative difference of all gradients together)."""
    off = whole = 0.0
    for name, value in expected[1].items():
        value = value.to(found[1][name].device)
        off += (found[1][name] - value).double().norm() ** 2
        whole += value.double().norm() ** 2
    return (found[0] - expected[0]).abs().max().item(), (off / whole).sqrt().item()


def throughput(bench) -> Iterator[Row]:
    """Tokens a second, each prompt counted once, and the share of the measured matrix rate; the plain way's FLOPs are
    counted as ours, so that the shares compare."""
    model, optimizer, accelerator = bench.training()

    def row(what, pairs, passes, function, goal):
        try:
            taken = bench.seconds(function)
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            return Row(what, "out of memory", good=False if goal else None)
        share = passes * forward_flops(bench.config, as_rows(pairs)) / taken / bench.rate
        tokens = sum(len(part) for pair in pairs for part in pair)
        figure = f"{tokens / taken:,.0f} tokens/s, {100 * share:.0f} % of the matrix rate"
        return Row(what, figure, f"{100 * goal:.0f} %" if goal else "", share >= goal if goal else None)

    def forward(way, groups):
        with torch.no_grad():
            for group in groups:
                way(model, group)

    def update(way, groups):
        for group in groups:
            accelerator.backward(loss_of(way(model, group)))
        optimizer.step()
        optimizer.zero_grad()

    for what, pairs, passes, function, goal, size in (
        ("log-probabilities", bench.pairs(bench.pairs_timed), 1, forward, 0.6, 4),
        (f"training, {bench.pairs_updated} pairs an update", bench.pairs(bench.pairs_updated), 3, update, 0.45, 1),
    ):
        lengths = [sum(map(len, pair)) for pair in pairs]
        for name, tokens in (("a pair a pass", 0), (f"{bench.tokens:,} tokens a pass", bench.tokens)):
            groups = [[pairs[i] for i in group] for group in micro_batches(range(len(pairs)), lengths, tokens)]
            go = lambda groups=groups: function(bench.ours, groups)
            yield row(f"{what}, {name}", pairs, passes, go, goal if tokens else None)
        plain = lambda: function(bench.plain, batches(pairs, size))
        yield row(f"{what}, the plain way, {size} a pass", pairs, passes, plain, None)


def memory(bench) -> Iterator[Row]:
    """Peak of a training step with its model and optimiser, of pairs of several lengths, beside the simulated one. Of a
    GPU's allocator: a process on a CPU takes something else."""
    cases = [(prompt, response, checkpointing) for prompt, response in bench.lengths for checkpointing in (False, True)]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(3, get_context("spawn")) as simulations:
        bench.config.save_pretrained(folder)
        with common.child_environment():
            expected = [simulations.submit(simulated_peak, folder, *case) for case in cases]
        reached = [measured_peak(bench, *case) for case in cases]
        expected = [future.exception() or future.result() for future in expected]
    for (prompt, response, checkpointing), measured, simulated in zip(cases, reached, expected):
        what = f"a pair of {prompt} + 2 x {response:,} tokens" + ", gradient checkpointing" * checkpointing
        figure = f"{measured / 2**30:.3g} GiB" if measured else "out of memory"
        if isinstance(simulated, BaseException):
            goal, good = f"no simulation: {first_line(simulated)[:90]}", None
        else:
            goal = f"within a tenth of the simulated {simulated / 2**30:.3g} GiB"
            good = bool(measured) and abs(measured / simulated - 1) <= 0.1
        yield Row(what, figure, goal, good)
    if reached[-1]:
        yield Row(what, f"{reached[-1] / 1e9:.1f} GB", "under 40 GB", reached[-1] < 40e9)


def simulated_peak(folder, prompt, response, checkpointing):
    """Bytes, by benchmarks/memory.py; in a process of its own, as it makes a process group."""
    from memory import peak

    return peak(folder, 1, prompt, response, gradient_checkpointing=checkpointing)


def measured_peak(bench, prompt, response, checkpointing):
    """Bytes that the allocator has given out at most, or None where memory was short."""
    model, optimizer, accelerator = bench.training()

    def step(prompt, response):
        accelerator.backward(loss_of(bench.ours(model, [([5] * prompt, [6] * response, [7] * response)])))
        optimizer.step()
        optimizer.zero_grad()

    step(4, 8)  # the optimiser's state
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with common.PeakMemory(bench.device) as peak:
            step(prompt, response)
        return peak.before + peak.mib * 2**20
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        return None
    finally:
        model.gradient_checkpointing_disable()


def kernels(bench) -> Iterator[Row]:
    """What torch's profiler counts in one forward and backward pass; on a CPU operators stand for kernels."""
    model, _, accelerator = bench.training()
    pair = [bench.pairs(1)[0]]

    def whole():
        accelerator.backward(loss_of(bench.ours(model, pair)))
        model.zero_grad()

    count, waits = launches(bench, whole)
    yield Row("kernels of a training pass", f"{count:,}")
    yield Row("waits of the host for the stream in it", f"{waits}", "0", waits == 0)
    head = logps.ResponseHead(bench.config.hidden_size, bench.config.vocab_size, bias=False, device=bench.device)
    predicted = 2000 if bench.shape == "1.5B" else 20
    hidden = torch.randn(1, predicted, bench.config.hidden_size, device=bench.device, requires_grad=True)
    places = torch.arange(predicted, device=bench.device)

    def output_layer():
        head.targets = places, places % bench.config.vocab_size
        with torch.autocast(bench.device, torch.bfloat16):
            head(hidden).sum().backward()
        head.targets = None

    count, _ = launches(bench, output_layer)
    yield Row(f"kernels of the output layer, {predicted:,} response tokens", f"{count:,}", "at most 150", count <= 150)


def launches(bench, function):
    """(kernels that were launched, cudaStreamSynchronize calls) of one call, after another one that warms up."""
    function()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (bench.device == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        function()
        if bench.device == "cuda":
            torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    prefixes = ("cudaLaunch", "cuLaunch") if bench.device == "cuda" else ("aten::",)
    return sum(counts[name] for name in counts if name.startswith(prefixes)), counts.get("cudaStreamSynchronize", 0)


def ways_of_attention(bench) -> Iterator[Row]:
    """Ways to compute attention, see gpu_attention.py; the project's own has to be right."""
    found = {}
    for lengths, way, *figures in gpu_attention.measure(bench.shape, bench.device, bench.rate):
        what, project = f"{way.name}; {' + '.join(map(str, lengths))}", way is gpu_attention.WAYS[0]
        if len(figures) == 1:
            yield Row(what, figures[0], good=False if project else None, exact=project)
            continue
        taken, output, gradients, whole = figures
        right = max(output, gradients) <= gpu_attention.RIGHT
        times = f"{1e3 * taken:.2f} ms a layer, {1e3 * whole:.1f} a pass"
        figure = f"{times}; off by {output:.1e}, gradients {gradients:.1e}"
        yield Row(what, figure, f"at most {gpu_attention.RIGHT}", right, exact=project)
        if right:
            found.setdefault(lengths, []).append((whole, way.name))
    for lengths, ways in found.items():
        yield Row(f"the fastest right way; {' + '.join(map(str, lengths))}", f"{min(ways)[1]}, by the time of a pass")


def trl(bench) -> Iterator[Row]:
    """The project's trainer against TRL's, see against_trl.py."""
    if not against_trl.installed():
        yield Row("TRL", "not installed")
        return
    bench.free()
    batch = 8 if bench.device == "cuda" else 1
    found = against_trl.measure(bench.shape, "bf16", updates=6, batch=batch, device=bench.device)
    tokens, ours = found.pop("ours")
    fastest = min(filter(None, (taken for _, taken in found.values())), default=None)
    speed = f"{tokens / ours:,.0f} tokens/s" if ours else "failed"
    goal = f"1.5 times TRL's, {1.5 * tokens / fastest:,.0f}" if fastest else ""
    yield Row("the project's trainer", speed, goal, bool(ours and fastest and 1.5 * ours <= fastest))
    for way, (_, taken) in found.items():
        yield Row(way, f"{tokens / taken:,.0f} tokens/s" if taken else "failed")


def vllm(bench) -> Iterator[Row]:
    """Sampling, judging and the starts of their engines, see gpu_engines.py."""
    if find_spec("vllm") is None:
        yield Row("vLLM", "not installed")
        return
    import gpu_engines  # whose imports vLLM brings along

    bench.free()
    yield from (Row(what, figure) for what, figure in gpu_engines.measure(bench.shape, bench.device))
