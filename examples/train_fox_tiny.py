"""Train the checkpoint in examples/fox-tiny: a FoX (Pro) of 4.7 million parameters, in plain PyTorch.

    python examples/train_fox_tiny.py --output /tmp/fox-tiny            # one CUDA GPU, about 9 minutes in all
    python examples/train_fox_tiny.py --output /tmp/fox-smoke --smoke   # a few steps on a CPU
    python examples/train_fox_tiny.py --evaluate examples/fox-tiny      # check a saved checkpoint

The text is whatever Python source the machine has: the standard library and the installed packages. The
result is in the dialect of the official implementation of the Forgetting Transformer (arXiv 2503.02130): the
same config.json fields and tensor names, with weights in bfloat16.

Needs torch, numpy, tokenizers and safetensors; downloads nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import site
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END = "<|endoftext|>"
PAGE = 64  # tokens a page when counting what a head has forgotten: the size vllm-fox was designed around
# No newline at their ends: the tokenizer joins a line's end with the next line's indentation.
PROMPTS = (
    "import os\nimport sys\n\n\ndef main(argv=None):",
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):',
    'def read_lines(path, encoding=\'utf-8\'):\n    """Return the lines of a file."""',
)


@dataclass
class FoxConfig:
    """The fields of the official config.json that this script's model depends on."""

    vocab_size: int = 4096
    hidden_size: int = 256
    hidden_ratio: float = 3.5
    num_hidden_layers: int = 4
    num_heads: int = 8
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    norm_eps: float = 1e-6
    log_pruning_tolerance: float = -10.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        """The official rule: two thirds of hidden * ratio, rounded up to a multiple of 256."""
        return 256 * math.ceil(int(self.hidden_size * self.hidden_ratio * 2 / 3) / 256)

    def to_json(self) -> dict[str, Any]:
        """All fields of the official config, as the published checkpoints write them."""
        fixed: dict[str, Any] = {
            "architectures": ["ForgettingTransformerForCausalLM"],
            "model_type": "forgetting_transformer-project_fox",
            "intermediate_size": None,
            "num_kv_heads": None,
            "hidden_act": "swish",
            "window_size": None,
            "elementwise_affine": True,
            "use_cache": True,
            "pad_token_id": None,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "fuse_norm": False,
            "fuse_cross_entropy": True,
            "rope_base": 500000.0,
            "use_rope": False,
            "use_output_gate": True,
            "ogate_act": "sigmoid",
            "fgate_type": "full",
            "fgate_bias_init": False,
            "decay_time_min": None,
            "decay_time_max": None,
            "use_output_norm": True,
            "qk_norm": True,
            "qk_norm_share_param_across_head": False,
            "use_k_shift": True,
            "use_v_shift": True,
            "torch_dtype": "bfloat16",
        }
        return {**fixed, **asdict(self)}


# ----------------------------------------------------------------------------------------------------
# Text: Python sources of this machine, split by file, as one flat array of token ids
# ----------------------------------------------------------------------------------------------------


def text_roots() -> list[Path]:
    """Folders that hold the standard library and the installed packages, none inside another's list twice."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return [path for path in dict.fromkeys(Path(root).resolve() for root in roots) if path.is_dir()]


def find_files(roots: Iterable[Path]) -> list[tuple[str, Path]]:
    """(name relative to its root, path) of every candidate source file, each file once."""
    found: dict[Path, str] = {}
    skipped = {"__pycache__", "test", "tests", "testing", "test_data", "testdata", "node_modules", "lib2to3"}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            # site-packages inside the standard library is a root of its own.
            subfolders[:] = sorted(
                name for name in subfolders
                if name not in skipped and not name.startswith(".")
                and (name not in ("site-packages", "dist-packages") or Path(folder) == root.parent)
            )  # fmt: skip
            for name in sorted(names):
                path = Path(folder, name)
                if name.endswith((".py", ".pyi")) and not name.startswith("test_") and path not in found:
                    found[path] = str(path.relative_to(root))
    return [(name, path) for path, name in found.items()]


def read_source(path: Path) -> str | None:
    """The file's text, or None if it is unreadable, too short or long, generated, or mostly a table."""
    try:
        if not 200 <= path.stat().st_size <= 250_000:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    head = text[:1000].lower()
    if any(mark in head for mark in ("do not edit", "@generated", "auto-generated", "autogenerated")):
        return None
    longest = max(map(len, text.splitlines()), default=0)
    letters = sum(map(str.isalpha, text[:20_000])) / min(len(text), 20_000)
    if (
        longest > 1000
        or letters < 0.45
        or END in text
        or not text.isascii()
        and len(text.encode()) > 1.05 * len(text)
    ):
        return None
    return text


def gather_text(max_bytes: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Sources for training and for validation, and the names of the top-level packages they came from.

    Validation is one file in a hundred, by a hash of its name. Folders are shuffled but a folder's files stay
    together, so that a training window holds files that belong to each other and reading far back pays.
    """
    files = find_files(text_roots())
    folders: dict[str, list[tuple[str, Path]]] = {}
    for name, path in files:
        folders.setdefault(str(path.parent), []).append((name, path))
    order = sorted(folders)
    random.Random(seed).shuffle(order)
    ordered = [item for folder in order for item in folders[folder]]
    with ThreadPoolExecutor(max_workers=8) as pool:
        texts = list(pool.map(lambda item: read_source(item[1]), ordered, chunksize=64))
    train: list[str] = []
    held_out: list[str] = []
    seen: set[bytes] = set()
    packages: dict[str, int] = {}
    size = 0
    for (name, _), text in zip(ordered, texts, strict=True):
        if text is None or size >= max_bytes:
            continue
        digest = hashlib.sha1("".join(text.split()).encode()).digest()
        if digest in seen:  # vendored copies; near copies, such as one model's code derived from another's, remain
            continue
        seen.add(digest)
        size += len(text)
        package = name.split(os.sep)[0].removesuffix(".py")
        packages[package] = packages.get(package, 0) + len(text)
        is_held_out = int.from_bytes(hashlib.sha1(name.encode()).digest()[:4], "big") % 100 == 0
        (held_out if is_held_out else train).append(text)
    return train, held_out, sorted(packages, key=lambda name: -packages[name])


def train_tokenizer(texts: list[str], vocab_size: int, sample_bytes: int, seed: int) -> Tokenizer:
    """A byte-level BPE in which the end-of-text token has id 0, trained on a random sample of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample: list[str] = []
    size = 0
    for index in random.Random(seed).sample(range(len(texts)), len(texts)):
        sample.append(texts[index])
        size += len(texts[index])
        if size >= sample_bytes:
            break
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """uint16 [tokens]: every text behind one end-of-text token (id 0)."""
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 512):
        for item in tokenizer.encode_batch_fast(texts[start : start + 512]):
            parts.append(np.array([0, *item.ids], dtype=np.uint16))
    return np.concatenate(parts)


@dataclass
class Corpus:
    """Token ids for training and validation, the tokenizer, and facts for the report."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    facts: dict[str, Any]


def load_corpus(vocab_size: int, max_bytes: int, min_bytes: int, seed: int, cache: Path | None) -> Corpus:
    """Find, split and tokenize the text, or read it back from `cache` when an earlier run left it there.

    Raises ValueError if the machine has too little text.
    """
    names = ("tokenizer.json", "train.npy", "held_out.npy", "facts.json")
    if cache is not None and all((cache / name).is_file() for name in names):
        return Corpus(
            Tokenizer.from_file(str(cache / names[0])),
            np.load(cache / names[1], allow_pickle=False),
            np.load(cache / names[2], allow_pickle=False),
            json.loads((cache / names[3]).read_text()),
        )
    begin = time.perf_counter()
    train, held_out, packages = gather_text(max_bytes, seed)
    size = sum(map(len, train))
    if size < min_bytes or not held_out:
        raise ValueError(
            f"found {size / 1e6:.1f} MB of Python sources in {', '.join(map(str, text_roots()))}, but "
            f"training needs {min_bytes / 1e6:.0f} MB: run this where more packages are installed"
        )
    log(f"text: {len(train)} files, {size / 1e6:.0f} MB, {time.perf_counter() - begin:.0f} s")
    tokenizer = train_tokenizer(train, vocab_size, 30_000_000, seed)
    log(f"tokenizer: {tokenizer.get_vocab_size()} entries, {time.perf_counter() - begin:.0f} s")
    corpus = Corpus(tokenizer, encode(tokenizer, train), encode(tokenizer, held_out), {})
    corpus.facts = {
        "train_files": len(train),
        "train_bytes": sum(len(text.encode()) for text in train),
        "train_tokens": len(corpus.train),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out),
        "held_out_tokens": len(corpus.held_out),
        "packages": len(packages),
        "largest_packages": packages[:20],
        "prepare_seconds": round(time.perf_counter() - begin, 1),
    }
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        np.save(cache / names[1], corpus.train)
        np.save(cache / names[2], corpus.held_out)
        (cache / names[3]).write_text(json.dumps(corpus.facts))
        tokenizer.save(str(cache / names[0]))
    log(f"tokens: {len(corpus.train) / 1e6:.1f} M, {time.perf_counter() - begin:.0f} s")
    return corpus


# ----------------------------------------------------------------------------------------------------
# Model: module names follow the official checkpoints
# ----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """RMS norm over the last dimension of `groups` equal parts, in float32; weight [size]."""

    def __init__(self, size: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        return (parts.flatten(-2) * self.weight).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """Forgetting attention as the paper writes it (equation 5 of arXiv 2503.02130), some rows at a time.

    q, k, v [batch, heads, tokens, d]; c [batch, heads, tokens] float32, the running sum of log f. Returns
    [batch, heads, tokens, d].

    The scores are written out, not left to a fused half-precision kernel: a gate's gradient is a sum over
    thousands of tokens of score gradients that cancel, and rounding those to bfloat16 makes it a random walk
    that outgrows the signal (seen: the gates shut and training collapsed at windows of 8,192 tokens). Softmax
    and its gradient are float32 here.
    """
    tokens = q.shape[2]
    rows = max(1024, tokens // 4)
    q = q * q.shape[-1] ** -0.5
    # A row's own c_i shifts all its logits alike: its gradient is zero, it only keeps the numbers small.
    own = c.detach()
    out = []
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        logits = (q[:, :, start:stop] @ k[:, :, :stop].mT).float()
        logits = logits + (own[:, :, start:stop, None] - c[:, :, None, :stop])
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        out.append(logits.masked_fill(future, -math.inf).softmax(-1).to(v.dtype) @ v[:, :, :stop])
    return torch.cat(out, dim=2)


class ShiftLinear(nn.Module):
    """A projection whose heads each mix in the previous token's: a * previous + (1 - a) * current."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.shift_proj = nn.Linear(size, heads, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        current = self.linear(x).unflatten(-1, (self.heads, -1))
        share = torch.sigmoid(self.shift_proj(x).float())[..., None]
        previous = F.pad(current, (0, 0, 0, 0, 1, 0))[:, :-1]
        return (share * previous + (1.0 - share) * current).to(current.dtype).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_heads
        self.heads = heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = ShiftLinear(size, heads)
        self.v_proj = ShiftLinear(size, heads)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.ogate_proj = nn.Linear(size, size, bias=False)
        self.fgate_proj = nn.Linear(size, heads)
        self.q_norm = RMSNorm(size, 1e-5, heads)
        self.k_norm = RMSNorm(size, 1e-5, heads)
        self.output_norm = RMSNorm(size, config.norm_eps, heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = (
            split(self.q_norm(self.q_proj(x))),
            split(self.k_norm(self.k_proj(x))),
            split(self.v_proj(x)),
        )
        log_f = F.logsigmoid(self.fgate_proj(x).float()).transpose(1, 2)
        out = attend(q, k, v, log_f.cumsum(-1)).transpose(1, 2).flatten(-2)
        out = self.output_norm(out) * torch.sigmoid(self.ogate_proj(x))
        return self.o_proj(out), log_f


class MLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, 2 * inner, bias=False)  # gate, then up
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, log_f = self.attn(self.attn_norm(x))
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), log_f


class Fox(nn.Module):
    """FoX (Pro) with tied embeddings: ids [batch, tokens] to hidden states [batch, tokens, hidden] and log f
    [batch, layers, heads, tokens]."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embeddings(ids)
        gates = []
        for layer in self.layers:
            x, log_f = layer(x)
            gates.append(log_f)
        return self.norm(x), torch.stack(gates, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embeddings.weight)

    def thresholds(self) -> Tensor:
        """[layers, heads]: the decay under which a key is negligible, -2U - log L + log eps (2504.06949).

        U = max|w_q| max|w_k| sqrt(d) bounds a head's |q.k| / sqrt(d), since its RMS norms bound q and k.
        """
        peaks = []
        for layer in self.layers:
            assert isinstance(layer, Block)
            norms = (layer.attn.q_norm.weight, layer.attn.k_norm.weight)
            q, k = (w.float().abs().unflatten(0, (self.config.num_heads, -1)).amax(-1) for w in norms)
            peaks.append(q * k * self.config.head_dim**0.5)
        length = math.log(self.config.max_position_embeddings)
        return -2.0 * torch.stack(peaks) - length + self.config.log_pruning_tolerance


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------


def orthogonalise(g: Tensor) -> Tensor:
    """[n, rows, columns] to nearly orthogonal matrices, by five Newton-Schulz steps in bfloat16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024). Matrices of one shape are done in one batch: it is
    launches, not arithmetic, that would cost time here."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        shapes = dict.fromkeys(tuple(p.shape) for p in params)
        groups = [{"params": [p for p in params if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            buffer = state.setdefault("momentum", torch.zeros_like(grads))
            buffer.lerp_(grads, 1.0 - group["momentum"])
            updates = orthogonalise(grads.lerp(buffer, group["momentum"])).to(grads.dtype)
            rate = group["lr"] * max(1.0, grads.shape[-2] / grads.shape[-1]) ** 0.5
            for p, update in zip(params, updates.unbind(), strict=True):
                p.mul_(1.0 - group["lr"] * group["decay"]).add_(update, alpha=-rate)


@dataclass
class Plan:
    """How long and how wide to train."""

    minutes: float
    steps: int | None  # counted instead of time in a smoke run
    tokens_per_step: int
    tokens_at_once: int  # a step's gradients are summed over parts of this size, to bound memory
    lengths: tuple[int, int]  # window lengths before and after `switch`
    switch: float = 0.65
    muon_lr: float = 0.02
    adam_lr: float = 0.003


def make_optimizers(model: Fox, plan: Plan, fused: bool) -> list[torch.optim.Optimizer]:
    matrices, gains, others = [], [], []
    for name, p in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            gains.append(p)
        elif p.ndim == 2 and "layers." in name and "shift_proj" not in name and "fgate_proj" not in name:
            matrices.append(p)
        else:
            others.append(p)
    # Decay on the QK-norm gains keeps U, and with it the decay at which a page is dead, from drifting up.
    groups = [{"params": others, "weight_decay": 0.0}, {"params": gains, "weight_decay": 0.1}]
    adam = torch.optim.AdamW(groups, lr=plan.adam_lr, betas=(0.9, 0.95), fused=fused)
    return [Muon(matrices, plan.muon_lr), adam]


def draw(tokens: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """[count, length + 1]: windows at random places."""
    starts = torch.randint(len(tokens) - length - 1, (count, 1), device=tokens.device, generator=generator)
    return tokens[starts + torch.arange(length + 1, device=tokens.device)].long()


def train(model: Fox, tokens: Tensor, plan: Plan, seed: int) -> dict[str, Any]:
    """Train in place until the plan's time (or steps) is over; returns facts for the report."""
    device = tokens.device
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(seed)
    loss_of = next_token_loss
    if on_gpu:
        for layer in model.layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(next_token_loss, dynamic=False)
    optimizers = make_optimizers(model, plan, fused=on_gpu)
    peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    parts = plan.tokens_per_step // plan.tokens_at_once

    def backward(length: int) -> Tensor:
        total = torch.zeros((), device=device)
        for _ in range(parts):
            ids = draw(tokens, length, plan.tokens_at_once // length, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                hidden, _ = model(ids[:, :-1])
                loss = loss_of(hidden, model.embeddings.weight, ids[:, 1:]) / parts
            loss.backward()
            total += loss.detach()
        return total

    begin = time.perf_counter()
    if on_gpu:  # compile both shapes before the clock that steers the learning rate starts
        for length in plan.lengths:
            backward(length)
        model.zero_grad()
        torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - begin
    if on_gpu:
        log(f"compiled: {compile_seconds:.0f} s, {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at most")

    begin = time.perf_counter()
    step, seen, progress, spoke, curve = 0, 0, 0.0, begin, []
    while progress < 1.0:
        length = plan.lengths[progress >= plan.switch]
        # Warm-up, level, then a straight line to zero over the second half.
        factor = min(1.0, (step + 1) / 100, 2.0 * (1.0 - progress) + 1e-3)
        for optimizer, rates in zip(optimizers, peak, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = backward(length)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seen = step + 1, seen + plan.tokens_per_step
        if on_gpu and step % 10 == 0:
            torch.cuda.synchronize()  # so that the clock below tells the time of work done, not queued
        now = time.perf_counter()
        progress = step / plan.steps if plan.steps else (now - begin) / (60.0 * plan.minutes)
        if now - spoke > 15.0 or step == 1 or progress >= 1.0:
            spoke = now
            curve.append((step, round(float(loss), 4)))
            if not curve[-1][1] < min(value for _, value in curve) + 1.0:  # also when it is not a number
                raise RuntimeError(
                    f"training diverged: loss {curve[-1][1]} at step {step}; lower the rates in Plan"
                )
            rate = seen / (now - begin)
            bound = -float(model.thresholds().detach().mean())
            log(
                f"step {step}: loss {curve[-1][1]:.3f}, windows of {length}, {rate / 1e6:.2f} M tokens/s, "
                f"mean -delta {bound:.1f}"
            )
    return {
        "steps": step,
        "tokens": seen,
        "train_seconds": round(time.perf_counter() - begin, 1),
        "compile_seconds": round(compile_seconds, 1),
        "loss_curve": curve,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }


# ----------------------------------------------------------------------------------------------------
# Evaluation, in float32
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(
    model: Fox, tokens: Tensor, length: int, bytes_per_token: float, windows: int
) -> dict[str, Any]:
    """Mean loss over consecutive windows of held-out text, also by position in the window."""
    windows = min(windows, (len(tokens) - 1) // length)
    total = torch.zeros(length, dtype=torch.float64)
    for index in range(windows):
        ids = tokens[index * length : index * length + length + 1].long()[None]
        hidden, _ = model(ids[:, :-1])
        loss = F.cross_entropy(model.logits(hidden[0]), ids[0, 1:], reduction="none")
        total += loss.double().cpu()
    mean = total / windows
    edges = [edge for edge in (0, 512, 2048, 4096, 8192) if edge < length] + [length]
    return {
        "tokens": windows * length,
        "nats_per_token": round(float(mean.mean()), 4),
        "bits_per_byte": round(float(mean.mean()) / math.log(2) / bytes_per_token, 4),
        "by_position": {
            f"{a}-{b}": round(float(mean[a:b].mean()), 4) for a, b in zip(edges, edges[1:], strict=False)
        },
    }


def documents(tokens: Tensor, length: int, count: int) -> list[Tensor]:
    """The first `length` tokens of held-out files that are that long; windows across files if none is."""
    starts = (tokens == 0).nonzero()[:, 0].tolist() + [len(tokens)]
    found = [tokens[a : a + length] for a, b in zip(starts, starts[1:], strict=False) if b - a >= length]
    return (found or list(tokens[: len(tokens) // length * length].view(-1, length)))[:count]


@torch.no_grad()
def forgetting(model: Fox, tokens: Tensor, length: int, count: int) -> dict[str, Any]:
    """What each (layer, head) has given back at the end of held-out prompts of `length` tokens.

    A page is dead when the sum of log f from its last key to the last query lies under the head's threshold.
    """
    prompts = documents(tokens, length, count)
    deltas = model.thresholds()
    dead = []
    for prompt in prompts:
        c = model(prompt.long()[None])[1][0].double().cumsum(-1)  # [layers, heads, tokens]
        decay = c[..., -1:] - c[..., PAGE - 1 :: PAGE]
        dead.append((decay < deltas[..., None]).sum(-1).cpu())
    pages = torch.stack(dead).double()  # [prompts, layers, heads]
    heads = pages[0].numel()
    forgets = (pages > 0).flatten(1).sum(1)
    return {
        "prompts": len(prompts),
        "heads": heads,
        "heads_that_forget_mean": round(float(forgets.double().mean()), 1),
        "heads_that_forget_least": int(forgets.min()),
        "live_share": round(1.0 - float(pages.mean()) / (length // PAGE), 4),
        "live_share_by_head": [[round(float(1 - x * PAGE / length), 3) for x in row] for row in pages.mean(0)],
    }


@torch.no_grad()
def sample(model: Fox, tokenizer: Tokenizer, prompt: str, count: int, temperature: float, seed: int) -> str:
    """`prompt` and up to `count` more tokens; temperature 0 takes the likeliest."""
    device = model.embeddings.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = [0, *tokenizer.encode(prompt).ids]
    for _ in range(count):
        logits = model.logits(model(torch.tensor([ids], device=device))[0][0, -1]).cpu()
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == 0:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def report(
    model: Fox, tokenizer: Tokenizer, held_out: Tensor, bytes_per_token: float, quick: bool
) -> dict[str, Any]:
    """All figures of the model card, printed and returned."""
    length = 256 if quick else model.config.max_position_embeddings
    validation = validation_loss(model, held_out, length, bytes_per_token, 2 if quick else 32)
    log(json.dumps(validation))
    forgotten = {}
    for tokens in sorted({min(2048, length), length}):
        forgotten[str(tokens)] = facts = forgetting(model, held_out, tokens, 1 if quick else 16)
        log(
            f"{tokens} tokens: {facts['heads_that_forget_mean']} of {facts['heads']} heads forget "
            f"(at least {facts['heads_that_forget_least']}), {facts['live_share']:.1%} of the pages live"
        )
    samples = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.6):
            text = sample(model, tokenizer, prompt, 8 if quick else 160, temperature, seed=0)
            samples.append({"temperature": temperature, "text": text})
            log(f"--- temperature {temperature}\n{text}")
    return {
        "validation": validation,
        "forgetting": forgotten,
        "thresholds": [[round(x, 2) for x in row] for row in model.thresholds().tolist()],
        "samples": samples,
    }


# ----------------------------------------------------------------------------------------------------
# Files and the command line
# ----------------------------------------------------------------------------------------------------


def log(message: str) -> None:
    print(message, flush=True)


def save(model: Fox, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the five files of the checkpoint; weights are rounded to bfloat16, the tied head is left out."""
    tensors = {f"model.{name}": p.detach().bfloat16().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    contents = (
        ("config.json", model.config.to_json()),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    )
    for name, content in contents:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path) -> tuple[Fox, Tokenizer]:
    """Read a checkpoint that `save` wrote; float32 parameters holding the saved values."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: name a folder that this script wrote with --output")
    fields = json.loads((folder / "config.json").read_text())
    model = Fox(FoxConfig(**{name: fields[name] for name in FoxConfig.__dataclass_fields__}))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_output(folder: Path, overwrite: bool) -> None:
    """Make the folder and prove that it can be written, before minutes are spent; ValueError if not."""
    if (folder / "model.safetensors").exists() and not overwrite:
        raise ValueError(f"--output {folder} already holds a model.safetensors: choose another or pass --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--output {folder} cannot be written ({error.strerror}): choose another folder"
        ) from error


def run_training(options: argparse.Namespace) -> None:
    if not options.smoke and not torch.cuda.is_available():
        raise ValueError("training needs a CUDA GPU and torch sees none: pass --smoke for a few steps on the CPU")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}")
    make_output(options.output, options.overwrite)
    torch.manual_seed(options.seed)
    begin = time.perf_counter()
    config = FoxConfig()
    if options.smoke:
        device = torch.device("cpu")
        corpus = load_corpus(config.vocab_size, 4_000_000, 1_000_000, options.seed, options.cache)
        plan = Plan(options.minutes, 6, tokens_per_step=1024, tokens_at_once=512, lengths=(128, 256))
    else:
        device = torch.device("cuda")
        corpus = load_corpus(config.vocab_size, 300_000_000, 20_000_000, options.seed, options.cache)
        plan = Plan(options.minutes, None, tokens_per_step=65_536, tokens_at_once=32_768, lengths=(2048, 8192))
    model = Fox(config).to(device)
    log(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    facts = train(model, torch.from_numpy(corpus.train.astype(np.int32)).to(device), plan, options.seed)
    save(model, corpus.tokenizer, options.output)

    # What is reported is what was saved: reload it, rounded to bfloat16.
    saved, tokenizer = load(options.output)
    held_out = torch.from_numpy(corpus.held_out.astype(np.int32)).to(device)
    bytes_per_token = corpus.facts["held_out_bytes"] / corpus.facts["held_out_tokens"]
    result = report(saved.to(device), tokenizer, held_out, bytes_per_token, options.smoke)
    result |= {
        "data": corpus.facts,
        "training": facts,
        "total_seconds": round(time.perf_counter() - begin, 1),
    }
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)
        (options.report / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        kept = {"tokens": held_out[:500_000].cpu(), "bytes_per_token": torch.tensor(bytes_per_token)}
        save_file(kept, options.report / "held_out.safetensors")
    size = sum((options.output / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    log(f"{options.output}: {size:,} bytes of weights and tokenizer, {result['total_seconds']} s in all")


def run_evaluation(options: argparse.Namespace) -> None:
    """Evaluate a saved checkpoint on the held-out text of an earlier run, or else on this machine's own."""
    model, tokenizer = load(options.evaluate)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.held_out is not None:
        kept = load_file(options.held_out)
        tokens, bytes_per_token = kept["tokens"], float(kept["bytes_per_token"])
    else:
        texts = gather_text(300_000_000, options.seed)[1]
        tokens = torch.from_numpy(encode(tokenizer, texts).astype(np.int32))
        bytes_per_token = sum(len(text.encode()) for text in texts) / len(tokens)
    report(model.to(device), tokenizer, tokens.to(device), bytes_per_token, options.smoke)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--output", type=Path, help="train, and write the checkpoint to this folder")
    task.add_argument("--evaluate", type=Path, help="evaluate the checkpoint in this folder instead")
    parser.add_argument("--minutes", type=float, default=6.5, help="training time without preparation (6.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU, to see that it runs")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --output")
    parser.add_argument("--cache", type=Path, help="folder for the tokenized text, to use again in the next run")
    parser.add_argument("--report", type=Path, help="folder for evaluation.json and held_out.safetensors")
    parser.add_argument("--held-out", type=Path, help="held_out.safetensors of an earlier run, for --evaluate")
    options = parser.parse_args()
    try:
        if options.evaluate is not None:
            run_evaluation(options)
        else:
            run_training(options)
    except ValueError as error:
        raise SystemExit(f"train_fox_tiny: {error}") from error


if __name__ == "__main__":
    main()
