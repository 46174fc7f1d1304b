"""Train the models that this project measures itself on: small decoders on public-domain books.

    python tools/quality/train_zoo.py tied --text train.txt --heldout valid.txt --out examples/zoo/tied

The table ``MODELS`` says what each is made of. A sentencepiece BPE tokenizer like Llama 2's (one of this vocabulary
size in ``--work`` is used again) and a model are trained on ``--text`` and saved as transformers saves them.
``--heldout`` is only read to measure. On a CPU every worker is a process with its own share of each batch; gradients
are averaged between them. What an interrupted run needs to continue (tokens, checkpoint) lies in ``--work``; delete
that folder to start again. Needs the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

BOS = 1
EVAL_CTX = 512  # tokens; measured as llama.cpp's perplexity does: BOS first, only the second half counts
GOLDEN = (math.sqrt(5) - 1) / 2
# (share of the run from which on, tokens per sequence)
SHORT_FIRST = ((0.0, 256), (0.6, 512), (0.95, 1024))  # short ones are cheap on a CPU, long ones come as the rate decays
ONE_LENGTH = ((0.0, 512),)  # on a GPU compiling for another length costs more than it saves
WARMUP_STEPS, DECAY_SHARE = 100, 0.4
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration (Jordan et al., Muon, 2024)
NEWTON_SCHULZ_STEPS = 5

CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@dataclass(frozen=True)
class Recipe:
    """A model and how long to train it: ``n_tokens`` seen, in batches of ``batch_tokens``, at a peak rate ``rate``.

    ``curriculum`` has the tokens of a sequence, each from a share of the run on. Heads have 64 dimensions.
    """

    family: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    n_tokens: int
    batch_tokens: int = 32768
    rate: float = 4e-3
    curriculum: tuple[tuple[float, int], ...] = ONE_LENGTH

    def config(self, device: torch.device) -> LlamaConfig | Qwen3Config:
        """Return the model's configuration for training."""
        return CONFIGS[self.family](
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=64,
            max_position_embeddings=self.curriculum[-1][1],
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=self.tied,
            bos_token_id=BOS,
            eos_token_id=2,
            use_cache=False,  # while training; the saved configuration has it on
            # On a CPU faster than sdpa when compiled, backward pass included.
            attn_implementation="eager" if device.type == "cpu" else "sdpa",
        )

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return round(self.n_tokens / self.batch_tokens)


MODELS = {
    # six layers of 256, grouped queries: the model that ships as examples/books-4.6m
    "demo": Recipe("llama", 6, 256, 512, 4, 2, 2048, False, 27_033_600, batch_tokens=8192, curriculum=SHORT_FIRST),
    # a key head for every query head, trained for very long
    "full": Recipe("llama", 6, 256, 512, 4, 4, 1024, tied=False, n_tokens=360_448_000),
    # norms on queries and keys, one table for embedding and output
    "normed": Recipe("qwen3", 12, 256, 512, 4, 2, 2048, tied=True, n_tokens=209_715_200),
    # twenty-four layers, narrow feed-forward blocks, four query heads to one key head
    "deep": Recipe("llama", 24, 256, 256, 4, 1, 1024, tied=True, n_tokens=190_054_400, rate=3e-3),
    # four layers of 512
    "wide": Recipe("llama", 4, 512, 768, 8, 2, 1024, tied=False, n_tokens=209_715_200, rate=3e-3),
}


def tokenizer_config(recipe: Recipe) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": recipe.curriculum[-1][1],
    }


def read_text(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        return file.read()


def train_tokenizer(text: str, prefix: Path, vocabulary: int) -> None:
    """Write ``PREFIX.model``: BPE with byte fallback and untouched whitespace, the settings of Llama 2."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.9995,
        max_sentence_length=1 << 16,
        pad_id=-1,
        minloglevel=2,
    )


def encode(text: str, tokenizer_file: Path) -> np.ndarray:
    """Return the tokens of ``text``, (n,) uint16, encoded a MiB of characters at a time, by all CPUs."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    parts = [text[start : start + (1 << 20)] for start in range(0, len(text), 1 << 20)]
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in tokenizer.encode(parts)])


def prepare(args: argparse.Namespace, texts: Path, vocabulary: int) -> None:
    """Train the tokenizer and write ``train.npy`` and ``heldout.npy`` to the folder ``texts``, unless there are any."""
    texts.mkdir(parents=True, exist_ok=True)
    if (texts / "sizes.json").exists():
        return
    read = {"train": read_text(args.text), "heldout": read_text(args.heldout)}
    if not (texts / "tokenizer.model").exists():
        train_tokenizer(read["train"], texts / "tokenizer", vocabulary)
    sizes = {}
    for name, text in read.items():
        tokens = encode(text, texts / "tokenizer.model")
        np.save(texts / f"{name}.npy", tokens)
        sizes[name] = {"n_bytes": len(text.encode()), "n_tokens": len(tokens)}
    (texts / "sizes.json").write_text(json.dumps(sizes))
    print(sizes, flush=True)


def windows(tokens: np.ndarray, starts: np.ndarray, n_ctx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (BOS, then n_ctx - 1 tokens) and targets, both (len(starts), n_ctx) int64."""
    targets = tokens[starts[:, None] + np.arange(n_ctx)].astype(np.int64)
    inputs = np.concatenate([np.full((len(starts), 1), BOS), targets[:, :-1]], axis=1)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def batch(tokens: np.ndarray, first: int, n_sequences: int, n_ctx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences ``first``, ``first + 1``, … of a Weyl sequence, which covers the text evenly at any length."""
    places = (first + np.arange(n_sequences)) * GOLDEN % 1
    return windows(tokens, (places * (len(tokens) - n_ctx)).astype(np.int64), n_ctx)


def loss_of(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats per token."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=has_fast_bf16(inputs.device)):
        logits = model(input_ids=inputs).logits
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def has_fast_bf16(device: torch.device) -> bool:
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: np.ndarray, n_windows: int, device: torch.device) -> float:
    """Return the loss (nats per token) over the second halves of ``n_windows`` evenly spread windows."""
    starts = np.linspace(0, len(tokens) - EVAL_CTX, n_windows).astype(np.int64)
    losses = []
    for some in np.array_split(starts, math.ceil(n_windows / 16)):
        inputs, targets = (part.to(device) for part in windows(tokens, some, EVAL_CTX))
        logits = model(input_ids=inputs).logits[:, EVAL_CTX // 2 :].float()
        losses.append(cross_entropy(logits.flatten(0, 1), targets[:, EVAL_CTX // 2 :].flatten()).item() * len(some))
    return sum(losses) / n_windows


def report(model: PreTrainedModel, texts: Path, n_windows: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the loss (nats per token) and the bits per byte on held-out and on training text."""
    found = {}
    for name, size in json.loads((texts / "sizes.json").read_text()).items():
        loss = evaluate(model, np.load(texts / f"{name}.npy", mmap_mode="r"), n_windows, device)
        bits_per_byte = loss / math.log(2) * size["n_tokens"] / size["n_bytes"]
        found[name] = {"nats_per_token": round(loss, 4), "bits_per_byte": round(bits_per_byte, 4)}
    return found


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalized, with Nesterov's correction (Jordan et al., Muon, 2024).

    torch's own computes in bfloat16, which takes ten times as long on CPUs that have no instructions for it, and one
    matrix at a time; here those of one shape go together.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in by_shape.items():
                grads = torch.stack([p.grad for p in matrices])
                buffer = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(grads))
                buffer.lerp_(grads, 1 - group["momentum"])
                steps = orthogonalized(grads.lerp(buffer, group["momentum"]))
                steps *= 0.2 * math.sqrt(max(shape)) * group["lr"]  # root mean square as of AdamW
                for p, step in zip(matrices, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step)


def orthogonalized(g: torch.Tensor) -> torch.Tensor:
    """Return about ``U V^T`` of the singular value decomposition of each matrix of ``g``, (n, n_rows, n_cols)."""
    a, b, c = NEWTON_SCHULZ
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if g.shape[1] > g.shape[2] else x


def make_optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for embeddings, output and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        Muon(matrices, lr=rate),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate_factor(step: int, n_steps: int) -> float:
    """Return the learning rate relative to its peak: warmup, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (n_steps - step) / (DECAY_SHARE * n_steps))


def average_gradients(model: PreTrainedModel) -> None:
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad.copy_(grad.view_as(p))


def save_checkpoint(file: Path, step: int, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def train(rank: int, args: argparse.Namespace, recipe: Recipe, texts: Path) -> None:
    """Train as worker ``rank``; worker 0 reports, checkpoints and saves the model."""
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.manual_seed(args.seed)
    if args.workers > 1:
        store = dist.TCPStore("127.0.0.1", args.port, args.workers, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    tokens = np.load(texts / "train.npy")
    n_steps = recipe.n_steps if args.steps is None else args.steps
    model = AutoModelForCausalLM.from_config(recipe.config(device)).float().to(device)
    optimizers = make_optimizers(model, recipe.rate)
    step, checkpoint = 0, args.work / f"{args.model}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        step = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    compiled_loss = torch.compile(loss_of, dynamic=False, mode=args.compile_mode)
    losses: list[torch.Tensor] = []
    started = last = time.time()
    while step < n_steps:
        n_ctx = [length for share, length in recipe.curriculum if step >= share * n_steps][-1]
        n_sequences = recipe.batch_tokens // n_ctx // args.workers
        first = (step * args.workers + rank) * n_sequences
        loss = compiled_loss(model, *(part.to(device) for part in batch(tokens, first, n_sequences, n_ctx)))
        loss.backward()
        if args.workers > 1:
            average_gradients(model)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * rate_factor(step, n_steps)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        losses.append(loss.detach().clone())
        if rank == 0 and step % 20 == 0:
            loss, now = torch.stack(losses).mean().item(), time.time()
            rate = recipe.batch_tokens * len(losses) / (now - last)
            losses, last = [], now
            print(f"step {step}/{n_steps} loss {loss:.4f} ctx {n_ctx} {rate:.0f} tokens/s", flush=True)
        if rank == 0 and step % args.report_every == 0:
            save_checkpoint(checkpoint, step, model, optimizers)
            minutes = (time.time() - started) / 60
            print(f"step {step} after {minutes:.1f} min: {report(model, texts, 48, device)}", flush=True)
    if rank == 0:
        save(model, args, recipe, texts, n_steps, device)
    if args.workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def save(
    model: PreTrainedModel, args: argparse.Namespace, recipe: Recipe, texts: Path, n_steps: int, device: torch.device
) -> None:
    """Write the model in bf16, its tokenizer and ``training.json``: what it was trained on and how well it does."""
    model.config.use_cache = model.generation_config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "tokenizer.model").write_bytes((texts / "tokenizer.model").read_bytes())
    (args.out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(recipe), indent=2) + "\n")
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)
    n_weights, n_tokens = sum(p.numel() for p in saved.parameters()), n_steps * recipe.batch_tokens
    n_text = json.loads((texts / "sizes.json").read_text())["train"]["n_tokens"]
    found = {
        "n_weights": n_weights,
        "n_tokens_seen": n_tokens,
        "tokens_per_weight": round(n_tokens / n_weights, 2),
        "epochs": round(n_tokens / n_text, 2),
        "seed": args.seed,
        "loss": report(saved, texts, 1000, device),
    }
    (args.out / "training.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"saved {args.out}: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model of the zoo.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8, plain or .xz")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on, never trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and checkpoints")
    parser.add_argument("--steps", type=int, help="optimizer steps, in place of the recipe's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: %(default)s)")
    parser.add_argument("--port", type=int, default=29511, help="local port the workers meet at (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=200, help="steps (default: %(default)s)")
    args = parser.parse_args()
    recipe = MODELS[args.model]
    texts = args.work / f"texts-{recipe.vocabulary}"
    prepare(args, texts, recipe.vocabulary)
    if args.workers == 1:
        train(0, args, recipe, texts)
    else:
        torch.multiprocessing.spawn(train, (args, recipe, texts), nprocs=args.workers)


if __name__ == "__main__":
    main()
