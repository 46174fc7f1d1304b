"""Train the demo model of this repo: a small Llama on public-domain books, on a CPU, in about an hour.

    python tools/train_demo_model.py --text train.txt --heldout valid.txt --out examples/books-4.6m

A sentencepiece BPE tokenizer like Llama 2's and a ``LlamaForCausalLM`` are trained on ``--text`` and saved as
transformers saves them. ``--heldout`` is only read to measure. Every worker is a process with one thread and its own
share of each batch; gradients are averaged between them. What an interrupted run needs to continue (tokens,
checkpoint) lies in ``OUT.work``; delete that folder to start again. Needs the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 1
EVAL_CTX = 512  # tokens; measured as llama.cpp's perplexity does: BOS first, only the second half counts
GOLDEN = (math.sqrt(5) - 1) / 2
# (share of the run from which on, tokens per sequence): short sequences are cheap, long ones come when the rate decays.
CURRICULUM = ((0.0, 256), (0.6, 512), (0.95, 1024))
WARMUP_STEPS, DECAY_SHARE = 100, 0.4

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=2,
    use_cache=False,  # while training; the saved configuration has it on
    attn_implementation="eager",  # on a CPU faster than sdpa when compiled, backward pass included
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": CONFIG.max_position_embeddings,
}


def read_text(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        return file.read()


def train_tokenizer(text: str, prefix: Path) -> None:
    """Write ``PREFIX.model``: BPE with byte fallback and untouched whitespace, the settings of Llama 2."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=CONFIG.vocab_size,
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
    """Return the tokens of ``text``, (n,) uint16, encoded a MiB of characters at a time."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    parts = (text[start : start + (1 << 20)] for start in range(0, len(text), 1 << 20))
    return np.concatenate([np.array(tokenizer.encode(part), dtype=np.uint16) for part in parts])


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Train the tokenizer and write ``train.npy`` and ``heldout.npy``, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    if (work / "sizes.json").exists():
        return
    texts = {"train": read_text(args.text), "heldout": read_text(args.heldout)}
    train_tokenizer(texts["train"], work / "tokenizer")
    sizes = {}
    for name, text in texts.items():
        tokens = encode(text, work / "tokenizer.model")
        np.save(work / f"{name}.npy", tokens)
        sizes[name] = {"n_bytes": len(text.encode()), "n_tokens": len(tokens)}
    (work / "sizes.json").write_text(json.dumps(sizes))
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


def loss_of(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs).logits
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: np.ndarray, n_windows: int) -> float:
    """Return the loss (nats per token) over the second halves of ``n_windows`` evenly spread windows."""
    starts = np.linspace(0, len(tokens) - EVAL_CTX, n_windows).astype(np.int64)
    losses = []
    for some in np.array_split(starts, math.ceil(n_windows / 16)):
        inputs, targets = windows(tokens, some, EVAL_CTX)
        logits = model(input_ids=inputs).logits[:, EVAL_CTX // 2 :].float()
        losses.append(cross_entropy(logits.flatten(0, 1), targets[:, EVAL_CTX // 2 :].flatten()).item() * len(some))
    return sum(losses) / n_windows


def report(model: LlamaForCausalLM, work: Path, n_windows: int) -> str:
    """Return the loss and the bits per byte on held-out and on training text, as one line."""
    parts = []
    for name, size in json.loads((work / "sizes.json").read_text()).items():
        loss = evaluate(model, np.load(work / f"{name}.npy", mmap_mode="r"), n_windows)
        bits_per_byte = loss / math.log(2) * size["n_tokens"] / size["n_bytes"]
        parts.append(f"{name} {loss:.4f} nats/token {bits_per_byte:.4f} bits/byte")
    return ", ".join(parts)


def make_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for embeddings, output and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate_factor(step: int, n_steps: int) -> float:
    """Return the learning rate relative to its peak: warmup, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (n_steps - step) / (DECAY_SHARE * n_steps))


def average_gradients(model: LlamaForCausalLM) -> None:
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad.copy_(grad.view_as(p))


def save_checkpoint(file: Path, step: int, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def train(rank: int, args: argparse.Namespace, work: Path) -> None:
    """Train as worker ``rank``; worker 0 reports, checkpoints and saves the model."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    store = dist.TCPStore("127.0.0.1", args.port, args.workers, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    tokens = np.load(work / "train.npy")
    model = LlamaForCausalLM(CONFIG)
    optimizers = make_optimizers(model, args.rate)
    step, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        step = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    compiled_loss = torch.compile(loss_of, dynamic=False)
    losses, times = [], [time.time()]
    while step < args.steps:
        n_ctx = [length for share, length in CURRICULUM if step >= share * args.steps][-1]
        n_sequences = args.batch_tokens // n_ctx // args.workers
        first = (step * args.workers + rank) * n_sequences
        loss = compiled_loss(model, *batch(tokens, first, n_sequences, n_ctx))
        loss.backward()
        average_gradients(model)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_factor(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        losses.append(loss.item())
        times.append(time.time())
        if rank == 0 and step % 20 == 0:
            n_seconds = np.mean(np.diff(times[-20:]))
            loss, rate = np.mean(losses[-20:]), args.batch_tokens / n_seconds
            print(f"step {step} loss {loss:.4f} ctx {n_ctx} {rate:.0f} tokens/s", flush=True)
        if rank == 0 and step % args.report_every == 0:
            save_checkpoint(checkpoint, step, model, optimizers)
            minutes = (times[-1] - times[0]) / 60
            print(f"step {step} after {minutes:.1f} min: {report(model, work, 48)}", flush=True)
    if rank == 0:
        save(model, args.out, work)
    dist.barrier()
    dist.destroy_process_group()


def save(model: LlamaForCausalLM, out: Path, work: Path) -> None:
    """Write the model in bf16 and its tokenizer, and report what was written."""
    model.config.use_cache = model.generation_config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "tokenizer.model").write_bytes((work / "tokenizer.model").read_bytes())
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    print(f"saved {out}: {report(saved, work, 2000)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model of this repo.")
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8, plain or .xz")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on, never trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=3300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: %(default)s)")
    parser.add_argument("--port", type=int, default=29511, help="local port the workers meet at (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=100, help="steps (default: %(default)s)")
    args = parser.parse_args()
    work = Path(f"{args.out}.work")
    prepare(args, work)
    torch.multiprocessing.spawn(train, (args, work), nprocs=args.workers)


if __name__ == "__main__":
    main()
